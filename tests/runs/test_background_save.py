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
import psutil
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.utils._pytree import tree_leaves

from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.folder import complete
from reeltune.core.errors import UserError
from reeltune.distributed.engine import Engine
from reeltune.distributed.watchdog import EXIT_CODE
from reeltune.memory.host import room_bytes
from reeltune.reporting.ledger import Ledger
from reeltune.sampling.sample import Setup
from reeltune.training import background_save
from reeltune.training.background_save import Saving, saves_in_background
from reeltune.training.host_copies import HostCopies
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


# ---- where there is no room


class Little:
    """Rank 1's machine has little memory left."""

    def __call__(self, rank):
        background_save.room_bytes = lambda: 1000 if rank == 1 else 2**40
        background_save.platform.node = lambda: f"machine-{rank}"


@pytest.mark.parametrize("engine", ["fsdp"])
def test_where_a_machine_has_no_room_all_wait_and_it_is_said_once(engine, to_do, tmp_path):
    run = forked([to_do(engine=engine)], 2, tmp_path, Little())
    assert run.end() == [0, 0], run.print()
    said = [row["text"] for row in lines(tmp_path / "run", "notice") if "training waits" in row["text"]]
    assert len(said) == 1 and said[0].endswith("for a copy, and machine-1 has 0.00 GiB left")
    assert [row["step"] for row in lines(tmp_path / "run")] == [2, 4, 6]
    assert all(row["blocked_seconds"] >= row["seconds"] for row in lines(tmp_path / "run"))


class Recorded(HostCopies):
    """Of a run. `reserved` and `made` hold all of it, so that nothing else can come to lie in that memory."""

    def __init__(self):
        super().__init__()
        self.reserved, self.made = [], []

    def reserve(self, tree):
        super().reserve(tree)
        self.reserved = list(self._free)

    def copied(self, tree):
        self.made.append(super().copied(tree))
        return self.made[-1]


@pytest.fixture
def copies(monkeypatch):
    """Of the runs of a test, in their order."""
    runs = []
    monkeypatch.setattr(background_save, "HostCopies", lambda: runs.append(Recorded()) or runs[-1])
    return runs


@pytest.mark.parametrize(("share", "has_room"), [(1.21, True), (1.19, False)])
def test_the_room_wanted_is_that_of_all_processes_of_a_machine(share, has_room, to_do, tmp_path, monkeypatch, copies):
    """One that has a third of the bytes, and two others there that have as much each; what they hold is no room."""
    learners = []
    real = Saving._contents
    monkeypatch.setattr(Saving, "_contents", lambda saving: learners.append(saving.turns.now.learner) or real(saving))
    monkeypatch.setattr(Engine, "gather", lambda engine, thing: [thing] * 3)

    def room():
        return int(3 * (share * sum(learners[-1].held_bytes().values()) - copies[0].held_bytes()))

    monkeypatch.setattr(background_save, "room_bytes", room)
    assert train(to_do(max_train_steps=5)) == 0
    notices = [row["text"] for row in lines(tmp_path / "run", "notice")]
    assert any("training waits" in text for text in notices) != has_room
    assert len(copies[0].made) == (2 if has_room else 0)


# ---- the memory of the copies


def test_all_saves_copy_into_the_memory_that_was_reserved(to_do, copies):
    def places(tree):
        return sorted(leaf.data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))

    assert train(to_do()) == 0
    (of_run,) = copies
    assert places(of_run.reserved) and len(of_run.made) == 2
    assert all(places(one) == places(of_run.reserved) for one in of_run.made)
    assert of_run.held_bytes() == 0  # no more, once the last is written


def test_where_room_becomes_scarce_it_is_given_back(to_do, tmp_path, copies, monkeypatch):
    """At the second save others have left no more than a tenth of the copies' bytes beside them."""
    held = []

    def room():
        held.append(copies[0].held_bytes())
        return held[-1] // 10 if len(held) == 3 else 2**40

    monkeypatch.setattr(background_save, "room_bytes", room)
    assert train(to_do(max_train_steps=8)) == 0
    assert held[0] == 0 and held[1] == held[2] > 0 and held[3:] == [0]
    assert len(copies[0].made) == 2  # of the first and the third; training waits for the second and the last
    assert [row["step"] for row in lines(tmp_path / "run")] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("every", "step", "total_steps", "are_made"),
    [(2, 1, 3, True), (2, 1, 2, False), (2, 2, 3, True), (2, 3, 4, False), (2, 3, 5, True), (500, 1, 400, False)],
)
def test_copies_are_made_of_all_but_the_last_checkpoint(every, step, total_steps, are_made, to_do):
    assert saves_in_background(to_do(checkpointing_steps=every), step, total_steps) == are_made
    waits = to_do(checkpointing_steps=every, save_in_background=False)
    assert not saves_in_background(waits, step, total_steps)


@pytest.mark.parametrize("changes", [{"max_train_steps": 2}, {"save_in_background": False}])
def test_no_memory_is_reserved_where_no_copy_is_made(changes, to_do, copies):
    assert train(to_do(**changes)) == 0
    assert not copies[0].reserved and not copies[0].made


def groups(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_room_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Told", (), {"available": 5000}))
    assert room_bytes(tmp_path) == 5000
    two = {  # the limit is that of the group above
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/memory.max": "3000\n",
        "sys/fs/cgroup/job/memory.current": "1800\n",
        "sys/fs/cgroup/job/memory.stat": "anon 700\ninactive_file 1000\nactive_file 100\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
    }
    assert room_bytes(groups(tmp_path / "two", two)) == 3000 - 1800 + 1000
    one = {  # within a container, where its group is the root
        "proc/self/cgroup": "5:memory:/docker/1f\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "3500\n",
        "sys/fs/cgroup/memory/memory.stat": "inactive_file 7\ntotal_inactive_file 200\n",
    }
    assert room_bytes(groups(tmp_path / "one", one)) == 4000 - 3500 + 200
