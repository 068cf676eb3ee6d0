"""The matrix: every family on every engine is trained and exported; what is no matter of the two together, killed, gone
on with elsewhere or trained in bf16, the toy is on every engine, and every other family on those whose turn it is."""

import importlib.util
import json
import os
import shutil
import signal
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from reeltune import families
from reeltune.cache.fill import fill
from reeltune.checkpoint.folder import is_shared
from reeltune.checkpoint.state import Shared
from reeltune.core.rng import dice
from reeltune.distributed.engine import DTYPES
from reeltune.distributed.watchdog import EXIT_CODE
from reeltune.export.main import export
from reeltune.families import MODULES, configs, weights
from reeltune.optim.optimizers import average_decay
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
of_engines = pytest.mark.parametrize("engine", EVERY)
KILLED = ("all", "one", "all within a save", "one within a save")  # of the processes; `one` is either by chance


def turn(family):
    """Each family but the toy has one engine's, and each engine comes. HunyuanVideo's network has the most modules, of
    which ZeRO-3 looks at each."""
    return ENGINES[(list(MODULES).index(family) + 1) % len(ENGINES)]


def in_bf16(family):
    """Two engines of a family, of which one at least casts its weights."""
    place, half = ENGINES.index(turn(family)), len(ENGINES) // 2
    return ENGINES if family == "toy" else (ENGINES[place], ENGINES[(place + half) % len(ENGINES)])


def kills(family):
    """(engine, one of KILLED) of each: of the toy all that no other family has."""
    others = {
        (turn(other), KILLED[place % len(KILLED)]): other for place, other in enumerate(MODULES) if other != "toy"
    }
    if family == "toy":
        return [(engine, kind) for engine in ENGINES for kind in KILLED if (engine, kind) not in others]
    return [kill for kill, other in others.items() if other == family]


def onward(family):
    """Names of runs that go on with what another engine began: of the toy by every engine, of another family in its
    turn."""
    pairs = zip(ENGINES, ("alone", *ENGINES), strict=False)
    return [f"{engine}-from-{other}" for engine, other in pairs if family == "toy" or engine == turn(family)]


def encodes(name):
    """Whether that run encodes its clips as it trains; the others, whose networks alone are another matter, read them
    from a cache. Encoding them takes two thirds of a tiny run's step (measured, 2026-11-26)."""
    return name == "ddp" or name.startswith("ddp-killed")


class Runs:
    """Of one family: `engine`, `engine-bf16`, and `engine-from-other`, the second half of what another engine began;
    in two processes, `alone` in one."""

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
            "cache_folder": None if encodes(name) else str(self.folder / f"cache-{dtype}"),
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
        for engine in ENGINES:
            recipes.append(self.recipe(engine))
            recipes += [self.second_part(name) for name in onward(self.family) if name.startswith(engine)]
            recipes += [self.recipe(f"{engine}-bf16", **BF16)] if engine in in_bf16(self.family) else []
        if self.is_toy:
            recipes.append(self.averaged("fsdp-averaged-from-ddp"))
        train(recipes, 2, self.folder, partial(leave_gathered, names=ENGINES))
        for engine in ENGINES if self.is_toy else ENGINES[-1:]:
            assert module.train(self.second_part(f"alone-from-{engine}")) == 0
        if self.is_toy:
            assert module.train(self.averaged("alone-averaged-from-fsdp", processes=1)) == 0

    def second_part(self, name):
        """The recipe of what goes on with the half of another's run."""
        return self.recipe(name, resume_from_checkpoint=self.half_of(name.rpartition("-")[2]))

    def averaged(self, name, processes=2):
        """The recipe of one step more than the half of another's run, which kept no average."""
        half = self.half_of(name.rpartition("-")[2])
        return self.recipe(name, processes, resume_from_checkpoint=half, max_train_steps=HALF + 1, use_ema=True)

    def begin(self, engine, name):
        """The first half of that engine's run, in a folder of its own. Returns the folder."""
        ours = shutil.ignore_patterns(f"checkpoint-{STEPS}")
        return shutil.copytree(self.folder / engine, self.folder / name, ignore=ours)

    def after_kill(self, name):
        """As it is started before it is killed and after: with a save every step."""
        return self.recipe(name, checkpointing_steps=1, resume_from_checkpoint="latest")

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


def test_trained_in_bf16_they_are_within_the_band(runs):
    for engine in in_bf16(runs.family):
        ours = runs.losses(f"{engine}-bf16")
        assert len(ours) == HALF
        assert ours == pytest.approx(runs.losses("alone-bf16"), rel=BAND_OF_TOY if runs.is_toy else BAND), engine
        assert any(loss != runs.losses(engine)[step] for step, loss in ours.items()), engine


