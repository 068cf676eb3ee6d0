"""What happens when one of several processes is killed, late, told to stop, or has a loss that is no number."""

import importlib
import json
import os
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from reeltune.checkpoint.folder import complete
from reeltune.distributed import watchdog
from reeltune.distributed.watchdog import EXIT_CODE, Watchdog
from reeltune.training.background_save import Saving
from tests.distributed.processes import FOUND_SECONDS, forked, hasty, train
from tests.runs.same_run import assert_same_end
from tests.runs.small_run import recipe

STEPS = 6
ENGINES = ["ddp", "fsdp", *(["zero2", "zero3"] if find_spec("deepspeed") else [])]


@pytest.fixture
def to_do(data, toy, tmp_path):
    def make(name="run", **changes):
        settings = {"max_train_steps": STEPS, "held_out_share": 0.0, **changes}
        return recipe(toy, data, tmp_path / name, **settings)

    return make


def lines(out, kind="step"):
    path = out / "metrics.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [row for row in map(json.loads, rows) if row["kind"] == kind]


@pytest.mark.parametrize(("engine", "rank"), [("fsdp", 0), pytest.param("ddp", 1, marks=pytest.mark.slow)])
def test_one_killed_alone_is_named_by_the_other(engine, rank, to_do, tmp_path):
    """test_engines.py has it on every engine, with less patience than here."""
    out = tmp_path / "run"
    run = forked([to_do(engine=engine, checkpointing_steps=1, max_train_steps=200)], 2, tmp_path, hasty)
    run.until(lambda: complete(out))
    run.kill(rank)
    codes = run.end(FOUND_SECONDS)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] in (2, EXIT_CODE)
    assert f"rank {rank}" in run.told[1 - rank].read_text().replace(f"rank {1 - rank} stops", ""), run.print()
    assert "resume_from_checkpoint latest" in run.told[1 - rank].read_text(), run.print()


class At:
    """In one rank, the `turn`-th answer of `where` is not as others: `what(answer)` is called with it.

    There the others' patience is over, too.
    """

    def __init__(self, what, where="sampling.sample.Setup.encode", turn=3, rank=1, patience_seconds=2.0):
        self.what, self.where, self.turn, self.rank, self.patience_seconds = what, where, turn, rank, patience_seconds

    def __call__(self, rank):
        module, kind, name = self.where.rsplit(".", 2)
        kind = getattr(importlib.import_module(f"reeltune.{module}"), kind)
        real, start, watches, turns = getattr(kind, name), Watchdog.__init__, [], []

        def here(*args, **more):
            answer = real(*args, **more)
            turns.append(None)
            if len(turns) == self.turn:
                watches[0].patience_seconds = self.patience_seconds
                if rank == self.rank:
                    self.what(answer)
            return answer

        def keep(one, *args):
            start(one, *args)
            watches.append(one)

        setattr(kind, name, here)
        Watchdog.__init__ = keep
        watchdog.BEAT_SECONDS, watchdog.LOST_SECONDS = 0.2, 4.0


def hang(_):
    time.sleep(600)


def freeze(_):
    os.kill(os.getpid(), signal.SIGSTOP)


def poison(encoded):
    encoded.x0.mean.fill_(torch.nan)


def be_told_to_stop(_):
    os.kill(os.getpid(), signal.SIGTERM)


BLOCK, WRITE = "families.toy.family.ToyBlock.forward", "distributed.sharded_io._Writing.resolve_data"
HANGS = [  # engine, what is being done, where, in which turn, of which rank
    ("ddp", "data", "data.loader.Reader.__getitem__", 3, 1),
    ("ddp", "encode", "sampling.sample.Setup.encode", 3, 1),
    ("ddp", "encode", "sampling.sample.Setup.encode", 3, 0),
    ("ddp", "forward", BLOCK, 5, 1),
    ("ddp", "forward", BLOCK, 5, 0),
    ("ddp", "save", "training.learner.Learner.write_weights", 1, 0),
    ("fsdp", "data", "data.loader.Reader.__getitem__", 3, 1),
    ("fsdp", "forward", BLOCK, 5, 1),  # others wait for the block's weights, in the forward or the backward pass
    ("fsdp", "save", WRITE, 1, 1),
    ("zero2", "forward", BLOCK, 5, 1),
    ("zero2", "save", WRITE, 1, 0),
    ("zero3", "forward", BLOCK, 6, 1),
    ("zero3", "forward", BLOCK, 5, 0),
    ("zero3", "save", WRITE, 1, 1),
]
QUICK = [("ddp", "forward", 1), ("fsdp", "save", 1)]


