import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from safetensors import safe_open

from reeltune.diffusion.objective import Flow

SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("objective", [Flow(), Flow(shift=1.0), Flow(shift=3.0, steps=50)])
def test_round_trip_gives_the_picture_back(objective):
    x0, noise = torch.randn(2, 7, 3, 2, 4, 4, dtype=torch.float64, generator=generator())
    level_B = torch.tensor([objective.quantile(u / 7) for u in range(7)])
    answer = objective.target(x0, noise, level_B)
    x = objective.corrupt(x0, noise, level_B)
    torch.testing.assert_close(objective.to_x0(x, answer, level_B), x0, rtol=0, atol=1e-12)
    assert not torch.allclose(x, x0, atol=0.01)


@pytest.mark.golden
def test_schedule_equals_the_released_one_bit_for_bit(goldens):
    with safe_open(goldens / "wan_fun/golden/scheduler.safetensors", "pt") as file:
        meta, sigmas, timesteps = file.metadata(), file.get_tensor("sigmas"), file.get_tensor("timesteps")
    shift = 1.0 if meta["use_dynamic_shifting"] == "True" else float(meta["shift"])
    objective = Flow(shift=shift, steps=int(meta["num_train_timesteps"]))
    assert torch.equal(objective.levels, sigmas)
    assert torch.equal(objective.timestep(sigmas), timesteps)
    last = objective.steps - 1
    assert objective.quantile(last / objective.steps) == sigmas[last].item() and objective.quantile(0.0) == sigmas[0]


def index_of(objective: Flow, level: float) -> int:
    (index,) = (objective.levels == level).nonzero().flatten().tolist()
    return index


@pytest.mark.golden
def test_strata_cover_the_ranges_of_the_reference(goldens):
    """One stratum per group of ranks; its ends are the first and last index of the reference's range."""
    cases = json.loads((goldens / "data/discrete_sampling.json").read_text())
    checked = 0
    for case in cases:
        if not case["uniform_sampling"] or case["start_num_idx"]:
            continue
        ranges = sorted({tuple(r) for r in case["support_per_rank_inclusive"]})
        objective = Flow(steps=case["num_idx"], uniform_sampling=True)
        for i, (first, last) in enumerate(ranges):
            stratum = (i, len(ranges))
            drawn = {index_of(objective, objective.draw(generator(seed), stratum)) for seed in range(400)}
            assert first <= min(drawn) and max(drawn) <= last
            assert len(drawn) > min(last - first, 300) * 0.5
            checked += 1
    assert checked


class Fixed:
    """Stands in for torch.rand: the ends of [0, 1)."""

    def __init__(self, value: float):
        self.value = value

    def __call__(self, size, generator=None):
        return torch.full(size if isinstance(size, tuple) else (size,), self.value)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 125, 1000])
def test_strata_meet_without_gap_or_overlap(monkeypatch, n):
    objective = Flow(uniform_sampling=True)
    width = 1000 // n
    for i in range(n):
        for value, index in ((0.0, i * width), (1 - 2**-24, (i + 1) * width - 1)):
            monkeypatch.setattr(torch, "rand", Fixed(value))
            assert index_of(objective, objective.draw(generator(), (i, n))) == index


@pytest.mark.parametrize("scheme", SCHEMES)
def test_density_and_weight_are_those_of_stable_diffusion_3(scheme):
    objective = replace(Flow(shift=3.0), weighting_scheme=scheme, logit_mean=0.3, logit_std=0.7, mode_scale=0.81)
    for seed in range(200):
        u = compute_density_for_timestep_sampling(scheme, 1, 0.3, 0.7, 0.81, generator=generator(seed))
        expected = objective.levels[(u * 1000).long()].item()
        assert objective.draw(generator(seed), (3, 8)) == expected
    torch.testing.assert_close(
        objective.weight(objective.levels), compute_loss_weighting_for_sd3(scheme, objective.levels), rtol=1e-6, atol=0
    )


def test_density_stays_on_the_schedule(monkeypatch):
    monkeypatch.setattr(torch, "rand", Fixed(0.0))  # mode maps 0 to 1, one past the last index
    assert Flow(weighting_scheme="mode").draw(generator(), (0, 1)) == Flow().levels[-1].item()


def test_uniform_draws_are_uniform():
    objective = Flow(steps=4, uniform_sampling=True)
    counts = Counter(objective.draw(generator(seed), (0, 1)) for seed in range(4000))
    assert len(counts) == 4
    chi2 = sum((n - 1000) ** 2 / 1000 for n in counts.values())
    assert chi2 < 16.3  # p = 0.001 at 3 degrees of freedom


def test_level_is_a_function_of_the_generator_alone():
    objective = Flow(weighting_scheme="logit_normal")
    before = torch.random.get_rng_state()
    assert objective.draw(generator(5), (0, 1)) == objective.draw(generator(5), (1, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert math.isclose(objective.quantile(0.5), 5 * 0.5 / (1 + 4 * 0.5), rel_tol=1e-6)
