import math
from itertools import product

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from reeltune.core.errors import UserError
from reeltune.optim.optimizers import (
    MovingAverage,
    StochasticRounding,
    average_decay,
    build_optimizer,
    clip_ceiling,
    rate_curve,
    restore,
    set_rate,
    soften_outliers,
)
from reeltune.optim.rounding import lifted, round_by_chance

ADAM = {"learning_rate": 1e-2, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.0}


def train(parameters, optimizer, steps, first=0):
    """Gradients depend on the step alone, so that runs can be compared."""
    for step in range(first, first + steps):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("low", [1.0, -1.0, 2.0**-100, 1.9921875, -3.0 * 2**90])
@pytest.mark.parametrize("part", [1 / 65536, 0.01, 0.25, 0.5, 0.9])
def test_rounding_is_unbiased(low, part):
    """The next bf16 away from zero is taken with the probability that is the part of the way to it."""
    count, bits = 400_000, torch.tensor(low).view(torch.int32)
    high = (bits + 2**16).view(torch.float32).item()
    x = (bits + round(part * 2**16)).view(torch.float32)
    part = round(part * 2**16) / 2**16
    assert low + (high - low) * part == pytest.approx(x.item(), rel=1e-6)
    rounded = x.repeat(count)
    round_by_chance(rounded, [rounded], [0])
    up = (rounded == high).double().mean().item()
    assert up + (rounded == low).double().mean().item() == 1
    assert abs(up - part) < 5 * math.sqrt(part * (1 - part) / count)


def test_rounding_is_exact_on_what_bf16_can_hold():
    exact = torch.tensor([0.0, -1.5, 3e38, -(2.0**-100)]).bfloat16().float()
    rounded = exact.clone()
    round_by_chance(rounded, [rounded], [1])
    assert torch.equal(rounded, exact)


def test_a_tensor_is_rounded_by_its_own_seed_wherever_it_lies():
    """Of many in one piece each is what it is alone: noise of its own generator, added to its bits, which are cut."""
    shapes = [(5, 7), (3,), (), (2, 16)]
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    piece_N, parts = lifted([tensor.bfloat16() for tensor in tensors])
    assert [part.data_ptr() % 64 for part in parts] == [0] * 4
    torch._foreach_copy_(parts, tensors)
    round_by_chance(piece_N, parts, [10, 11, 12, 13])
    for seed, part, tensor in zip((10, 11, 12, 13), parts, tensors, strict=True):
        noise = torch.randint(0, 2**16, tensor.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
        alone = ((tensor.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
        assert torch.equal(part, alone)
        assert torch.equal(part, alone.bfloat16().float())


def test_small_updates_survive_in_bf16_on_average():
    parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    build = lambda groups: torch.optim.SGD(groups, lr=1.0)  # noqa: E731
    optimizer = StochasticRounding([{"params": [parameter], "rate": 1.0}], build, seed=3)
    for _ in range(64):
        parameter.grad = torch.full_like(parameter, -1e-4)
        optimizer.step()
    mean = parameter.float().mean().item()
    assert abs(mean - 1.0064) < 5e-4  # plain rounding would leave it at 1


@pytest.mark.parametrize("came", [False, True])
@pytest.mark.parametrize("chunk", [1, 100])
def test_lifting_in_parts_is_the_same_as_lifting_all(chunk, came, monkeypatch):
    def run(size):
        monkeypatch.setattr(StochasticRounding, "CHUNK", size)
        parameters = [
            nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n)).bfloat16()) for n in (7, 90, 30)
        ]
        optimizer = StochasticRounding(
            [{"params": parameters, "rate": 1.0}], lambda groups: build_optimizer(groups, **ADAM, use_came=came), seed=1
        )
        train(parameters, optimizer, 5)
        return parameters, optimizer.param_groups[0].get("step")

    (parts, count), (whole, steps) = run(chunk), run(2**26)
    assert all(torch.equal(*pair) for pair in zip(parts, whole, strict=True))
    assert count == steps == (5 if came else None)


