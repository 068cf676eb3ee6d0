"""One run, many engines: the same losses, exact resumes, and a run that goes on in another engine."""

import importlib.util
import json
import shutil

import pytest
import torch

from processes import train
from reeltune import train as module
from reeltune.checkpoint import is_shared
from same_run import assert_same_end
from small_run import data_set, recipe

STEPS = {"toy": 20}  # of the others FEW
FEW = 4
GROUP = 4  # samples of a micro-step over all processes
TOLERANCE = 1e-5  # relative, in fp32
BAND = 1e-2  # relative, in bf16, whose own losses differ from fp32's by up to 2.8e-3; at most 3.2e-3 was measured
BAND_OF_TOY = 2e-3  # at most 3.5e-4 (both on a CPU, torch 2.13, 2026-11-21)
with_deepspeed = importlib.util.find_spec("deepspeed") is not None
ENGINES = ["ddp", "fsdp", *(["zero2", "zero3"] if with_deepspeed else [])]
of_engines = pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"))


class Runs:
    """Of one family: `engine`, `engine-again` (its second half, from the checkpoint there), and `engine-from-other`,
    the second half of what another engine began; in two processes, `alone` in one."""

    def __init__(self, pair, data, folder):
        (folder / "checkpoint").mkdir()
        self.checkpoint, self.mode = pair.lay_out(folder / "checkpoint"), pair.mode
        self.data, self.folder, self.is_toy = data, folder, pair.family == "toy"
        self.steps = STEPS.get(pair.family, FEW)
        self.half = self.steps // 2

    def recipe(self, name, processes=2, **changes):
        engine = name.partition("-")[0]
        settings = {
            "engine": None if engine == "alone" else engine,
            "train_mode": self.mode,
            "train_batch_size": GROUP // processes,
            "max_train_steps": self.steps,
            "checkpointing_steps": self.half,
            "held_out_share": 0.2 if self.is_toy else 0.0,
        }
        out = self.folder / name
        if (self.folder / "alone/index").is_dir():  # one scan for all
            shutil.copytree(self.folder / "alone/index", out / "index", dirs_exist_ok=True)
        return recipe(self.checkpoint, self.data, out, **{**settings, **changes})

    def half_of(self, name):
        return str(self.folder / name / f"checkpoint-{self.half}")

    def make(self):
        torch.set_num_threads(1)
        assert module.train(self.recipe("alone", processes=1)) == 0
        recipes = []
        for engine, other in zip(ENGINES, ["alone", *ENGINES], strict=False):
            recipes.append(self.recipe(engine))
            recipes.append(self.recipe(f"{engine}-again", resume_from_checkpoint=self.half_of(engine)))
            recipes.append(self.recipe(f"{engine}-from-{other}", resume_from_checkpoint=self.half_of(other)))
            recipes.append(self.recipe(f"{engine}-bf16", mixed_precision="bf16"))
        train(recipes, 2, self.folder)
        assert module.train(self.recipe("alone-bf16", processes=1, mixed_precision="bf16")) == 0
        for engine in ENGINES if self.is_toy else ENGINES[-1:]:
            name = f"alone-from-{engine}"
            assert module.train(self.recipe(name, resume_from_checkpoint=self.half_of(engine))) == 0

    def rows(self, name, kind="step"):
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def losses(self, name):
        return {row["step"]: row["loss"] for row in self.rows(name)}

    def second_half(self, name):
        return {step: loss for step, loss in self.losses(name).items() if step > self.half}


@pytest.fixture(scope="module")
def runs(one_of_a_family, data, tmp_path_factory):
    made = Runs(one_of_a_family, data, tmp_path_factory.mktemp("engines"))
    made.make()
    return made


def made_by(engine):
    if engine not in ENGINES:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")


@of_engines
def test_losses_are_those_of_one_process(engine, runs):
    made_by(engine)
    ours, alone = runs.losses(engine), runs.losses("alone")
    assert list(ours) == list(range(1, runs.steps + 1))
    assert ours == pytest.approx(alone, rel=TOLERANCE)
    norms = [[row["grad_norm"] for row in runs.rows(name)] for name in (engine, "alone")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    held_out = [[row["loss"] for row in runs.rows(name, "validation")] for name in (engine, "alone")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
    half = runs.losses(f"{engine}-bf16")
    assert half == pytest.approx(runs.losses("alone-bf16"), rel=BAND_OF_TOY if runs.is_toy else BAND)
    assert half != ours


@of_engines
def test_a_resumed_run_is_the_run(engine, runs):
    made_by(engine)
    again, unbroken = runs.folder / f"{engine}-again", runs.folder / engine
    whole = shutil.copytree(again, runs.folder / f"{engine}-whole")
    before = [json.dumps({"kind": "step", **row}) for row in runs.rows(engine) if row["step"] <= runs.half]
    (whole / "metrics.jsonl").write_text("\n".join(before) + "\n" + (again / "metrics.jsonl").read_text())
    assert runs.losses(f"{engine}-again").keys() == set(range(runs.half + 1, runs.steps + 1))
    assert_same_end(whole, unbroken, runs.steps, kinds=("step",))


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


@of_engines
def test_who_shares_writes_shares(engine, runs):
    made_by(engine)
    folder = runs.folder / engine / f"checkpoint-{runs.steps}"
    assert is_shared(folder) == (engine != "ddp")
    assert (folder / "transformer" / "config.json").is_file()
    assert (folder / "optimizer.pt").is_file() == (engine == "ddp")
    saved = runs.rows(engine, "save")[-1]
    assert saved["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert saved["seconds"] > 0
