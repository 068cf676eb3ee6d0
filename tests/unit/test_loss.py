import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from reeltune.core.types import Encoded, Posterior
from reeltune.diffusion import loss as loss_module
from reeltune.diffusion.loss import blank, diffusion_loss, gaussian, settle
from reeltune.diffusion.objective import Flow, Objective
from reeltune.families.toy.family import FAMILY, embed

SEEDS = [11, 22, 33, 44]
STRATA = [(0, 1)] * 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def encoded(B: int = 4, T: int = 3, **keep: list[bool]) -> Encoded:
    shape = (B, 3, T, 4, 6)
    posterior = Posterior(randn(*shape, seed=1), randn(*shape, seed=2) - 2)
    control = Posterior(randn(*shape, seed=3), randn(*shape, seed=4) - 2)
    text = embed(["a dog", "a red cat", "the sea", "snow"])[:B]
    return Encoded(posterior, {"text": text, "control": control}, {k: torch.tensor(v) for k, v in keep.items()})


def part(whole: Encoded, rows: slice) -> Encoded:
    def cut(value):
        return Posterior(value.mean[rows], value.logvar[rows]) if isinstance(value, Posterior) else value[rows]

    return Encoded(
        cut(whole.x0),
        {name: cut(value) for name, value in whole.cond.items()},
        {name: keep_B[rows] for name, keep_B in whole.keep.items()},
        None if whole.loss_mask is None else whole.loss_mask[rows],
    )


def measure(net, enc, seeds, strata, null=None, objective=FAMILY.objective, **settings):
    return diffusion_loss(FAMILY.denoise, net, objective, enc, null or {}, seeds, strata, **settings)


@pytest.fixture
def net():
    return FAMILY.load("toy").net


def test_settle_draws_each_sample_from_its_own_seed():
    enc = encoded()
    x0, cond = settle(enc, SEEDS, {})
    for i, seed in enumerate(SEEDS):
        alone, alone_cond = settle(part(enc, slice(i, i + 1)), [seed], {})
        assert torch.equal(alone[0], x0[i]) and torch.equal(alone_cond["control"][0], cond["control"][i])
    eps = gaussian(x0, SEEDS, "posterior", "x0")
    assert torch.equal(x0, enc.x0.mean + torch.exp(enc.x0.logvar / 2) * eps)
    assert not torch.equal(eps, gaussian(x0, SEEDS, "posterior", "control"))
    assert abs(eps.mean()) < 0.2 and abs(eps.std() - 1) < 0.1


def test_dropped_conditions_become_the_null_value():
    keep = {"text": [True, False, True, False], "control": [False, True, True, False], "absent": [True] * 4}
    enc, null = encoded(**keep), {"text": embed([""])[0]}
    _, cond = settle(enc, SEEDS, null)
    _, kept = settle(replace(enc, keep={}), SEEDS, null)
    assert set(cond) == {"text", "control"}
    for name, blank_value in (("text", null["text"]), ("control", torch.zeros(3, 3, 4, 6))):
        for i, keep_here in enumerate(keep[name]):
            assert torch.equal(cond[name][i], kept[name][i] if keep_here else blank_value)


def test_null_may_carry_a_batch_axis():
    value, keep = randn(2, 5), {"text": torch.tensor([True, False])}
    with_axis = blank({"text": value}, keep, {"text": torch.ones(1, 5)})
    assert torch.equal(with_axis["text"], torch.stack([value[0], torch.ones(5)]))


