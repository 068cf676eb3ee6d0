"""Both networks of a model on every engine: the losses of one process, and what another engine began gone on with."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from reeltune.adapters import saved
from reeltune.cache.fill import fill
from reeltune.checkpoint.folder import is_shared, parts
from reeltune.checkpoint.state import Shared
from reeltune.export.main import export
from reeltune.families import weights
from reeltune.sampling.clips import sample_clips
from reeltune.training import loop
from tests.distributed.processes import forked, hasty, train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.same_run import assert_same_end
from tests.runs.small_run import data_set, recipe

STEPS, HALF = 6, 3
EVERY = ("ddp", "fsdp", "zero2", "zero3")
ENGINES = EVERY if importlib.util.find_spec("deepspeed") is not None else EVERY[:2]
of_engines = pytest.mark.parametrize("engine", ENGINES)
pytestmark = pytest.mark.slow
ADAPTER = {"rank": 4, "preview_count": 0}
HIGH = {"expert": "high", "max_train_steps": 2, "preview_count": 0}
SHARED = {"context_parallel": 2, "train_batch_size": 4}  # each clip by both processes
LOOKED_AT = {"held_out_share": 0.25, "preview_count": 1, "preview_steps": 2, "guidance_scale": 1.0}
BLIND = {"preview_count": 0}  # of runs that are others' once more, but for their previews


class Runs:
    """`alone` in one process; `engine`, `engine-from-other`, `engine-adapter`, `engine-high` and `fsdp-shared` in
    two."""

    def __init__(self, folder):
        self.folder = folder
        self.model = tiny_checkpoint(folder / "model", "2.2_a14b_t2v")
        self.data = data_set(folder / "data", clips=6, stills=0)

    def recipe(self, name, processes=2, **changes):
        engine = name.partition("-")[0]
        settings = {
            "expert": "both",
            "engine": None if engine == "alone" else engine,
            "train_mode": "normal",
            "fix_sample_size": (32, 64),
            "cache_folder": str(self.folder / "cache"),
            "cache_variants": 1,
            "train_batch_size": 4 // processes,
            "max_train_steps": STEPS,
            "checkpointing_steps": HALF,
            **LOOKED_AT,
        }
        return recipe(self.model, self.data, self.folder / name, **{**settings, **changes})

    def half_of(self, name):
        return str(self.folder / name / f"checkpoint-{HALF}")

    def rows(self, name, kind="step"):
        lines = map(json.loads, (self.folder / name / "metrics.jsonl").read_text().splitlines())
        return [row for row in lines if row["kind"] == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    torch.set_num_threads(1)
    made = Runs(tmp_path_factory.mktemp("both"))
    assert fill(made.recipe("alone")) == 0
    assert loop.train(made.recipe("alone", processes=1)) == 0
    assert loop.train(made.recipe("alone-adapter", processes=1, **ADAPTER)) == 0
    recipes = []
    for engine, other in zip(ENGINES, ["alone", *ENGINES], strict=False):
        recipes.append(made.recipe(engine))
        recipes.append(made.recipe(f"{engine}-from-{other}", resume_from_checkpoint=made.half_of(other), **BLIND))
        recipes.append(made.recipe(f"{engine}-adapter", **ADAPTER))
        recipes.append(made.recipe(f"{engine}-high", **HIGH))
    recipes.insert(0, made.recipe("fsdp-shared", **SHARED))
    train(recipes, 2, made.folder)
    last = made.half_of(ENGINES[-1])
    assert loop.train(made.recipe(f"alone-from-{ENGINES[-1]}", processes=1, resume_from_checkpoint=last, **BLIND)) == 0
    return made


@of_engines
@pytest.mark.parametrize("what", ["", "-adapter"])
def test_the_losses_are_those_of_one_process(what, engine, runs):
    ours, alone = runs.rows(f"{engine}{what}"), runs.rows(f"alone{what}")
    assert [row["expert"] for row in ours] == [row["expert"] for row in alone]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in alone], rel=1e-4)
    for row, one in zip(*(runs.rows(f"{name}{what}", "validation") for name in (engine, "alone")), strict=True):
        for band, other in zip(row["per_band"], one["per_band"], strict=True):
            assert band["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_each_clip_is_shared_in_both_experts_turns(runs):
    ours, alone = runs.rows("fsdp-shared"), runs.rows("alone")
    assert {row["expert"] for row in ours} == {"high", "low"}
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in ours] == pytest.approx([row[name] for row in alone], rel=1e-4)


@of_engines
def test_another_engine_goes_on_with_both(engine, runs):
    names = [path.name for path in runs.folder.glob(f"*-from-{engine}")]
    assert names
    for name in [*names, f"{engine}-from-{['alone', *ENGINES][ENGINES.index(engine)]}"]:
        ours, alone = runs.rows(name), runs.rows("alone")[HALF:]
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in alone], rel=1e-4)


@of_engines
def test_exported_and_sampled_it_is_what_was_trained(engine, runs, tmp_path):
    checkpoint, alone = (runs.folder / name / f"checkpoint-{STEPS}" for name in (engine, "alone"))
    assert is_shared(checkpoint) == (engine != "ddp")
    list(export(checkpoint, tmp_path / "out", dtype="fp32"))
    for part in parts(alone).values():
        ours, theirs = weights.read(tmp_path / "out" / part.name), weights.read(part)
        assert all(torch.allclose(ours[name], theirs[name], atol=2e-3) for name in theirs)
        assert ours.keys() == theirs.keys()
    asked = runs.recipe("alone", output_dir=str(tmp_path / "clips"), validation_prompts=("a cat.",))
    (clip,) = sample_clips(replace(asked, output=replace(asked.output, resume_from_checkpoint=str(checkpoint))))
    made = json.loads(clip.with_suffix(".json").read_text())
    assert made["other_expert"]["path"] == str(checkpoint / "low_noise_model")


@of_engines
def test_each_process_keeps_its_share_of_both_adapters(engine, runs):
    checkpoint = runs.folder / f"{engine}-adapter/checkpoint-{STEPS}"
    for name, part in parts(checkpoint).items():
        alone = saved.read(runs.folder / f"alone-adapter/checkpoint-{STEPS}" / part.name / "adapter")
        ours = dict(Shared(part).weights()) if engine != "ddp" else saved.read(part / "adapter")
        assert ours.keys() == alone.keys()
        assert saved.config_of(part / "adapter")["expert"] == name


@of_engines
def test_one_expert_is_trained_as_by_one_process(engine, runs):
    if not (runs.folder / "alone-high").is_dir():
        assert loop.train(runs.recipe("alone-high", processes=1, **HIGH)) == 0
    ours, alone = runs.rows(f"{engine}-high"), runs.rows("alone-high")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in alone], rel=1e-4)


def test_killed_it_ends_in_the_same_bits(runs):
    """Of engines that share, one; runs/test_resume.py has one process."""
    engine = "fsdp"
    name = f"{engine}-killed"
    recipes = [runs.recipe(name, checkpointing_steps=1, resume_from_checkpoint="latest", **BLIND)]
    run = forked(recipes, 2, runs.folder, hasty)
    run.until((runs.folder / name / "checkpoint-2").exists)
    run.kill()
    run.end()
    train(recipes, 2, runs.folder)
    assert_same_end(runs.folder / name, runs.folder / engine, STEPS, kinds=("step",))
