"""The matrix: every family on every engine is trained, killed, gone on with elsewhere, and exported."""

import importlib.util
import json
import os
import shutil
import signal
import statistics
import time
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from reeltune import families
from reeltune.cache.fill import fill
from reeltune.checkpoint.folder import is_shared
from reeltune.core.rng import dice
from reeltune.distributed.engine import DTYPES
from reeltune.distributed.watchdog import EXIT_CODE
from reeltune.export.main import export
from reeltune.families import MODULES, configs, weights
from reeltune.training import loop as module
from reeltune.training.learner import Learner
from tests.distributed.gathered import leave_gathered
from tests.distributed.processes import FOUND_SECONDS, Run, forked, hasty, train
from tests.runs.same_run import assert_same_end
from tests.runs.small_run import recipe

STEPS, HALF = 6, 3
BF16 = {"mixed_precision": "bf16", "max_train_steps": HALF}
GROUP = 4  # samples of a micro-step over all processes
TOLERANCE = 2e-6  # relative, in fp32; of the first 8 steps at most 1.7e-7 was measured, of 12 3.8e-7
TOLERANCE_OF_NORMS = 2e-5  # at most 6.6e-7 of 12 steps
BAND = 5e-3  # relative, in bf16, whose own losses differ from fp32's by up to 2.8e-3; at most 1.1e-3 was measured
BAND_OF_TOY = 1e-3  # at most 1.4e-4 (all on a CPU, torch 2.13, 2026-11-27)
with_deepspeed = importlib.util.find_spec("deepspeed") is not None
EVERY = ("ddp", "fsdp", "zero2", "zero3")
ENGINES = EVERY if with_deepspeed else EVERY[:2]
LIVE = ("alone", "ddp", "ddp-killed")  # runs that encode their clips as they train
of_engines = pytest.mark.parametrize("engine", EVERY)
KILLED = ("all", "one", "all within a save", "one within a save")  # of the processes; `one` is either by chance


class Runs:
    """Of one family: `engine`, `engine-bf16`, and `engine-from-other`, the second half of what another engine began;
    in two processes, `alone` in one.

    LIVE encode their clips as they train; the others, whose networks alone are another matter, read them from a
    cache. Encoding them takes two thirds of a tiny run's step (measured, 2026-11-26).
    """

    def __init__(self, pair, data, folder):
        (folder / "checkpoint").mkdir()
        self.checkpoint, self.mode = pair.lay_out(folder / "checkpoint"), pair.mode
        self.data, self.folder, self.family = data, folder, pair.family

    @property
    def is_toy(self):
        return self.family == "toy"

    def recipe(self, name, processes=2, **changes):
        engine = name.partition("-")[0]
        dtype = "bf16" if changes.get("mixed_precision") == "bf16" else "fp32"
        settings = {
            "cache_folder": None if name in LIVE else str(self.folder / f"cache-{dtype}"),
            "cache_variants": 1,
            "engine": None if engine == "alone" else engine,
            "train_mode": self.mode,
            "train_batch_size": GROUP // processes,
            "max_train_steps": STEPS,
            "checkpointing_steps": HALF,
            "held_out_share": 0.2 if self.is_toy else 0.0,
        }
        return recipe(self.checkpoint, self.data, self.folder / name, **{**settings, **changes})

    def half_of(self, name):
        return str(self.folder / name / f"checkpoint-{HALF}")

    def make(self):
        torch.set_num_threads(1)
        for changes in ({}, BF16):
            assert fill(self.recipe("fsdp", **changes)) == 0
        assert module.train(self.recipe("alone", processes=1)) == 0
        assert module.train(self.recipe("alone-bf16", processes=1, **BF16)) == 0
        recipes = []
        for engine, other in zip(ENGINES, ["alone", *ENGINES], strict=False):
            recipes.append(self.recipe(engine))
            recipes.append(self.recipe(f"{engine}-from-{other}", resume_from_checkpoint=self.half_of(other)))
            recipes.append(self.recipe(f"{engine}-bf16", **BF16))
        train(recipes, 2, self.folder, partial(leave_gathered, names=ENGINES))
        for engine in ENGINES if self.is_toy else ENGINES[-1:]:
            name = f"alone-from-{engine}"
            assert module.train(self.recipe(name, resume_from_checkpoint=self.half_of(engine))) == 0

    def begin(self, engine, name):
        """The first half of that engine's run, in a folder of its own. Returns the folder."""
        ours = shutil.ignore_patterns(f"checkpoint-{STEPS}")
        return shutil.copytree(self.folder / engine, self.folder / name, ignore=ours)

    def after_kill(self, engine):
        """As it is started before it is killed and after: with a save every step."""
        return self.recipe(f"{engine}-killed", checkpointing_steps=1, resume_from_checkpoint="latest")

    def rows(self, name, kind="step"):
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def losses(self, name):
        return {row["step"]: row["loss"] for row in self.rows(name)}

    def second_half(self, name):
        return {step: loss for step, loss in self.losses(name).items() if step > HALF}

    def live(self, engine):
        """The weights at the run's end, gathered on the spot, by their released names."""
        state = weights.read(self.folder / engine / "gathered.safetensors")
        config = configs.read_config(self.folder / engine / f"checkpoint-{STEPS}" / "transformer")
        return families.find(self.checkpoint).to_released(state, config)


