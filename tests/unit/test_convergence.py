"""Weights in bf16, rounded by chance, learn what fp32 copies learn; rounded to the nearest they stand still."""

import statistics
from functools import cache

import pytest
import torch

from reeltune.diffusion.objective import Flow
from reeltune.families.toy.family import TEXT, ToyNet
from reeltune.optim import optimizers
from reeltune.optim.optimizers import StochasticRounding, build_optimizer

STEPS, SEEDS, RATE = 300, range(5), 1e-4
FEW = 2  # seeds of runs that differ by far
CLIPS = 8
OBJECTIVE = Flow(shift=3.0)


def plainly(piece_N, parts, seeds):
    piece_N.copy_(piece_N.bfloat16())


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def clips():
    """Eight smooth ones, and a text for each."""
    basis = torch.linspace(-1, 1, 8)
    smooth = normal((CLIPS, 3, 2, 1, 1), 1) * basis[:, None] + normal((CLIPS, 3, 2, 1, 1), 2) * basis
    return smooth, normal((CLIPS, TEXT), 3)


def given(rows, seed, levels):
    """(input of the network under bf16 autocast, what it should say) of some of the clips."""
    x0, text, noise = *(each[rows] for each in clips()), normal((len(rows), 3, 2, 8, 8), seed)
    x = OBJECTIVE.corrupt(x0, noise, levels)
    return (x, OBJECTIVE.timestep(levels), text, x0), noise - x0


def loss_of(net, rows, seed, levels):
    (x, timestep, text, control), target = given(rows, seed, levels)
    with torch.autocast("cpu", torch.bfloat16):
        answer = net(x, timestep, text, control)
    return (answer.float() - target).square().mean()


def held_out(net):
    """At eight levels, with noise that no run has seen."""
    with torch.no_grad():
        levels = torch.linspace(0.06, 0.94, CLIPS)
        return statistics.fmean(loss_of(net, list(range(CLIPS)), 10_000 + i, levels.roll(i)).item() for i in range(8))


def learned(kind, seed):
    """(held-out loss before, after) of a run whose batches and noise the seed decides."""
    torch.manual_seed(0)
    net = ToyNet()
    if kind != "fp32":
        net.bfloat16()
    before = held_out(net)

    def build(groups):
        return build_optimizer(groups, learning_rate=RATE, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0)

    groups = [{"params": list(net.parameters()), "rate": 1.0}]
    optimizer = build(groups) if kind == "fp32" else StochasticRounding(groups, build, seed)
    chance = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        rows = torch.randperm(CLIPS, generator=chance)[:4].tolist()
        loss_of(net, rows, 1000 * seed + step, torch.rand(4, generator=chance)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, held_out(net)


@pytest.mark.slow
def test_within_the_band_of_fp32_where_plain_rounding_stalls(monkeypatch):
    torch.set_num_threads(1)
    found = {kind: [learned(kind, seed) for seed in SEEDS] for kind in ("fp32", "bf16_stochastic")}
    monkeypatch.setattr(optimizers, "round_by_chance", plainly)
    found["bf16"] = [learned("bf16", seed) for seed in SEEDS[:FEW]]
    print(found)
    ends = {kind: [after for _, after in runs] for kind, runs in found.items()}
    gains = {kind: statistics.fmean(before - after for before, after in runs) for kind, runs in found.items()}
    assert gains["fp32"] > 0.1 * found["fp32"][0][0]  # there is something to learn
    band = 3 * statistics.stdev(ends["fp32"])
    assert band < 0.2 * gains["fp32"]  # and what a run ends with depends little on its chance
    assert abs(statistics.fmean(ends["bf16_stochastic"]) - statistics.fmean(ends["fp32"])) < band
    assert gains["bf16"] < 0.5 * gains["fp32"]