def test_each_engine_has_a_turn():
    families = [family for family in MODULES if family != "toy"]
    assert {turn(family) for family in families} == set(ENGINES)
    assert all(set(in_bf16(family)) - {"ddp"} for family in families)
    assert {engine for family in families for engine in in_bf16(family)} == set(ENGINES)


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


def test_each_is_killed_in_each_way():
    tried = [kill for family in MODULES for kill in kills(family)]
    assert sorted(tried) == sorted((engine, kind) for engine in ENGINES for kind in KILLED)
    assert all(map(kills, MODULES))


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
    engine: str
    kind: str
    name: str
    rank: int  # that was killed, if one was
    codes: list[int]
    run: Run
    was_saved: bool


def kill(runs, engine, kind):
    """Half of that engine's run goes on in a folder of its own until it is killed."""
    chance, name = dice(4, "kill", runs.family, engine, kind), f"{engine}-killed-{KILLED.index(kind)}"
    out = runs.begin(engine, name)
    step, rank = HALF + chance.randint(1, 2), chance.randrange(2)
    saved, partial = out / f"checkpoint-{step}", out / f".checkpoint-{step}.partial"
    ranks = (0, 1) if "all" in kind else (rank,)
    held = Held(ranks, save=step if "save" in kind else None, step=STEPS - 1)
    run = forked([runs.after_kill(name)], 2, runs.folder, held)
    run.until(partial.exists if "save" in kind else saved.exists)
    if "save" not in kind:
        time.sleep(chance.uniform(0, STEPS - step) * statistics.median(row["step_s"] for row in runs.rows(engine)))
    run.kill(*ranks)
    return Killed(engine, kind, name, rank, run.end(FOUND_SECONDS), run, saved.exists())


@pytest.fixture(scope="module")
def killed(runs):
    """All are started again in the same two processes, as starting them is what takes long."""
    found = [kill(runs, *one) for one in kills(runs.family)]
    train([runs.after_kill(one.name) for one in found], 2, runs.folder)
    return found


@pytest.mark.slow
def test_killed_all_end_and_are_told_how_to_go_on(killed):
    for one in killed:
        assert_ended(one)


def assert_ended(one):
    case = f"{one.engine}: {one.kind}\n{one.run.print()}"
    if "all" in one.kind:
        assert one.codes == [-signal.SIGKILL] * 2, case
        assert ("save" in one.kind) == (not one.was_saved), case
    else:
        assert one.codes[one.rank] == -signal.SIGKILL and one.codes[1 - one.rank] in (2, EXIT_CODE), case
        told = one.run.told[1 - one.rank].read_text()
        assert f"rank {one.rank}" in told.replace(f"rank {1 - one.rank} stops", ""), case
        assert "resume_from_checkpoint latest" in told, case


@pytest.mark.slow
def test_killed_and_started_again_it_ends_in_the_same_bits(runs, killed):
    for one in killed:
        out = runs.folder / one.name
        assert not list(out.glob(".checkpoint*")), f"{one.engine}: {one.kind}"
        assert_same_end(out, runs.folder / one.engine, STEPS)


# ---- gone on with elsewhere


def test_another_engine_goes_on_with_the_same_samples(runs):
    alone = [path.name for path in runs.folder.glob("alone-from-*")]
    assert alone and onward(runs.family)
    for name in (*onward(runs.family), *alone):
        assert runs.losses(name) == pytest.approx(runs.second_half("alone"), rel=TOLERANCE), name
        assert (runs.folder / name / "ledger.csv").read_text() == (runs.folder / "alone" / "ledger.csv").read_text()


@pytest.mark.family("toy")
@pytest.mark.parametrize("name", ["fsdp-averaged-from-ddp", "alone-averaged-from-fsdp"])
def test_an_average_that_was_not_kept_begins_with_the_weights(name, runs):
    ours = runs.folder / name / f"checkpoint-{HALF + 1}"
    last, average = (kept(ours, average=average) for average in (False, True))
    begun = kept(Path(runs.half_of(name.rpartition("-")[2])))
    share = 1 - average_decay(HALF, 1.0)
    assert all(torch.allclose(average[key], torch.lerp(begun[key], last[key], share), atol=1e-7) for key in begun)
    assert any(not torch.equal(last[key], begun[key]) for key in begun)


def kept(checkpoint, *, average=False):
    """The weights that it keeps, or their average."""
    if is_shared(checkpoint):
        return dict(Shared(checkpoint).weights(average=average))
    return weights.read(checkpoint / ("transformer_ema" if average else "transformer"))


# ---- exported


def types_of(family, engine):
    """That it is exported in: fp32, and in its turn bf16, which is cast alike whoever wrote the checkpoint."""
    return ("fp32", "bf16") if engine == turn(family) else ("fp32",)


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
