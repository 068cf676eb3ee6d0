"""Runs that train adapters: exact resume, the base left as it was, and one run's adapter as another's beginning."""

import json
import signal

import pytest
import torch

from reeltune import families
from reeltune.adapters import saved
from reeltune.config.parse import build, read
from reeltune.core.errors import UserError
from reeltune.reporting.metrics import read_metrics
from reeltune.training.learner import Learner
from reeltune.training.loop import train
from tests.runs.same_run import StopAfter, assert_same_end, rows
from tests.runs.small_run import recipe

BASE = {"rank": 4, "target_name": ["text"], "train_mode": None, "held_out_share": 0.2}
KINDS = {
    "plain": {},
    "scaled": {"network_alpha": 2.0, "use_rslora": True, "lora_init": "gaussian", "lora_plus_ratio": 16.0},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.5, "gradient_checkpointing": True},
    "whole": {"train_whole": ["patch_embedding", "head.bias"], "use_ema": True},
    "bf16": {"trained_weights": "bf16_stochastic", "mixed_precision": "bf16", "train_whole": ["head"]},
    "in_backward": {"step_in_backward": True},
    "pissa": {
        "lora_init": "pissa",
        "use_ema": True,
        "rank_pattern": ["blocks.1=2"],
        "alpha_pattern": ["blocks.0=3"],
        "train_whole": ["head.bias"],
    },
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.json").write_text("{}")
    return folder


QUICK = ("plain", "dora")