KINDS = {
    "adamw": {},
    "came": {"use_came": True},
    "adafactor": {"use_adafactor": True},
    "adamw8bit": {"use_8bit_adam": True},
    "muon": {"use_muon": True},
    "prodigy": {"use_prodigy": True, "learning_rate": 1.0},
}


@pytest.mark.parametrize("kind, rounding", [*product(KINDS, [False]), *product(list(KINDS)[:-1], [True])])
def test_a_resumed_optimizer_goes_on_bit_for_bit(kind, rounding, tmp_path):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")

    def fresh():
        dtype = torch.bfloat16 if rounding else torch.float32
        parameters = [
            nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype))
            for shape in ((64, 96), (31,))
        ]
        groups = [{"params": parameters, "rate": 1.0}]

        def build(groups):
            return build_optimizer(groups, **ADAM | KINDS[kind])

        return parameters, StochasticRounding(groups, build, seed=9) if rounding else build(groups)

    straight, optimizer = fresh()
    train(straight, optimizer, 6)

    broken, optimizer = fresh()
    train(broken, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    weights = [p.detach().clone() for p in broken]

    resumed, optimizer = fresh()
    for p, w in zip(resumed, weights, strict=True):
        p.data.copy_(w)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(resumed, optimizer, 3, first=3)
    for ours, theirs in zip(resumed, straight, strict=True):
        assert torch.equal(ours, theirs)


def test_rate_is_a_function_of_the_step():
    rate = rate_curve("constant_with_warmup", warmup_steps=4, total_steps=10, num_cycles=1, power=1.0, step_rules=None)
    assert [rate(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = rate_curve("cosine", warmup_steps=0, total_steps=10, num_cycles=1, power=1.0, step_rules=None)
    assert cosine(5) == pytest.approx(0.5)
    piecewise = rate_curve(
        "piecewise_constant", warmup_steps=0, total_steps=10, num_cycles=1, power=1.0, step_rules="1:3,0.1"
    )
    assert [piecewise(2), piecewise(3)] == [1.0, 0.1]


def test_groups_keep_their_share_of_the_rate():
    full, low = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = build_optimizer([{"params": [full], "rate": 1.0}, {"params": [low], "rate": 0.5}], **ADAM)
    set_rate(optimizer, 3e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 1.5e-4]


def test_muon_takes_steps_of_the_size_of_adamw_s_along_a_gradient_made_orthogonal():
    matrix, other = nn.Parameter(torch.zeros(48, 16)), nn.Parameter(torch.zeros(7))
    optimizer = build_optimizer([{"params": [matrix, other], "rate": 1.0}], **ADAM, use_muon=True)
    matrix.grad, other.grad = torch.randn(48, 16, generator=torch.Generator().manual_seed(2)), torch.ones(7)
    u, _, vh = torch.linalg.svd(matrix.grad, full_matrices=False)
    optimizer.step()
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    assert torch.allclose(other, torch.full((7,), -1e-2))  # AdamW's first step is its rate
    assert -matrix.square().mean().sqrt().item() == pytest.approx(-0.2e-2, rel=0.3)
    # The iteration leaves singular values between 0.7 and 1.2: https://kellerjordan.github.io/posts/muon.
    size = torch.linalg.svdvals(matrix) / (1e-2 * 0.2 * math.sqrt(48))
    assert size.min() > 0.6 and size.max() < 1.3
    assert (matrix * -(u @ vh)).sum() / (matrix.norm() * math.sqrt(16)) > 0.97


def test_muon_keeps_the_order_of_parameters():
    """By which a checkpoint tells their state."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (3,), (4, 4), (4, 4), (2, 3, 4))]
    groups = [{"params": parameters[:3], "rate": 1.0}, {"params": parameters[3:], "rate": 0.5}]
    made = build_optimizer(groups, **ADAM, use_muon=True).param_groups
    assert [id(p) for group in made for p in group["params"]] == [id(p) for p in parameters]
    assert [group["use_muon"] for group in made] == [True, False, True, True, False]
    assert [group["lr"] for group in made] == [1e-2] * 3 + [5e-3] * 2


def test_prodigy_finds_a_rate_that_learns():
    """A quadratic, at scales a hundred apart."""
    for scale in (0.01, 1.0):
        weight = nn.Parameter(torch.full((16,), scale))
        build = {**ADAM, "learning_rate": 1.0}
        optimizer = build_optimizer([{"params": [weight], "rate": 1.0}], **build, use_prodigy=True)
        for _ in range(200):
            optimizer.zero_grad()
            (weight / scale).square().sum().backward()
            optimizer.step()
        assert (weight / scale).square().sum() < 0.16


def test_outliers_are_clipped_harder():
    parameter = nn.Parameter(torch.zeros(2))
    for norm, factor in ((4.0, 1.0), (8.0, 1 / 8), (300.0, 1 / 10)):
        parameter.grad = torch.ones(2)
        soften_outliers([parameter], torch.tensor(norm), max_norm=1.0)
        assert torch.allclose(parameter.grad, torch.full((2,), factor))
    assert [clip_ceiling(step, 0.1, 5, 100) for step in (0, 50, 100, 500)] == pytest.approx([0.5, 0.3, 0.1, 0.1])
    assert clip_ceiling(0, 0.1, 5, None) == 0.1


def test_moving_average():
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    start = net.weight.detach().clone()
    average = MovingAverage(net, decay=0.2)
    assert list(average.weights) == ["weight"]
    for step, expected in enumerate((4, 8 - 4 * 2 / 11, 12 - 0.2 * (4 + 4 * 2 / 11))):  # decays 0, 2/11, 0.2 (not 3/12)
        with torch.no_grad():
            net.weight += 4
        average.update(step)
        assert torch.allclose(average.weights["weight"], start + expected)


def test_moving_average_is_that_of_diffusers():
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    average, ema = MovingAverage(ours, decay=0.99), EMAModel(theirs.parameters(), decay=0.99)
    for step in range(1200):  # past the step, 890, from which the decay is the most
        with torch.no_grad():
            for net in (ours, theirs):
                net.weight += step
        average.update(step)
        ema.step(theirs.parameters())
    assert torch.allclose(average.weights["weight"], ema.shadow_params[0], rtol=1e-5)
    assert average_decay(889, 0.99) < 0.99 == average_decay(890, 0.99)


def test_nothing_of_the_start_is_in_the_moving_average():
    net = nn.Linear(2, 1)
    average = MovingAverage(net, decay=0.9999)
    net.weight.data.fill_(0.0)
    average.update(0)
    assert average.weights["weight"].count_nonzero() == 0


def test_missing_bitsandbytes_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"reeltune\[eight-bit\]"):
        build_optimizer([{"params": [nn.Parameter(torch.ones(1))], "rate": 1.0}], **ADAM, use_8bit_adam=True)


@pytest.mark.parametrize("kind", ["adamw", "use_came", "use_adafactor", "use_prodigy", "use_muon", "stochastic"])
def test_a_state_that_is_gone_on_with_has_the_settings_of_the_recipe(kind):
    def made(rate, **changes):
        weights = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
        switch = {kind: True} if kind.startswith("use_") else {}

        def build(groups):
            return build_optimizer(groups, **ADAM | changes, **switch)

        groups = [{"params": weights[:1], "rate": 1.0}, {"params": weights[1:], "rate": rate}]
        stochastic = kind == "stochastic"
        return weights, StochasticRounding(groups, build, seed=0) if stochastic else build(groups)

    weights, before = made(0.5)
    train(weights, before, 2)
    changes = {"betas": (0.5, 0.7), "epsilon": 1e-3, "weight_decay": 0.3}
    _, now = made(0.25, **changes)
    settings = [{name: group.get(name) for name in ("rate", "betas", "eps")} for group in now.param_groups]
    restore(now, before.state_dict())
    assert [{name: group.get(name) for name in ("rate", "betas", "eps")} for group in now.param_groups] == settings
    assert {group["weight_decay"] for group in now.param_groups} == {0.3}
    states = [one.state_dict() for one in (before, now)]
    states = [state["optimizer"] if kind == "stochastic" else state for state in states]
    assert repr(states[0]["state"]) == repr(states[1]["state"]) != "{}"
    assert [group.get("d") for group in before.param_groups] == [group.get("d") for group in now.param_groups]
