import json
import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from safetensors import safe_open

from reeltune.config.ranges import RANGES
from reeltune.core.types import Encoded
from reeltune.diffusion.loss import diffusion_loss, gaussian
from reeltune.diffusion.objective import Ddpm, Flow, Sigma
from reeltune.families.schedule import read

SCHEMES = ["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


OBJECTIVES = [
    Flow(),
    Flow(shift=1.0),
    Flow(shift=3.0, steps=50),
    Ddpm("epsilon", beta_schedule="linear"),
    Ddpm("epsilon", beta_start=1e-4, beta_end=0.02, steps=100),
    Ddpm("v_prediction", rescale_betas_zero_snr=True),
    Sigma(),
    Sigma(steps=250, snr_loss=True),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_round_trip_gives_the_picture_back(objective):
    x0, noise = torch.randn(2, 7, 3, 2, 4, 4, dtype=torch.float64, generator=generator())
    level_B = torch.tensor([objective.quantile(u / 7) for u in range(7)])
    answer = objective.target(x0, noise, level_B)
    x = objective.corrupt(x0, noise, level_B)
    bound = 1e-12 if isinstance(objective, Flow) else 1e-4  # signal is kept in float32, and Sigma's ends at 0.006
    torch.testing.assert_close(objective.to_x0(x, answer, level_B), x0, rtol=0, atol=bound)
    assert not torch.allclose(x, x0, atol=0.01)


@pytest.mark.golden("wan_fun/golden/scheduler.safetensors")
def test_schedule_equals_the_released_one_bit_for_bit(goldens):
    with safe_open(goldens / "wan_fun/golden/scheduler.safetensors", "pt") as file:
        meta, sigmas, timesteps = file.metadata(), file.get_tensor("sigmas"), file.get_tensor("timesteps")
    shift = 1.0 if meta["use_dynamic_shifting"] == "True" else float(meta["shift"])
    objective = Flow(shift=shift, steps=int(meta["num_train_timesteps"]))
    assert torch.equal(objective.levels, sigmas)
    assert torch.equal(objective.timestep(sigmas), timesteps)
    last = objective.steps - 1
    assert objective.quantile(last / objective.steps) == sigmas[last].item() and objective.quantile(0.0) == sigmas[0]


def ddpm_checkpoints(goldens):
    """(schedule folder, recorded tensors) of every case whose schedule is one of betas."""
    for recorded in sorted(goldens.glob("multi/golden/*/scheduler.safetensors")):
        with safe_open(recorded, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        named = re.search(r"from (?:the checkpoint folder )?(\S+?)[ ,]", (recorded.parent / "README.md").read_text())
        if "alphas_cumprod" in tensors:
            yield (recorded.parent / named.group(1)).resolve() / "scheduler", tensors


@pytest.mark.golden("multi/golden/*/scheduler.safetensors")
def test_signal_is_the_released_one(goldens):
    found = list(ddpm_checkpoints(goldens))
    for folder, recorded in found:
        objective = read(folder)
        assert torch.equal(objective.signal, DDPMScheduler.from_pretrained(folder).alphas_cumprod)
        worst = (objective.signal - recorded["alphas_cumprod"]).abs().max()  # roots differ between processors
        assert worst < 1e-6, folder
        assert torch.equal(objective.timestep(objective.levels), torch.arange(objective.steps - 1, -1, -1))
    assert found


def test_zero_snr_ends_in_nothing_but_noise():
    plain, shifted = Ddpm(), Ddpm(rescale_betas_zero_snr=True)
    assert plain.signal[-1] > 0.004 and shifted.signal[-1] == 0 and shifted.signal[0] == plain.signal[0]
    noise = torch.randn(1, 4, generator=generator())
    assert torch.equal(shifted.corrupt(torch.full((1, 4), 9.0), noise, shifted.levels[:1]), noise)


@pytest.mark.golden("multi/golden/easyanimate_sigma_loss/sigma_loss.safetensors")
def test_loss_with_learned_variance_is_the_original_one(goldens):
    with safe_open(goldens / "multi/golden/easyanimate_sigma_loss/sigma_loss.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    cases = sorted({name.split(".")[0] for name in tensors})
    for case in cases:
        said = {name.split(".")[1]: value for name, value in tensors.items() if name.startswith(case + ".")}
        objective = Sigma(steps=len(said["alphas_cumprod"]), snr_loss=case.endswith("snr"))
        assert torch.equal(objective.kept, said["timestep_map"])
        assert torch.equal(objective.signal.float(), said["alphas_cumprod"])
        x0, noise, level_B = said["x_start"], said["noise"], said["t"] / objective.steps
        assert torch.equal(objective.timestep(level_B), said["model_t"])
        torch.testing.assert_close(objective.corrupt(x0, noise, level_B), said["x_t"], rtol=0, atol=1e-6)
        answer = said["model_output"].requires_grad_()
        mse_B = objective.error(answer, x0, noise, level_B).square().flatten(1).mean(1)
        bound_B = objective.surcharge(answer, x0, noise, level_B)
        torch.testing.assert_close(mse_B, said["mse"], rtol=1e-5, atol=0)
        torch.testing.assert_close(bound_B, said["vb"], rtol=1e-5, atol=0)
        (mse_B + bound_B).mean().backward()
        torch.testing.assert_close((mse_B + bound_B).mean(), said["loss"], rtol=1e-5, atol=0)
        worst = (answer.grad - said["grad_model_output"]).norm() / said["grad_model_output"].norm()
        assert worst < 5e-5
    assert len(cases) > 1


def test_training_adds_the_bound_of_the_variance():
    x0 = torch.randn(2, 3, 2, 4, 4, generator=generator()).clamp(-1, 1)

    def answering(channels, objective):
        def zeros(net, x, timestep_B, cond):
            return torch.zeros(len(x), channels, *x.shape[2:])

        return diffusion_loss(zeros, None, objective, Encoded(x0, {}, {}), {}, [1, 2], [(0, 2), (1, 2)])

    objective = Sigma(uniform_sampling=True)
    learned, plain = answering(6, objective), answering(3, Ddpm("epsilon", uniform_sampling=True))
    assert learned.level_B[0] > 0.5 > learned.level_B[1] and torch.equal(learned.level_B, plain.level_B)
    noise = gaussian(x0, [1, 2], "noise")
    bound_B = objective.surcharge(torch.zeros(2, 6, *x0.shape[2:]), x0, noise, learned.level_B)
    assert (bound_B > 0).all()
    torch.testing.assert_close(learned.per_sample_B - plain.per_sample_B, bound_B)


def index_of(objective: Flow, level: float) -> int:
    (index,) = (objective.levels == level).nonzero().flatten().tolist()
    return index


@pytest.mark.golden("data/discrete_sampling.json")
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


@pytest.mark.parametrize("end", [0, 1])
def test_the_mode_density_has_no_more_than_its_range(end):
    """Within, levels fall from one end to the other as what is drawn rises; beyond, they turn back."""
    drawn = torch.linspace(0, 1, 10_001, dtype=torch.float64)

    def falls(scale: float) -> bool:
        mapped = Flow(weighting_scheme="mode", mode_scale=scale)._by_mode(drawn)
        return bool((mapped.diff() <= 1e-12).all()) and mapped.min() >= 0 and mapped.max() <= 1 + 1e-12

    least_and_most = RANGES["mode_scale"]
    assert falls(least_and_most[end])
    assert not falls(least_and_most[end] + (0.02 if end else -0.02))


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


# ---- the levels of two networks


PARTS = [  # shift, boundary, the index where the reference parts them (measured on it), and where sampling does
    (5.0, 0.9, 357, 358),  # the nearest timestep is 900.06: trained by the low expert there, sampled by the high one
    (12.0, 0.875, 632, 632),  # 874.8
]


@pytest.mark.parametrize(("shift", "boundary", "theirs", "ours"), PARTS)
def test_two_networks_have_all_levels_between_them_as_sampling_gives_them(shift, boundary, theirs, ours):
    whole = Flow(shift=shift)
    high, low = whole.parted(boundary)
    assert (*high.indices, *low.indices) == tuple(range(1000)) and low.first == ours
    timesteps = whole.timestep(whole.levels)
    assert int((timesteps - 1000 * boundary).abs().argmin()) == theirs
    assert all(
        (timesteps[list(part.indices)] >= 1000 * boundary).unique().tolist() == [part is high] for part in (high, low)
    )


@pytest.mark.parametrize("uniform_sampling", [True, False])
def test_levels_of_one_network_are_all_drawn_evenly_and_no_others(uniform_sampling):
    high, low = Flow(steps=40, uniform_sampling=uniform_sampling).parted(0.9)
    for part in (high, low):
        random, own = generator(), [part.levels[index].item() for index in part.indices]
        drawn = Counter(part.draw(random, (i % 4, 4)) for i in range(200 * len(own)))
        assert set(drawn) == set(own)
        assert max(abs(count - 200) for count in drawn.values()) < 5 * 200**0.5
    strata = [{low.draw(generator(seed), (i, 2)) for seed in range(200)} for i in range(2)]
    assert (min(strata[0]) >= max(strata[1])) == uniform_sampling


def test_a_density_of_the_whole_schedule_is_kept_within_a_range():
    """What it draws there: of each level as often, in proportion, as without the range."""
    whole = Flow(steps=20, weighting_scheme="logit_normal", logit_mean=0.5)
    low, random = whole.parted(0.9)[1], generator()
    all_of = Counter(whole.draw(random, (0, 1)) for _ in range(20_000))
    part = Counter(low.draw(random, (0, 1)) for _ in range(10_000))
    within = {level: count for level, count in all_of.items() if level < 0.9}
    assert part.keys() == within.keys()
    for level, count in part.items():
        expected = 10_000 * within[level] / sum(within.values())
        assert abs(count - expected) < 6 * (expected + 1) ** 0.5


def test_quantiles_of_a_range_are_its_own():
    low = Flow().parted(0.9)[1]
    assert low.quantile(0.0) == low.levels[358].item() and low.quantile(0.999999) == low.levels[999].item()
    assert low.quantile(0.5) == low.levels[358 + 321].item()


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"uniform_sampling": True}, 0.358),
        ({}, 0.358),
        ({"weighting_scheme": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8}, None),
        ({"weighting_scheme": "mode", "mode_scale": 0.8}, None),
    ],
)
def test_the_share_of_an_expert_is_that_of_the_levels(settings, share):
    """As a network for the whole schedule would draw them."""
    whole = Flow(shift=5.0, **settings)
    high, low = whole.parted(0.9)
    assert high.share + low.share == pytest.approx(1) and whole.share == 1
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([whole.draw(generator, (i % 4, 4)) for i in range(20_000)])
    drawn = float((levels * 1000 >= 900).float().mean())
    assert high.share == pytest.approx(drawn, abs=0.012)  # 3.5 deviations
    if share is not None:
        assert high.share == share
