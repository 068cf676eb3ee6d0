"""Runs whose adapters begin as the principal part of the weights: step 0 is the base's, and what is written fits it."""

import json
import signal

import pytest
import torch

from reeltune.adapters import saved
from reeltune.adapters.writing import DIALECTS
from reeltune.export.adapter import export_adapter, tell
from reeltune.export.merge import export_merged
from reeltune.families import weights
from reeltune.reporting.metrics import read_metrics
from reeltune.training.learner import Learner
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.same_run import StopAfter, assert_same_end, rows
from tests.runs.small_run import recipe

BASE = {
    "train_mode": "control",
    "rank": 2,
    "network_alpha": 6.0,
    "target_name": ["q", "ffn.0"],
    "learning_rate": 0.01,
    "lr_warmup_steps": 0,
    "held_out_share": 0.3,
    "fix_sample_size": (32, 32),
    "use_ema": True,
    "checkpointing_steps": 3,
}
KINDS = {
    "plain": {},
    "bf16": {"mixed_precision": "bf16"},
    "coarse": {"mixed_precision": "bf16", "base_weights": "int8", "gradient_checkpointing": True},
}
TRIED = [kind if kind == "bf16" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "control_v1.1")


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    """(kind, settings) -> the folder of such a run."""
    made = {}

    def get(kind, **settings):
        key = kind, json.dumps(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind) / "run"
            chosen = BASE | KINDS[kind] | {"lora_init": "pissa"} | settings
            assert train(recipe(model, data, made[key], **chosen)) == 0
        return made[key]

    return get


def first_losses(folder):
    found = read_metrics(folder / "metrics.jsonl")
    (held_out, *_) = rows(folder, ("validation",))
    return held_out["loss"], found.steps["loss"][0]


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "bf16"])
def test_step_0_is_the_bases_own_to_the_bit(kind, run):
    uniform = run(kind, lora_init="uniform", max_train_steps=1)  # whose B is zero
    assert first_losses(run(kind)) == first_losses(uniform)
    assert first_losses(run(kind))[0] != rows(run(kind), ("validation",))[-1]["loss"]


@pytest.mark.slow
def test_the_rest_of_a_coarse_base_is_nearer_than_the_whole(run):
    exact, _ = first_losses(run("bf16"))
    coarse, _ = first_losses(run("coarse", lora_init="uniform", max_train_steps=1))
    rest, _ = first_losses(run("coarse"))
    assert 0 < abs(rest - exact) < abs(coarse - exact)


@pytest.mark.parametrize("kind", TRIED)
def test_a_stopped_run_ends_in_the_same_bits(kind, model, data, run, tmp_path):
    settings = BASE | KINDS[kind] | {"lora_init": "pissa"}
    with StopAfter(4):
        assert train(recipe(model, data, tmp_path / "run", **settings)) == 128 + signal.SIGTERM
    assert train(recipe(model, data, tmp_path / "run", resume_from_checkpoint="latest", **settings)) == 0
    assert_same_end(tmp_path / "run", run(kind))


def test_training_leaves_the_base_its_bits(model, data, monkeypatch, tmp_path):
    ends = {}

    def step(learner, *given, real=Learner.step):
        ends["net"], ends["names"] = learner.plain, learner.names
        return real(learner, *given)

    monkeypatch.setattr(Learner, "step", step)
    assert train(recipe(model, data, tmp_path / "run", **BASE, lora_init="pissa", max_train_steps=2)) == 0
    trained = {ends["names"][name]: weight for name, weight in ends["net"].named_parameters()}
    assert all(torch.equal(trained[name], weight) for name, weight in weights.read(model).items())


@pytest.mark.parametrize("kind", TRIED)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("dtype", ["as_stored", "bf16"])
def test_every_dialect_applies_what_was_trained(kind, dialect, dtype, model, run, tmp_path):
    """export_adapter raises where a tool's rules give another ratio than 1."""
    checkpoint, out = run(kind) / "checkpoint-6", tmp_path / "out.safetensors"
    said, *told = export_adapter(checkpoint, out, dialect, dtype=dtype, ema=dtype == "bf16")
    assert "rank 4, alpha 12 (6 layers)" in said
    tools = DIALECTS[dialect].tools
    lines = [line for line in told if line.startswith(tools) and "applied / trained" in line]
    assert lines
    if dtype == "as_stored":
        assert all("1.000000 to 1.000000 in 6 layers" in line for line in lines)
    assert "rank 4" in " ".join(tell(out))


def test_merged_it_is_base_and_what_the_pair_gained(model, run, tmp_path):
    checkpoint = run("plain") / "checkpoint-6"
    list(export_merged(checkpoint, tmp_path / "out", dtype="fp32"))
    written, base, stored = weights.read(tmp_path / "out"), weights.read(model), saved.read(checkpoint / "adapter")
    moved = {name for name, weight in base.items() if not torch.equal(written[name], weight)}
    assert moved == {f"{name.removesuffix('.lora_A.start')}.weight" for name in stored if name.endswith("lora_A.start")}
    for name in moved:
        a, b, A0, B0 = (
            stored[f"{name.removesuffix('.weight')}.{part}"].double()
            for part in ("lora_A.weight", "lora_B.weight", "lora_A.start", "lora_B.start")
        )
        gained = 6 / 2 * ((B0 + b) @ (A0 + a) - B0 @ A0)
        assert gained.abs().max() > 1e-3
        assert (written[name].double() - base[name].double() - gained).abs().max() < 1e-6


def test_a_run_goes_on_from_its_file(model, data, run, tmp_path):
    """As an adapter of twice the rank."""
    file, out = tmp_path / "out.safetensors", tmp_path / "run"
    list(export_adapter(run("plain") / "checkpoint-6", file, "comfyui"))
    settings = BASE | {"rank": 4, "network_alpha": None, "adapter_path": str(file), "max_train_steps": 1}
    assert train(recipe(model, data, out, **settings)) == 0
    begun, ended = (rows(folder, ("validation",)) for folder in (out, run("plain")))
    assert begun[0]["loss"] == pytest.approx(ended[-1]["loss"], rel=1e-5)
    assert begun[0]["loss"] != ended[0]["loss"]
