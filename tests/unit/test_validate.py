import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Crop, Draw, Shape
from reeltune.data.shapes import SizeRules
from reeltune.diffusion.loss import gaussian, settle
from reeltune.families.toy.family import FAMILY
from reeltune.sampling.paired import band95
from reeltune.sampling.sample import Setup, at_rest
from reeltune.sampling.validate import HeldOut

RULES = SizeRules(video_sample_n_frames=9, video_sample_stride=1, video_sample_size=64, geometry=FAMILY.geometry)
SHAPES = [Shape(9, 32, 48), Shape(5, 32, 32), Shape(1, 48, 32)]


def read(draw: Draw) -> Batch:
    """A clip that depends on its record alone."""
    generator = torch.Generator().manual_seed(draw.record)
    size = (1, draw.shape.frames, 3, draw.shape.height, draw.shape.width)
    return Batch(
        draws=[draw],
        text=[f"clip {draw.record}"],
        pixels_BFCHW=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        ref_frame_B=torch.zeros(1, dtype=torch.int64),
        keep={},
        control_BFCHW=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
    )


@pytest.fixture
def setup():
    return Setup(FAMILY, "control", FAMILY.load("toy"), FAMILY.objective)


def held_out(setup, tmp_path, shapes=SHAPES, levels=4):
    draws = [
        Draw(i, shape, Crop(shape.height, shape.width, 0, 0), tuple(range(shape.frames)), 0, seed=100 + i)
        for i, shape in enumerate(shapes)
    ]
    return HeldOut(setup, draws, [f"{i}.mp4" for i in range(len(draws))], read, levels, tmp_path)


def nudge(net, amount=0.02):
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(amount)


def test_row_pairs_every_clip_with_the_starting_weights(setup, tmp_path):
    held, net = held_out(setup, tmp_path), setup.parts.net
    first = held.measure(net, 0)
    assert first["difference"] == 0 and first["band95"] == [0, 0] and first["loss"] == first["loss_start"]
    assert [first[k] for k in ("kind", "step", "start_step", "n")] == ["validation", 0, 0, 3]
    assert len(first["per_band"]) == 4
    middles = [setup.objective.levels[i].item() for i in (125, 375, 625, 875)]
    assert [band["level"] for band in first["per_band"]] == middles
    nudge(net)
    later = held.measure(net, 7)
    start, now = np.array(json.loads((tmp_path / "validation/start.json").read_text())["losses"]), held.losses(net)
    assert start.shape == (3, 4) and not np.allclose(start, now)
    assert later["loss_start"] == first["loss"] and later["loss"] == pytest.approx(now.mean(), rel=1e-12)
    assert later["difference"] == pytest.approx(later["loss"] - later["loss_start"], rel=1e-9)
    assert later["band95"] == band95((now - start).mean(1))
    assert later["per_clip"] == now.mean(1).tolist() and first["per_clip"] == start.mean(1).tolist()
    assert [band["loss"] for band in later["per_band"]] == pytest.approx(now.mean(0), rel=1e-12)
    json.dumps(later)


def test_losses_are_those_of_the_formula(setup, tmp_path):
    """One clip at one level, by hand."""
    held, parts = held_out(setup, tmp_path, SHAPES[:1], levels=1), setup.parts
    encoded = FAMILY.encode(parts, read(held.draws[0]).to("cpu"), "control")
    x0, cond = settle(encoded, [100], parts.null)
    noise, (level,) = gaussian(x0, [100], "noise", "0"), held.levels
    answer = parts.net((1 - level) * x0 + level * noise, torch.tensor([level * 1000]), cond["text"], cond["control"])
    assert held.measure(parts.net, 0)["loss"] == pytest.approx((answer - noise + x0).square().mean().item(), rel=1e-5)


def test_a_resumed_run_pairs_with_the_same_start(setup, tmp_path):
    net = setup.parts.net
    first = held_out(setup, tmp_path).measure(net, 0)
    nudge(net)
    again = held_out(setup, tmp_path).measure(net, 9)
    assert (again["start_step"], again["loss_start"]) == (0, first["loss"])
    anew = held_out(setup, tmp_path).measure(net, 0)  # a run that starts anew in the same folder
    assert anew["loss_start"] == again["loss"]
    (tmp_path / "validation/start.json").unlink()
    assert held_out(setup, tmp_path).measure(net, 12)["start_step"] == 12


def test_another_held_out_set_is_not_compared(setup, tmp_path):
    net = setup.parts.net
    held_out(setup, tmp_path).measure(net, 0)
    with pytest.raises(UserError, match="other held-out clips and levels than now"):
        held_out(setup, tmp_path, SHAPES[:2], levels=3).measure(net, 5)


def test_a_held_out_clip_that_was_replaced_under_its_name_is_not_compared(setup, tmp_path):
    net, before = setup.parts.net, replace(held_out(setup, tmp_path), contents=[1, 2, 3], controls=[4, 5, 6])
    before.measure(net, 0)
    for name, now in (("contents", [1, 2, 4]), ("controls", [4, 5, 5])):
        with pytest.raises(UserError, match=f"other held-out {name} than now"):
            replace(before, **{name: now}).measure(net, 5)
    path = tmp_path / "validation/start.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in kept.items() if name[:3] != "con"}))
    assert before.measure(net, 5)["start_step"] == 0, "as earlier versions have kept it"


def test_a_clip_is_measured_alike_whatever_the_others_are(setup, tmp_path):
    held = held_out(setup, tmp_path)
    alone = replace(held, draws=held.draws[1:2], names=held.names[1:2])
    assert np.array_equal(alone.losses(setup.parts.net)[0], held.losses(setup.parts.net)[1])


def test_training_does_not_notice(setup, tmp_path):
    net = setup.parts.net
    net.blocks[0].eval()  # not all in one mode
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), [m.training for m in net.modules()]
    held_out(setup, tmp_path).measure(net, 0)
    assert torch.equal(before[0], torch.random.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == [m.training for m in net.modules()] and len(set(before[2])) == 2
    assert all(weight.grad is None and weight.requires_grad for weight in net.parameters())
    with pytest.raises(ZeroDivisionError), at_rest(net):
        assert not any(m.training for m in net.modules()) and not torch.is_grad_enabled()
        _ = 1 / 0
    assert before[2] == [m.training for m in net.modules()] and torch.is_grad_enabled()


def test_network_runs_under_the_autocast_it_is_given(setup, tmp_path):
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    net = setup.parts.net
    plain = held_out(setup, tmp_path).losses(net)
    rough = held_out(replace(setup, autocast=autocast), tmp_path).losses(net)
    assert not np.array_equal(plain, rough) and np.allclose(plain, rough, rtol=0.05)


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (4, 2.7764), (10, 2.2281), (11, 2.2010), (30, 2.0423), (120, 1.9799)]
)
def test_band_is_students(freedom, t):
    values = np.random.RandomState(freedom).normal(3, 2, freedom + 1)
    low, high = band95(values)
    assert (low + high) / 2 == pytest.approx(values.mean())
    half = t * values.std(ddof=1) / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=2e-4)


def test_band_of_one_clip_is_unknown():
    assert band95(np.array([0.5])) is None