@pytest.fixture(scope="module")
def whole(toy, data, tmp_path_factory):
    """kind -> the folder of a run that nothing disturbed."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "run"
            assert train(recipe(toy, data, made[kind], **BASE, **KINDS[kind])) == 0
        return made[kind]

    return get


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_stopped_run_ends_in_the_same_bits(kind, toy, data, whole, tmp_path):
    where, settings = (toy, data, tmp_path / "run"), BASE | KINDS[kind]
    with StopAfter(3):
        assert train(recipe(*where, **settings)) == 128 + signal.SIGTERM
    assert train(recipe(*where, resume_from_checkpoint="latest", **settings)) == 0
    assert_same_end(tmp_path / "run", whole(kind))
    for name in ("adapter", "adapter_ema"):
        there = (tmp_path / "run/checkpoint-6" / name / saved.FILE).is_file()
        assert there == (name == "adapter" or "use_ema" in settings)


def test_dropout_and_rate_of_b_change_a_run(whole):
    losses = {kind: [row["loss"] for row in rows(whole(kind), ("step",))] for kind in ("plain", "dropout", "scaled")}
    assert losses["plain"][0] == losses["dropout"][0]  # B is zero
    assert losses["plain"][1:] != losses["dropout"][1:]
    assert losses["plain"][1:] != losses["scaled"][1:]


@pytest.mark.slow
def test_the_rate_that_prodigy_finds_is_in_the_metrics(toy, data, whole, tmp_path):
    steps = {"max_train_steps": 64, "checkpointing_steps": 32}
    settings = BASE | steps | {"use_prodigy": True, "learning_rate": 1.0, "held_out_share": 0.0}
    assert train(recipe(toy, data, tmp_path / "run", **settings)) == 0
    found = read_metrics(tmp_path / "run/metrics.jsonl").steps["d"]
    assert 1e-6 == found[0] < found[-1] and found == sorted(found)  # it begins with 1e-6 and grows
    for step in (32, 64):
        state = torch.load(tmp_path / f"run/checkpoint-{step}/optimizer.pt", weights_only=True)
        assert state["optimizer"]["param_groups"][0]["d"] == found[step - 1]
    assert "d" not in read_metrics(whole("plain") / "metrics.jsonl").steps


@pytest.mark.parametrize("kind", ["plain", "whole", "pissa"])
def test_the_base_is_left_as_it_was(kind, toy, data, monkeypatch, tmp_path):
    """In memory after training: what does not learn has the bits that the checkpoint gave it."""
    ends = {}

    def step(learner, *given, real=Learner.step):
        ends["net"], ends["names"] = learner.plain, learner.names
        return real(learner, *given)

    monkeypatch.setattr(Learner, "step", step)
    assert train(recipe(toy, data, tmp_path / "run", **BASE, **KINDS[kind])) == 0
    family = families.find(toy)
    start = family.to_released(family.load(toy).net.state_dict(), {})
    trained = {ends["names"][name]: weight for name, weight in ends["net"].named_parameters()}
    moved = {name for name, weight in start.items() if not torch.equal(trained[name], weight)}
    assert moved == {name for name in start if any(part in name for part in KINDS[kind].get("train_whole", ()))}


def test_a_checkpoint_says_what_its_adapter_is(toy, whole):
    folder = whole("scaled") / "checkpoint-6"
    assert not (folder / "transformer").exists()
    adapter = saved.load(folder / "adapter")
    assert adapter.layers.keys() == {"blocks.0.text", "blocks.1.text"}
    assert {layer.scale for layer in adapter.layers.values()} == {2.0 / 4**0.5}
    assert adapter.about["rank"] == 4 and adapter.about["base_model"] == str(toy)
    run = json.loads((whole("scaled") / "run.json").read_text())
    assert run["trainable"] == 2 * 2 * 4 * 16


@pytest.mark.parametrize("alpha", [4, 16])
def test_a_run_begins_with_another_runs_adapter(alpha, toy, data, whole, tmp_path):
    out = tmp_path / "run"
    settings = {"adapter_path": str(whole("plain") / "checkpoint-6"), "network_alpha": alpha, "max_train_steps": 1}
    assert train(recipe(toy, data, out, **BASE, **settings)) == 0
    begun, ended = (rows(folder, ("validation",)) for folder in (out, whole("plain")))
    assert begun[0]["loss"] == pytest.approx(ended[-1]["loss"], rel=1e-6)
    assert begun[0]["loss"] != ended[0]["loss"]


@pytest.mark.slow
def test_it_may_begin_on_a_base_of_4_bits(adapter_run, data, tmp_path):
    """Whose weights have the shapes of files no more."""
    again = read(adapter_run / "recipe.yaml")
    own = {"output_dir": str(tmp_path), "adapter_path": str(adapter_run / "checkpoint-4"), "base_weights": "nf4"}
    assert train(build(again | own | {"max_train_steps": "1", "validation_prompts": [], "validation_paths": []})) == 0
    before, after = (
        saved.load(folder / "adapter") for folder in (adapter_run / "checkpoint-4", tmp_path / "checkpoint-1")
    )
    assert before.layers.keys() == after.layers.keys()
    assert all((after.layers[name].B_OR - pair.B_OR).abs().max() < 0.1 for name, pair in before.layers.items())
    assert max(float(pair.B_OR.abs().max()) for pair in before.layers.values()) > 0.15


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("plain", {"rank": 8}, r"blocks.0.text \(and 1 more\) has rank 4 in it and 8 in the recipe"),
        ("plain", {"target_name": ["time"], "rank": 1}, "it changes blocks.0.text, which gets no adapter"),
        ("plain", {"use_dora": True}, r"blocks.0.text .*has no magnitudes in it; set use_dora to false"),
        ("dora", {}, "set use_dora to true"),
        ("whole", {}, "it changes all of patch_embedding.bias, which does not learn; name it in train_whole"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(kind, changes, said, toy, data, whole, tmp_path):
    settings = BASE | {"adapter_path": str(whole(kind) / "checkpoint-6")} | changes
    with pytest.raises(UserError, match=said):
        train(recipe(toy, data, tmp_path / "run", **settings))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0, "target_name": []}, "keeps adapters, and rank is 0; restore rank"),
        ({"network_alpha": 8}, "blocks.0.text had alpha 4.0 and has 8.0"),
        ({"target_name": ["blocks.0.text"]}, "blocks.1.text had alpha 4.0 and has none"),
        ({"lora_init": "pissa"}, "lora_init was uniform and is pissa"),
    ],
)
def test_a_resume_with_other_adapters_is_refused(changes, said, toy, data, whole, tmp_path):
    settings = BASE | {"resume_from_checkpoint": str(whole("plain") / "checkpoint-4")} | changes
    with pytest.raises(UserError, match=said):
        train(recipe(toy, data, tmp_path / "run", **settings))


def test_adapters_do_not_go_on_from_a_whole_networks_run(toy, data, tmp_path):
    full = {"train_mode": None, "max_train_steps": 1}
    assert train(recipe(toy, data, tmp_path / "full", **full)) == 0
    there = str(tmp_path / "full/checkpoint-1")
    with pytest.raises(UserError, match="keeps the whole network, and rank asks for adapters"):
        train(recipe(toy, data, tmp_path / "run", **BASE, resume_from_checkpoint=there))