@pytest.fixture(scope="module")
def runs(one_of_a_family, data, tmp_path_factory):
    made = Runs(one_of_a_family, data, tmp_path_factory.mktemp("engines"))
    made.make()
    return made


def made_by(engine):
    if engine not in ENGINES:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")


# ---- trained


@of_engines
def test_trained_in_fp32_its_losses_are_those_of_one_process(engine, runs):
    made_by(engine)
    ours, alone = runs.losses(engine), runs.losses("alone")
    assert list(ours) == list(range(1, STEPS + 1))
    assert ours == pytest.approx(alone, rel=TOLERANCE)
    norms = [[row["grad_norm"] for row in runs.rows(name)] for name in (engine, "alone")]
    assert norms[0] == pytest.approx(norms[1], rel=TOLERANCE_OF_NORMS)
    held_out = [[row["loss"] for row in runs.rows(name, "validation")] for name in (engine, "alone")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


@of_engines
def test_trained_in_bf16_they_are_within_the_band(engine, runs):
    made_by(engine)
    ours = runs.losses(f"{engine}-bf16")
    assert ours == pytest.approx(runs.losses("alone-bf16"), rel=BAND_OF_TOY if runs.is_toy else BAND)
    assert any(loss != runs.losses(engine)[step] for step, loss in ours.items())


@of_engines
def test_who_shares_writes_shares(engine, runs):
    made_by(engine)
    folder = runs.folder / engine / f"checkpoint-{STEPS}"
    assert is_shared(folder) == (engine != "ddp")
    assert (folder / "transformer" / "config.json").is_file()
    assert (folder / "optimizer.pt").is_file() == (engine == "ddp")
    saved = runs.rows(engine, "save")[-1]
    assert saved["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert saved["seconds"] > 0


# ---- killed


def kind_of(family, engine):
    """How it is killed, one of KILLED."""
    return KILLED[(list(MODULES).index(family) + EVERY.index(engine)) % len(KILLED)]


def test_each_is_killed_in_each_way():
    for engine in EVERY:
        assert {kind_of(family, engine) for family in MODULES} == set(KILLED)
    for family in MODULES:
        assert {kind_of(family, engine) for engine in EVERY} == set(KILLED)


@dataclass(frozen=True)
class Held:
    """For `before`: these ranks come no further than they are to be killed at, however late the kill."""

    ranks: tuple[int, ...]
    save: int | None = None  # the checkpoint's step; its first flush does not end
    step: int | None = None  # does not end, counted from 0

    def __call__(self, rank):
        hasty(rank)
        if rank not in self.ranks:
            return

        def fsync(handle, real=os.fsync):
            if f".checkpoint-{self.save}.partial" in os.readlink(f"/proc/self/fd/{handle}"):
                time.sleep(FOUND_SECONDS)
            real(handle)

        def step(learner, number, rate, real=Learner.step):
            if number == self.step:
                time.sleep(FOUND_SECONDS)
            return real(learner, number, rate)

        os.fsync, Learner.step = fsync, step


@dataclass
class Killed:
    kind: str
    rank: int  # that was killed, if one was
    codes: list[int]
    run: Run
    was_saved: bool


def kill(runs, engine):
    """Half of that engine's run goes on in a folder of its own until it is killed."""
    kind, chance = kind_of(runs.family, engine), dice(4, "kill", runs.family, engine)
    out = runs.begin(engine, f"{engine}-killed")
    step, rank = HALF + chance.randint(1, 2), chance.randrange(2)
    saved, partial = out / f"checkpoint-{step}", out / f".checkpoint-{step}.partial"
    ranks = (0, 1) if "all" in kind else (rank,)
    held = Held(ranks, save=step if "save" in kind else None, step=STEPS - 1)
    run = forked([runs.after_kill(engine)], 2, runs.folder, held)
    run.until(partial.exists if "save" in kind else saved.exists)
    if "save" not in kind:
        time.sleep(chance.uniform(0, STEPS - step) * statistics.median(row["step_s"] for row in runs.rows(engine)))
    run.kill(*ranks)
    return Killed(kind, rank, run.end(FOUND_SECONDS), run, saved.exists())


@pytest.fixture(scope="module")
def killed(runs):
    """By engine. All are started again in the same two processes, as starting them is what takes long."""
    found = {engine: kill(runs, engine) for engine in ENGINES}
    train([runs.after_kill(engine) for engine in ENGINES], 2, runs.folder)
    return found


@of_engines
def test_killed_all_end_and_are_told_how_to_go_on(engine, killed):
    made_by(engine)
    one = killed[engine]
    if "all" in one.kind:
        assert one.codes == [-signal.SIGKILL] * 2
        assert ("save" in one.kind) == (not one.was_saved)
    else:
        rank, codes, run = one.rank, one.codes, one.run
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] in (2, EXIT_CODE), run.print()
        told = run.told[1 - rank].read_text()
        assert f"rank {rank}" in told.replace(f"rank {1 - rank} stops", ""), told
        assert "resume_from_checkpoint latest" in told, told


@of_engines
def test_killed_and_started_again_it_ends_in_the_same_bits(engine, runs, killed):
    made_by(engine)
    out = runs.folder / f"{engine}-killed"
    assert not list(out.glob(".checkpoint*"))
    assert_same_end(out, runs.folder / engine, STEPS)


# ---- gone on with elsewhere


@of_engines
def test_another_engine_goes_on_with_the_same_samples(engine, runs):
    made_by(engine)
    other = ["alone", *ENGINES][ENGINES.index(engine)]
    names = [f"{engine}-from-{other}"]
    if (runs.folder / f"alone-from-{engine}").is_dir():
        names.append(f"alone-from-{engine}")
    for name in names:
        assert runs.losses(name) == pytest.approx(runs.second_half("alone"), rel=TOLERANCE)
        assert (runs.folder / name / "ledger.csv").read_text() == (runs.folder / "alone" / "ledger.csv").read_text()


# ---- exported


def types_of(family, engine):
    """That it is exported in: fp32, and the turn goes round, bf16, which is cast alike whoever wrote the checkpoint."""
    has_turn = list(MODULES).index(family) % len(ENGINES) == ENGINES.index(engine)
    return ("fp32", "bf16") if has_turn else ("fp32",)


def test_each_family_and_each_engine_is_exported_in_bf16():
    pairs = [(family, engine) for family in MODULES for engine in ENGINES if "bf16" in types_of(family, engine)]
    assert {family for family, _ in pairs} == set(MODULES) and {engine for _, engine in pairs} == set(ENGINES)


@of_engines
def test_exported_it_is_the_network_that_was_trained(engine, runs, tmp_path):
    made_by(engine)
    live = runs.live(engine)
    for dtype in types_of(runs.family, engine):
        out, kind = tmp_path / dtype, DTYPES[dtype]
        *_, proof, tried = export(runs.folder / engine / f"checkpoint-{STEPS}", out, dtype=dtype)
        ours = weights.read(out)
        assert ours.keys() == live.keys() and {weight.dtype for weight in ours.values()} == {kind}
        assert not [key for key in live if not torch.equal(ours[key], live[key].to(kind))]
        assert proof.startswith(f"{len(live)} tensors, {dtype}") and tried.endswith("finite")
