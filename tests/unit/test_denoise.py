import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from reeltune.diffusion.denoise import sample, sampler, schedule
from reeltune.diffusion.loss import gaussian
from reeltune.diffusion.objective import Ddpm, Flow, Sigma, column
from reeltune.families.toy.family import FAMILY, embed

FLOW = Flow(shift=3.0)
SCHEDULERS = {
    "euler": lambda: sampler(FLOW),
    "unipc": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW.shift
    ),
    "dpm++": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW.shift
    ),
}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_a_network_that_knows_the_picture_gives_it_back(name, steps):
    x0 = randn(2, 3, 2, 4, 4)

    def oracle(net, x, timestep_B, cond):
        level = column(timestep_B / FLOW.steps, x)
        noise = (x - (1 - level) * x0) / level
        return FLOW.target(x0, noise, timestep_B / FLOW.steps)

    before = torch.random.get_rng_state()
    got = sample(oracle, None, FLOW, {}, {}, x0.shape, scheduler=SCHEDULERS[name](), seeds=[1, 2], steps=steps)
    torch.testing.assert_close(got, x0, rtol=0, atol=2e-5)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("objective", [Ddpm("epsilon"), Ddpm("v_prediction", rescale_betas_zero_snr=True), Sigma(250)])
def test_so_it_is_with_betas(objective, steps):
    x0 = randn(2, 3, 2, 4, 4)

    def oracle(net, x, timestep_B, cond):
        index_B = objective.kept.tolist().index(timestep_B[0]) if isinstance(objective, Sigma) else timestep_B
        level_B = torch.as_tensor(index_B).expand(2) / objective.steps
        kept, noise = (
            objective.at(objective.signal**0.5, level_B, x),
            objective.at((1 - objective.signal) ** 0.5, level_B, x),
        )
        answer = objective.target(x0, (x - kept * x0) / noise, level_B)
        return torch.cat([answer, torch.full_like(answer, torch.nan)], 1) if isinstance(objective, Sigma) else answer

    got = sample(oracle, None, objective, {}, {}, x0.shape, scheduler=sampler(objective), seeds=[1, 2], steps=steps)
    torch.testing.assert_close(got, x0, rtol=0, atol=1e-3)
    first = schedule(sampler(objective), objective, steps, torch.device("cpu"))[0]
    assert first == objective.quantile(0.0)  # where training's noise ends


def test_levels_are_evenly_spaced_then_shifted_once():
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    expected = 3 * even / (1 + 2 * even)
    for name in ("euler", "unipc"):
        levels = schedule(SCHEDULERS[name](), FLOW, 4, torch.device("cpu"))
        torch.testing.assert_close(torch.tensor(levels), expected, rtol=0, atol=2e-6)
    levels = schedule(SCHEDULERS["dpm++"](), FLOW, 4, torch.device("cpu"))
    torch.testing.assert_close(torch.tensor(levels), expected, rtol=0, atol=1e-3)


def test_guidance_blanks_the_text_alone():
    shape, text, null = (2, 3, 1, 4, 4), embed(["a dog", "a cat"]), embed([""])[0]
    control, seen = randn(*shape), []

    def answer(net, x, timestep_B, cond):
        assert torch.equal(cond["control"], control)
        seen.append(cond["text"])
        blind = torch.equal(cond["text"], null.expand(2, -1))
        return torch.full_like(x, 1.0 if blind else 3.0)

    cond = {"text": text, "control": control}
    got = sample(
        answer, None, FLOW, cond, {"text": null}, shape, scheduler=sampler(FLOW), seeds=[5, 6], steps=3, guidance=6.0
    )
    noise = gaussian(torch.empty(shape), [5, 6], "noise")
    torch.testing.assert_close(got, noise - (1 + 6 * (3 - 1)))  # a constant velocity, from level 1 to 0
    assert len(seen) == 6
    seen.clear()
    sample(
        answer, None, FLOW, cond, {"text": null}, shape, scheduler=sampler(FLOW), seeds=[5, 6], steps=3, guidance=1.0
    )
    assert len(seen) == 3 and all(torch.equal(t, text) for t in seen)


def test_a_clip_depends_on_its_own_seed_and_not_on_its_neighbours():
    parts = FAMILY.load("toy")
    cond = {"text": embed(["a dog", "a cat"]), "control": randn(2, 3, 2, 4, 4)}

    def clip(rows: slice, seeds: list[int]) -> torch.Tensor:
        chosen = {name: value[rows] for name, value in cond.items()}
        return sample(
            FAMILY.denoise,
            parts.net,
            FLOW,
            chosen,
            parts.null,
            chosen["control"].shape,
            scheduler=sampler(FLOW),
            seeds=seeds,
            steps=4,
            guidance=2.0,
        )

    both = clip(slice(0, 2), [7, 8])
    torch.testing.assert_close(both[1:], clip(slice(1, 2), [8]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(both[1:], clip(slice(1, 2), [9]), atol=1e-2)
    assert not both.requires_grad