@pytest.mark.parametrize(
    ("engine", "what", "where", "turn", "rank"),
    [
        pytest.param(*one, id=f"{one[0]}-{one[1]}-{one[4]}", marks=() if quick else pytest.mark.slow)
        for one in HANGS
        if one[0] in ENGINES
        for quick in [(*one[:2], one[4]) in QUICK]
    ],
)
def test_all_stop_where_one_hangs_and_name_it(engine, what, where, turn, rank, to_do, tmp_path):
    run = forked([to_do(engine=engine)], 2, tmp_path, At(hang, where, turn, rank))
    assert run.end(FOUND_SECONDS) == [EXIT_CODE] * 2, run.print()
    step = 4 if what == "save" else 2  # one that is late in writing is so at its next save
    said = f"others wait for more than rank_timeout_seconds = 2: rank {rank} at step {step}, {what}; "
    for told in run.told:
        assert said in told.read_text(), run.print()
    assert "in hang" in run.told[rank].read_text()  # its own trace says where
    assert "in hang" not in run.told[1 - rank].read_text()


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_all_stop_where_one_is_frozen(rank, to_do, tmp_path):
    """As a machine that has lost its power or its network: nothing is closed, and nothing is answered."""
    run = forked([to_do(engine="ddp")], 2, tmp_path, At(freeze, rank=rank, patience_seconds=600.0))
    run.until(lambda: not run.forks[1 - rank].is_alive(), FOUND_SECONDS)
    run.kill(rank)
    assert run.end()[1 - rank] == EXIT_CODE, run.print()
    said = "no answer for 4 s from rank 0, where" if rank == 0 else "no sign of life for 4 s: rank 1 at step "
    assert f"rank {1 - rank} stops: {said}" in run.told[1 - rank].read_text()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_no_number_in_one_stops_all(engine, to_do, tmp_path):
    run = forked([to_do(engine=engine, checkpointing_steps=1)], 2, tmp_path, At(poison))
    assert run.end() == [2, 2], run.print()
    assert "the loss of step 2 is not finite" in run.told[0].read_text(), run.print()
    (record,) = (tmp_path / "run").glob("non-finite-step-2*.json")
    assert len(json.loads(record.read_text())["samples"]) == 2
    assert [path.name for path in complete(tmp_path / "run")] == ["checkpoint-1", "checkpoint-2"]


def stopped(engine, to_do, folder):
    """That engine's run in folder/engine, told to stop in one process; and the recipes with which it goes on."""
    out, settings = folder / engine, {"engine": engine, "checkpointing_steps": 100}
    run = forked([to_do(engine, **settings)], 2, folder, At(be_told_to_stop))
    assert run.end() == [128 + signal.SIGTERM] * 2, run.print()
    assert [path.name for path in complete(out)] == ["checkpoint-3"]
    assert [row["step"] for row in lines(out, "save")] == [3]
    assert [row["step"] for row in lines(out)] == [1, 2, 3]
    return [to_do(engine, **settings, resume_from_checkpoint="latest"), to_do(f"{engine}-unbroken", **settings)]


@pytest.mark.parametrize(
    "engines",
    [
        pytest.param(["fsdp"], id="fsdp"),
        pytest.param([name for name in ENGINES if name != "fsdp"], id="others", marks=pytest.mark.slow),
    ],
)
def test_one_told_to_stop_ends_all_with_one_checkpoint_and_they_go_on_to_the_same_bits(engines, to_do, tmp_path):
    """Each in processes of its own; all go on in the same two, one after another."""
    train([one for engine in engines for one in stopped(engine, to_do, tmp_path)], 2, tmp_path)
    for engine in engines:
        assert_same_end(tmp_path / engine, tmp_path / f"{engine}-unbroken", STEPS)


class Alone:
    """Rank 1 goes on after a save only when rank 0 has done all of its own part, which must not need rank 1."""

    def __call__(self, rank):
        real = Saving.finish

        def finish(saving):
            until = time.monotonic() + FOUND_SECONDS
            whole = saving.out / f"checkpoint-{saving.step}" / "progress.json"
            while rank == 1 and saving.under_way is not None and not whole.is_file():
                assert time.monotonic() < until, f"rank 0 waits for rank 1 before it has {whole}"
                time.sleep(0.01)
            real(saving)

        Saving.finish = finish


def test_saves_of_several_processes(to_do, tmp_path):
    """Rank 0's own part is done alone; only whole checkpoints count for the limit; what a save costs is told."""
    recipes = [to_do(engine, engine=engine, checkpoints_total_limit=2) for engine in ENGINES]
    for engine in ENGINES:
        for left in ("checkpoint-1", "checkpoint-5", "checkpoint-4-outputs"):  # of a broken disk
            (tmp_path / engine / left).mkdir(parents=True)
            (tmp_path / engine / left / "ledger.npz").write_text("")
    run = forked(recipes, 2, tmp_path, Alone())
    assert run.end() == [0, 0], run.print()
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
            assert row["seconds"] > 0
