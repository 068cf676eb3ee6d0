"""Checkpoints written while training goes on: what they hold, what they cost, and what happens when that fails."""

import errno
import json
import os
import re
import threading
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.folder import complete
from reeltune.core.errors import UserError
from reeltune.distributed.watchdog import EXIT_CODE
from reeltune.reporting.ledger import Ledger
from reeltune.sampling.sample import Setup
from reeltune.training.background_save import Saving
from reeltune.training.loop import train
from tests.distributed.processes import FOUND_SECONDS, forked
from tests.runs.same_run import assert_equal, assert_same_end, shares
from tests.runs.small_run import data_set, recipe

STEPS = 6
ENGINES = ["ddp", "fsdp", *(["zero2", "zero3"] if find_spec("deepspeed") else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    data_set(folder / "data")
    (folder / "toy").mkdir()
    (folder / "toy" / "toy.json").write_text("{}")
    return folder


def task(folder, out, **changes):
    settings = {"max_train_steps": STEPS, "held_out_share": 0.0, "logging_steps": 1, **changes}
    settings["use_ema"] = "zero" not in str(settings.get("engine"))
    return recipe(folder / "toy", folder / "data", out, **settings)


@pytest.fixture
def to_do(folder, tmp_path):
    return lambda name="run", **changes: task(folder, tmp_path / name, **changes)


@pytest.fixture(scope="module")
def waited(folder):
    """Runs of two processes that wait for their saves, a folder for each engine."""
    made = folder / "waited"
    tasks = [task(folder, made / name, engine=name, save_in_background=False) for name in ENGINES]
    run = forked(tasks, 2, made)
    assert run.end() == [0, 0], run.print()
    return made


def lines(out, kind="save"):
    path = out / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [row for row in map(json.loads, rows) if row["kind"] == kind]


class HeldBack:
    """The writing of a checkpoint begins only when training has come to the next one, and waits; the last begins at
    once."""

    def __call__(self, rank=0, patch=setattr):
        real_finish, waiting = Saving.finish, threading.Event()

        def finish(saving):
            if saving.under_way is not None:
                waiting.set()
            real_finish(saving)
            waiting.clear()

        def later(real, out, progress, *words, **more):
            assert threading.current_thread() is not threading.main_thread()
            assert progress.step == STEPS or waiting.wait(FOUND_SECONDS)
            return real(out, progress, *words, **more)

        patch(Saving, "finish", finish)
        for name in ("save", "save_shares"):
            patch(checkpoint, name, partial(later, getattr(checkpoint, name)))


def held(folder):
    """All that a checkpoint holds, with its account."""
    with np.load(folder / "ledger.npz") as ledger:
        account = {name: ledger[name].tolist() for name in ledger.files}
    told = account | {"progress": json.loads((folder / "progress.json").read_text())}
    if (folder / "shares").is_dir():
        return told | shares(folder)
    weights = {path.parent.name: path.read_bytes() for path in folder.glob("*/*.safetensors")}
    return told | weights | torch.load(folder / "optimizer.pt", weights_only=True)


def assert_held_at_their_steps(out, waited):
    """Each checkpoint holds what that of a run that waited for its saves holds."""
    assert [path.name for path in complete(out)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for path in complete(out):
        assert_equal(held(path), held(waited / path.name))
    assert_same_end(out, waited, STEPS)
    saves = lines(out)
    assert [(row["step"], Path(row["path"]).name) for row in saves] == [(N, f"checkpoint-{N}") for N in (2, 4, 6)]
    assert all(row["blocked_seconds"] < row["seconds"] for row in saves[:-1])
    assert saves[-1]["blocked_seconds"] >= saves[-1]["seconds"]  # no training is left to go on with
    assert all(row["blocked_seconds"] >= row["seconds"] for row in lines(waited))


def test_a_checkpoint_holds_the_state_of_its_step(to_do, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    assert train(to_do("waited", save_in_background=False)) == 0
    HeldBack()(patch=monkeypatch.setattr)
    assert train(to_do()) == 0
    assert_held_at_their_steps(tmp_path / "run", tmp_path / "waited")


@pytest.mark.slow
def test_a_checkpoint_of_several_processes_holds_the_state_of_its_step(waited, to_do, tmp_path):
    run = forked([to_do(name, engine=name) for name in ENGINES], 2, tmp_path, HeldBack())
    assert run.end() == [0, 0], run.print()
    for name in ENGINES:
        assert_held_at_their_steps(tmp_path / name, waited / name)


# ---- what goes wrong


class Full:
    """The disk of one process, that of the last which writes, is full at the second save."""

    def __init__(self, engine):
        self.rank = 0 if engine == "ddp" else 1

    def __call__(self, rank=0, patch=setattr):
        owner, name = (FileSystemWriter, "write_data") if self.rank else (checkpoint, "flush_tree")
        real, calls = getattr(owner, name), []

        def write(*words):
            calls.append(None)
            if len(calls) == 2 and rank == self.rank:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*words)

        patch(owner, name, write)


def assert_ended_by_a_full_disk(out, *, last_step):
    assert [path.name for path in complete(out)] == [f"checkpoint-{lines(out)[0]['step']}"]
    assert not list(out.glob(".checkpoint*"))
    assert len(lines(out)) == 1 and lines(out, "step")[-1]["step"] <= last_step


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_full_disk_ends_all_at_the_next_step(engine, to_do, tmp_path):
    task = to_do(engine=engine, checkpointing_steps=20, max_train_steps=1000)
    run = forked([task], 2, tmp_path, Full(engine))
    assert run.end(FOUND_SECONDS) == [2, 2], run.print()
    assert_ended_by_a_full_disk(tmp_path / "run", last_step=59)
    for told in run.told:
        words = r"checkpoint-40 could not be written \(\[Errno 28\] No space left on device; [\d,.]+ GB free\); free"
        assert re.search(words, told.read_text()), run.print()
        assert "latest, which finds checkpoint-20\n" in told.read_text(), run.print()


def test_a_full_disk_at_the_last_save(to_do, tmp_path, monkeypatch):
    Full("ddp")(patch=monkeypatch.setattr)
    with pytest.raises(UserError, match=r"checkpoint-4 could not be written .*No space left.* finds checkpoint-2"):
        train(to_do(max_train_steps=4))
    assert_ended_by_a_full_disk(tmp_path / "run", last_step=4)


def test_a_lost_folder(to_do, tmp_path, monkeypatch):
    real, aside = Ledger.save, tmp_path / "aside"

    def save(ledger, path, shares):
        if path.parent.name == ".checkpoint-4.partial":
            path.parent.parent.rename(aside)
        real(ledger, path, shares)

    monkeypatch.setattr(Ledger, "save", save)
    with pytest.raises(UserError, match=r"checkpoint-4 could not be written .*No such file.*or bring it back"):
        train(to_do())
    assert [path.name for path in complete(aside)] == ["checkpoint-2"]


@pytest.mark.parametrize("is_full", [False, True])
def test_a_save_under_way_is_finished_where_training_ends_by_its_own_error(is_full, to_do, tmp_path, monkeypatch):
    """The last checkpoint that the error names is the one that was under way, if it could be written."""
    real, poisoned = Setup.encode, threading.Event()
    real_flush = checkpoint.flush_tree

    def encode(setup, batch):
        encoded = real(setup, batch)
        if lines(tmp_path / "run", "step")[-1:] and lines(tmp_path / "run", "step")[-1]["step"] == 5:
            encoded.x0.mean.fill_(torch.nan)
            poisoned.set()
        return encoded

    def flush(folder):
        if folder.name == ".checkpoint-4.partial":
            assert poisoned.wait(FOUND_SECONDS)
            time.sleep(0.3)
            if is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_flush(folder)

    monkeypatch.setattr(Setup, "encode", encode)
    monkeypatch.setattr(checkpoint, "flush_tree", flush)
    with pytest.raises(UserError, match=rf"loss of step 5 is not finite.*from checkpoint-{2 if is_full else 4} with"):
        train(to_do(max_train_steps=8, checkpointing_steps=2))
    assert [path.name for path in complete(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"][: 1 + (not is_full)]
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    assert [row["step"] for row in lines(tmp_path / "run")] == [2, 4][: 1 + (not is_full)]
    warned = [row["text"] for row in lines(tmp_path / "run", "notice") if row.get("warning")]
    assert any("checkpoint-4 could not be written" in text for text in warned) == is_full


class Stalled:
    """The writing of checkpoint-4 comes to no end, in one process."""

    def __init__(self, engine):
        self.rank = 0 if engine == "ddp" else 1

    def __call__(self, rank=0):
        owner, name = (FileSystemWriter, "write_data") if self.rank else (checkpoint, "flush_tree")
        real = getattr(owner, name)

        def write(*words):
            folder = words[0].path if self.rank else words[0]
            if rank == self.rank and ".checkpoint-4.partial" in str(folder):
                time.sleep(600)
            return real(*words)

        setattr(owner, name, write)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_with_a_save_under_way_it_ends_in_the_same_bits(engine, waited, to_do, tmp_path):
    out = tmp_path / "run"
    run = forked([to_do(engine=engine)], 2, tmp_path, Stalled(engine))
    run.until(lambda: [row["step"] for row in lines(out, "step")][-1:] == [5], FOUND_SECONDS)
    run.kill()
    run.end()
    assert (out / ".checkpoint-4.partial").is_dir()
    assert [path.name for path in complete(out)] == ["checkpoint-2"]
    assert forked([to_do(engine=engine, resume_from_checkpoint="latest")], 2, tmp_path).end() == [0, 0]
    assert not list(out.glob(".checkpoint*"))
    assert_same_end(out, waited / engine, STEPS)


@pytest.mark.slow
def test_all_stop_where_a_save_comes_to_no_end_and_name_who_writes_it(to_do, tmp_path):
    run = forked([to_do(engine="ddp", rank_timeout_seconds=6.0)], 2, tmp_path, Stalled("ddp"))
    assert run.end(FOUND_SECONDS) == [EXIT_CODE] * 2, run.print()
    for told in run.told:
        assert "others wait for more than rank_timeout_seconds = 6: rank 0 at step 6, save;" in told.read_text()
