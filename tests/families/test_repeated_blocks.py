"""A step on few blocks for many, against all of them."""

from functools import cache

import pytest
import torch

from reeltune import families
from reeltune.core.types import Shape
from reeltune.demo.main import FAMILIES as SHOWN
from reeltune.estimate import memory_tracker, repeated_blocks
from reeltune.estimate.estimator import Estimator
from reeltune.estimate.repeated_blocks import shorten
from reeltune.run.model import choose_family, load_parts
from tests.families.every_family import OWN, derive
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import recipe
from tests.runs.test_estimate import CAPTIONS, draws

DEPTH = 6  # of each kind of block
SAME = 1e-3  # a step in the backward pass gathers a small tensor for each weight, which are not counted for all blocks
LEAN = {"trained_weights": "bf16_stochastic", "use_adafactor": True, "step_in_backward": True}


SETTINGS = {
    "recomputed": {"gradient_checkpointing": True, "use_ema": True},
    "spread": {"gradient_checkpointing": "attention_kept", "gradient_checkpointing_share": 0.5},
    "products": {"gradient_checkpointing": "products_kept", "rank": 4},
    "elsewhere": {"offload_activations": True},
    "adapters": {"rank": 4, "base_weights": "int8", "blocks_to_swap": DEPTH + 1, "offload_activations": True},
    "dora": {"rank": 4, "use_dora": True},
    "in_backward": {"gradient_checkpointing": True, **LEAN},
}
CASES = [
    *(("wan_fun", setting) for setting in SETTINGS),
    *((name, "recomputed") for name in OWN),
]


def deep(name, place, layers=DEPTH):
    if name == "wan_fun":
        return tiny_checkpoint(place, "control_v1.1", layers=layers)
    (source := place / "source").mkdir()
    (folder := place / "deep").mkdir()
    changes = {"num_layers": DEPTH, "mmdit_layers": DEPTH, "num_single_layers": DEPTH}
    return derive(SHOWN[name].write(source), folder, changes=changes)


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    """(model, setting) -> (an Estimator, a recipe). Settings of a model share one: encoders and VAE run once."""
    estimators = {}

    @cache
    def model_of(name, layers):
        return deep(name, tmp_path_factory.mktemp("model"), layers)

    def made(name, setting):
        model, out = model_of(name, SETTINGS[setting].get("blocks_to_swap", DEPTH)), tmp_path_factory.mktemp("out")
        asked = {"train_mode": families.find(model).modes[0], "mixed_precision": "bf16", **SETTINGS[setting]}
        run = recipe(model, out, out, **asked)
        return estimators.setdefault(model, Estimator(run)), run

    return made


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting"), CASES)
def test_four_blocks_of_a_kind_stand_for_all(name, setting, estimated, monkeypatch):
    monkeypatch.setattr(
        memory_tracker, "ROUND_BYTES", 1
    )  # or small tensors, such as norms, would be large in so small a net
    estimator, run = estimated(name, setting)

    def step():
        return estimator.step(run, draws(Shape(5, 32, 48)), CAPTIONS, preview=setting != "in_backward")

    stands, shortened = [], repeated_blocks.shorten

    def looked_at(*args, **how):
        stands.extend(shortened(*args, **how))
        return stands

    monkeypatch.setattr(repeated_blocks, "shorten", looked_at)
    few = step()
    assert bool(stands) == (setting != "spread") and all(stand.times > 1 for stand in stands)
    for key in [key for key in estimator._known if key[0] == "step"]:  # which shortens a network
        del estimator._known[key]
    whole = []
    monkeypatch.setattr(repeated_blocks, "shorten", lambda net, *_, **__: whole.append(net) or [])
    all_ = step()
    assert len(whole) == 1
    assert few.flops == all_.flops
    assert few.saved_bytes == all_.saved_bytes
    assert (few.parameters, few.trainable, few.weight_bytes) == (all_.parameters, all_.trainable, all_.weight_bytes)
    assert (few.swapped_bytes, few.offloaded_bytes) == (all_.swapped_bytes, all_.offloaded_bytes)
    assert few.state_bytes == all_.state_bytes
    assert few.gradient_bytes == all_.gradient_bytes
    for phase, parts in all_.peaks.items():
        assert sum(few.peaks[phase].values()) == pytest.approx(sum(parts.values()), rel=SAME), phase
        for part in ("weights", "gradients", "optimizer", "average"):
            assert few.peaks[phase].get(part, 0) == pytest.approx(parts.get(part, 0), rel=SAME), (phase, part)


@pytest.mark.slow
def test_blocks_that_differ_are_left_and_keep_their_names(tmp_path):
    model = tiny_checkpoint(tmp_path, "control_v1.1", layers=9)
    net = load_parts(
        recipe(model, tmp_path, tmp_path), choose_family(recipe(model, tmp_path, tmp_path))[0], torch.device("cpu")
    ).net
    for weight in net.blocks[6].parameters():
        weight.requires_grad_(False)
    [stand] = shorten(net, ("WanTransformerBlock",))
    assert stand.times == 3
    assert [name for name, _ in net.blocks.named_children()] == ["0", "1", "4", "5", "6", "7", "8"]
    rest = {"trainable_modules": ["blocks.3."], "mixed_precision": "bf16"}
    run = recipe(model, tmp_path, tmp_path, **rest)
    found = Estimator(run).step(run, draws(Shape(5, 32, 32)), CAPTIONS, preview=False)
    assert found.trainable == sum(weight.numel() for weight in net.blocks[0].parameters())