@pytest.mark.parametrize("objective", [Flow(shift=3.0), Flow(weighting_scheme="cosmap"), Flow(uniform_sampling=True)])
def test_batch_times_accumulate_equals_the_bigger_batch(net, objective):
    strata = [(i, 4) for i in range(4)]
    enc = encoded(text=[True, False, True, True])
    enc.loss_mask = (randn(4, 1, 3, 4, 6, seed=9) > 0).float()
    settings = {"objective": objective, "motion_sub_loss_ratio": 0.25, "loss_outlier_threshold": 2.0}
    whole = measure(net, enc, SEEDS, strata, **settings)
    whole.value.backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    total, parts = 0.0, []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        piece = measure(net, part(enc, rows), SEEDS[rows], strata[rows], **settings)
        share = (rows.stop - rows.start) / 4
        (piece.value * share).backward()
        total += piece.value.item() * share
        parts.append(piece)
    assert math.isclose(total, whole.value.item(), rel_tol=1e-6)
    for name in ("per_sample_B", "level_B"):
        joined = torch.cat([getattr(piece, name) for piece in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-6, atol=0)
    for grad, parameter in zip(grads, net.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6)


def test_strata_reach_the_objective(net):
    strata = [(3, 4), (0, 4), (2, 4), (1, 4)]
    level_B = measure(net, encoded(), SEEDS, strata, objective=Flow(shift=1.0, uniform_sampling=True)).level_B
    assert [int((1 - level) * 4) for level in (level_B - 5e-4).tolist()] == [i for i, _ in strata]


def test_loss_is_that_of_the_formula_and_leaves_the_global_generator_alone(net):
    before, enc = torch.random.get_rng_state(), encoded(T=1)
    result = measure(net, enc, SEEDS, STRATA, motion_sub_loss_ratio=0.25)  # too short for the motion part
    assert torch.equal(before, torch.random.get_rng_state())
    x0, cond = settle(enc, SEEDS, {})
    noise, level = gaussian(x0, SEEDS, "noise"), result.level_B.view(-1, 1, 1, 1, 1)
    answer = net((1 - level) * x0 + level * noise, result.level_B * 1000, cond["text"], cond["control"])
    expected_B = (answer - (noise - x0)).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(result.per_sample_B, expected_B.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.value, expected_B.mean(), rtol=1e-6, atol=0)
    assert result.value.requires_grad and not result.per_sample_B.requires_grad


class Replay(Objective):
    """An objective and a network that say what a file says, to check the arithmetic between them."""

    def __init__(self, x0, target, answer, levels=(0.3, 0.6)):
        self.flow, self.wanted, self.answer, self.levels = Flow(), target, answer, list(levels)
        self.timestep, self.corrupt = self.flow.timestep, self.flow.corrupt

    def draw(self, generator, stratum):
        return self.levels.pop(0)

    def target(self, x0, noise, level_B):
        return self.wanted

    def denoise(self, net, x, timestep_B, cond):
        self.x, self.timestep_B = x, timestep_B
        return self.answer


def replayed(x0, target, answer, loss_mask=None, **settings):
    script = Replay(x0, target, answer)
    enc = Encoded(Posterior(x0, torch.full_like(x0, -80)), {}, {}, loss_mask)
    return diffusion_loss(script.denoise, None, script, enc, {}, SEEDS[:2], STRATA[:2], **settings)


def test_outliers_count_as_zero_in_the_mean():
    target, answer = torch.zeros(2, 3, 2, 4, 4), torch.ones(2, 3, 2, 4, 4)
    answer[0, 0, 0, 0, 0], answer[1, 0, 0, 0, 0] = 51.0, 50.0
    n = target[0].numel()
    plain = replayed(target, target, answer).per_sample_B
    cut = replayed(target, target, answer, loss_outlier_threshold=50.0).per_sample_B
    torch.testing.assert_close(plain, torch.tensor([(51**2 + n - 1) / n, (2500 + n - 1) / n]))
    torch.testing.assert_close(cut, torch.tensor([(n - 1) / n, (2500 + n - 1) / n]))


def test_motion_part_is_neither_weighted_nor_cut():
    target, answer = torch.zeros(2, 3, 3, 4, 4), torch.ones(2, 3, 3, 4, 4)
    answer[:, :, 2] = 60.0  # differences of 0 and 59
    settings = {"motion_sub_loss_ratio": 0.25, "loss_outlier_threshold": 50.0}
    per_sample_B = replayed(target, target, answer, **settings).per_sample_B
    torch.testing.assert_close(per_sample_B, torch.full((2,), 0.75 * 2 / 3 + 0.25 * 59**2 / 2))


def test_each_sample_is_weighted_by_its_level(net):
    enc = encoded()
    plain, weighted = (
        measure(net, enc, SEEDS, STRATA, objective=Flow(weighting_scheme=scheme)) for scheme in ("none", "sigma_sqrt")
    )
    assert torch.equal(plain.level_B, weighted.level_B) and len(set(plain.level_B.tolist())) == 4
    torch.testing.assert_close(weighted.per_sample_B, plain.per_sample_B / plain.level_B**2, rtol=1e-6, atol=0)
    torch.testing.assert_close(weighted.value, weighted.per_sample_B.mean(), rtol=1e-6, atol=0)


def test_masked_cells_are_left_out_of_the_mean():
    target, answer = torch.zeros(2, 3, 2, 4, 4), torch.ones(2, 3, 2, 4, 4)
    answer[:, :, 0] = 7.0
    mask = torch.ones(2, 1, 2, 1, 1)
    mask[:, :, 0] = 0  # the first latent frame
    torch.testing.assert_close(replayed(target, target, answer, mask).per_sample_B, torch.ones(2))
    mask[1] = 0
    assert replayed(target, target, answer, mask).per_sample_B.tolist() == [1.0, 0.0]


@pytest.mark.golden("wan_fun/golden/train_step/*.safetensors")
def test_train_steps_of_the_reference_down_to_the_loss(goldens, monkeypatch):
    """Stored noise, levels and answers in; noisy latents, timesteps and loss out."""
    files = sorted((goldens / "wan_fun/golden/train_step").glob("*.safetensors"))
    motion = 0
    for path in files:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            g = {k: file.get_tensor(k) for k in ("latents", "noise", "sigmas", "timesteps", "target", "noise_pred")}
            g |= {k: file.get_tensor(k) for k in ("noisy_latents", "loss")}
        script = Replay(g["latents"], g["target"], g["noise_pred"], g["sigmas"].tolist())
        script.target = script.flow.target
        monkeypatch.setattr(loss_module, "gaussian", lambda like, seeds, *what, g=g: g["noise"] * (what == ("noise",)))
        enc = Encoded(Posterior(g["latents"], torch.zeros_like(g["latents"])), {}, {})
        ratio = 0.25 if meta["motion_sub_loss"] == "True" else None
        motion += ratio is not None
        B = len(g["latents"])
        result = diffusion_loss(
            script.denoise, None, script, enc, {}, range(B), [(0, 1)] * B, motion_sub_loss_ratio=ratio
        )
        assert torch.equal(script.timestep_B, g["timesteps"])
        torch.testing.assert_close(script.x, g["noisy_latents"], rtol=0, atol=1e-6)
        assert math.isclose(result.value.item(), g["loss"].item(), rel_tol=1e-6), path.name
    assert files and motion


@pytest.mark.golden("wan_fun/golden/vae.safetensors")
def test_posterior_sample_of_the_reference(goldens, monkeypatch):
    with safe_open(goldens / "wan_fun/golden/vae.safetensors", "pt") as file:
        names = sorted(name.removesuffix("sample_norm") for name in file.keys() if name.endswith("sample_norm"))  # noqa: SIM118
        for name in names:
            mean, logvar, eps, expected = (
                file.get_tensor(name + part) for part in ("mean_norm", "logvar", "eps", "sample_norm")
            )
            monkeypatch.setattr(loss_module, "gaussian", lambda like, seeds, *what, eps=eps: eps)
            x0, _ = settle(Encoded(Posterior(mean, logvar), {}, {}), range(len(mean)), {})
            torch.testing.assert_close(x0, expected, rtol=0, atol=1e-6)
    assert names
