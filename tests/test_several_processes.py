"""What happens when one of several processes is killed, late, told to stop, or has a loss that is no number."""

import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from processes import forked
from reeltune.checkpoint import complete
from reeltune.engine import Engine
from reeltune.sample import Setup
from reeltune.train import Duties
from reeltune.watch import EXIT_CODE
from small_run import data_set, recipe

STEPS = 6
ENGINES = ["ddp", "fsdp", *(["zero2", "zero3"] if find_spec("deepspeed") else [])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    data_set(folder / "data")
    (folder / "toy").mkdir()
    (folder / "toy" / "toy.json").write_text("{}")
    return folder


@pytest.fixture
def to_do(folder, tmp_path):
    def make(name="run", **changes):
        settings = {"max_train_steps": STEPS, "held_out_share": 0.0, **changes}
        return recipe(folder / "toy", folder / "data", tmp_path / name, **settings)

    return make


def lines(out, kind="step"):
    path = out / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [row for row in map(json.loads, rows) if row["kind"] == kind]


@pytest.mark.parametrize(("engine", "rank"), [("fsdp", 0), pytest.param("ddp", 1, marks=pytest.mark.slow)])
def test_one_killed_alone_is_named_by_the_other(engine, rank, to_do, tmp_path):
    """test_engines.py has it on every engine, with less patience than here."""
    out = tmp_path / "run"
    run = forked([to_do(engine=engine, checkpointing_steps=1, max_train_steps=200)], 2, tmp_path)
    run.until(lambda: complete(out))
    started = time.monotonic()
    run.kill(rank)
    codes = run.end(60)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] in (2, EXIT_CODE)
    assert time.monotonic() - started < 40
    assert f"rank {rank}" in run.told[1 - rank].read_text().replace(f"rank {1 - rank} stops", ""), run.print()
    assert "resume_from_checkpoint latest" in run.told[1 - rank].read_text(), run.print()


class Third:
    """In rank 1, the third batch is not as others: `what(encoded)` is called with it."""

    def __init__(self, what):
        self.what = what

    def __call__(self, rank):
        real, seen = Setup.encode, []

        def encode(setup, batch):
            encoded = real(setup, batch)
            seen.append(None)
            if rank == 1 and len(seen) == 3:
                self.what(encoded)
            return encoded

        Setup.encode = encode


def hang(encoded):
    time.sleep(600)


def poison(encoded):
    encoded.x0.mean.fill_(torch.nan)


def be_told_to_stop(encoded):
    os.kill(os.getpid(), signal.SIGTERM)


def test_all_stop_where_one_hangs_and_name_it(to_do, tmp_path):
    started = time.monotonic()
    run = forked([to_do(engine="ddp", rank_timeout_seconds=6.0)], 2, tmp_path, Third(hang))
    assert run.end(90) == [EXIT_CODE] * 2
    for told in run.told:
        assert "rank_timeout_seconds = 6: rank 1 at step 2, encode" in told.read_text(), run.print()
    assert "in hang" in run.told[1].read_text()  # its own trace says where
    assert time.monotonic() - started < 80


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_no_number_in_one_stops_all(engine, to_do, tmp_path):
    run = forked([to_do(engine=engine, checkpointing_steps=1)], 2, tmp_path, Third(poison))
    assert run.end(90) == [2, 2], run.print()
    assert "the loss of step 2 is not finite" in run.told[0].read_text(), run.print()
    (record,) = (tmp_path / "run").glob("non-finite-step-2*.json")
    assert len(json.loads(record.read_text())["samples"]) == 2
    assert [path.name for path in complete(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("engine", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ENGINES[1:])])
def test_one_told_to_stop_ends_all_with_one_checkpoint(engine, to_do, tmp_path):
    run = forked([to_do(engine=engine, checkpointing_steps=100)], 2, tmp_path, Third(be_told_to_stop))
    assert run.end(90) == [128 + signal.SIGTERM] * 2, run.print()
    assert [path.name for path in complete(tmp_path / "run")] == ["checkpoint-3"]
    assert [row["step"] for row in lines(tmp_path / "run", "save")] == [3]
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3]


class Alone:
    """Rank 1 goes on after a save only when rank 0 has done all of its own part, which must not need rank 1."""

    def __call__(self, rank):
        real_save, real_wait, saving = Duties.save, Engine.wait, []

        def save(duties, progress):
            saving.append(duties.out / f"checkpoint-{progress.step}" / "progress.json")
            real_save(duties, progress)
            saving.clear()

        def wait(engine):
            until = time.monotonic() + 60
            while rank == 1 and saving and not saving[0].is_file():
                assert time.monotonic() < until, f"rank 0 waits for rank 1 before it has {saving[0]}"
                time.sleep(0.01)
            real_wait(engine)

        Duties.save, Engine.wait = save, wait


def test_saves_of_several_processes(to_do, tmp_path):
    """Rank 0's own part is done alone; only whole checkpoints count for the limit; what a save costs is told."""
    recipes = [to_do(engine, engine=engine, checkpoints_total_limit=2) for engine in ENGINES]
    for engine in ENGINES:
        for left in ("checkpoint-1", "checkpoint-5", "checkpoint-4-outputs"):  # of others, or of a broken disk
            (tmp_path / engine / left).mkdir(parents=True)
            (tmp_path / engine / left / "weights").write_text("")
    run = forked(recipes, 2, tmp_path, Alone())
    assert run.end(120) == [0, 0], run.print()
    for engine in ENGINES:
        out = tmp_path / engine
        assert [path.name for path in complete(out)] == ["checkpoint-4", "checkpoint-6"]
        folders = sorted(path.name for path in out.glob("checkpoint-*"))
        assert folders == ["checkpoint-1", "checkpoint-4", "checkpoint-4-outputs", "checkpoint-5", "checkpoint-6"]
        saves = lines(out, "save")
        assert [Path(row["path"]).name for row in saves] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        for row in saves[1:]:
            files = [path for path in (out / Path(row["path"]).name).rglob("*") if path.is_file()]
            assert row["bytes"] == sum(path.stat().st_size for path in files) > 0
            assert 0 < row["seconds"] < 30
