"""Encoded -> loss. The whole of diffusion training, in one function and its three parts.

Every random number of a sample comes from its own seed, on the CPU: a sample's loss depends neither on the
others in its batch, nor on the rank, nor on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reeltune.core.rng import seed_of
from reeltune.core.types import Encoded, Posterior
from reeltune.diffusion.objective import Objective

Cond = dict[str, Tensor]
Denoise = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]


@dataclass(frozen=True)
class Loss:
    """All on the device; nothing waits for it."""

    value: Tensor  # scalar, differentiable
    level_B: Tensor
    per_sample_B: Tensor  # detached; their mean is the value


def gaussian(like: Tensor, seeds: Sequence[int], *what: str) -> Tensor:
    """float32 standard normal noise of `like`'s shape, on its device; sample i depends on seeds[i] alone."""
    noise = torch.empty(like.shape, pin_memory=like.is_cuda)  # pinned, so that the copy does not wait for the device
    for sample, seed in zip(noise, seeds, strict=True):
        sample.normal_(generator=torch.Generator().manual_seed(seed_of(seed, *what)))
    return noise.to(like.device, non_blocking=True)


def blank(cond: Cond, keep: dict[str, Tensor], null: dict[str, Tensor]) -> Cond:
    """Conditions whose keep_B is False become their null value: zeros unless the family has one."""
    out = dict(cond)
    for name, keep_B in keep.items():
        if name in cond:
            value = cond[name]
            keep_here = keep_B.to(value.device, non_blocking=True).reshape(-1, *[1] * (value.ndim - 1))
            out[name] = torch.where(keep_here, value, null[name].to(value) if name in null else 0)
    return out


def settle(encoded: Encoded, seeds: Sequence[int], null: dict[str, Tensor]) -> tuple[Tensor, Cond]:
    """Draws every distribution and drops what is to be dropped: (x0_BCThw in float32, cond)."""

    def drawn(name: str, value: Tensor | Posterior) -> Tensor:
        if not isinstance(value, Posterior):
            return value
        noise = gaussian(value.mean, seeds, "posterior", name)
        return value.mean.float() + (value.logvar.float() / 2).exp() * noise

    cond = {name: drawn(name, value) for name, value in encoded.cond.items()}
    return drawn("x0", encoded.x0), blank(cond, encoded.keep, null | encoded.null)


def answer_at(
    denoise: Denoise, net: nn.Module, objective: Objective, x0: Tensor, cond: Cond, noise: Tensor, level_B: Tensor
) -> Tensor:
    """What the network says of a clip with noise at these levels, B C T h w."""
    return denoise(net, objective.corrupt(x0, noise, level_B), objective.timestep(level_B), cond)


def error_at(
    denoise: Denoise, net: nn.Module, objective: Objective, x0: Tensor, cond: Cond, noise: Tensor, level_B: Tensor
) -> Tensor:
    """How much the network's answer is wrong, B C T h w in float32."""
    return objective.error(answer_at(denoise, net, objective, x0, cond, noise, level_B), x0, noise, level_B)


def mean_square(error: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean square of each sample, over the cells where the mask is not 0; a sample that is masked throughout has
    0."""
    if mask is None:
        return error.square().flatten(1).mean(1)
    mask = mask.to(error).expand_as(error)
    return (error.square() * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def diffusion_loss(
    denoise: Denoise,
    net: nn.Module,
    objective: Objective,
    encoded: Encoded,
    null: dict[str, Tensor],
    seeds: Sequence[int],
    strata: Sequence[tuple[int, int]],
    *,
    motion_sub_loss_ratio: float | None = None,
    loss_outlier_threshold: float | None = None,
) -> Loss:
    """Mean over the batch of each sample's weighted mean square error, and of what its objective adds.

    motion_sub_loss_ratio r: (1 - r) loss + r MSE of differences between neighbouring latent frames, unweighted and
    unmasked, for clips of 3 latent frames or more. loss_outlier_threshold: elements with a larger absolute error
    count as 0 in the mean. Both as in the original training scripts (measured, 2026-11).
    """
    x0, cond = settle(encoded, seeds, null)
    noise = gaussian(x0, seeds, "noise")
    generators = [torch.Generator().manual_seed(seed_of(seed, "level")) for seed in seeds]
    levels = [objective.draw(*pair) for pair in zip(generators, strata, strict=True)]
    level_B = torch.tensor(levels, dtype=torch.float32).to(x0.device, non_blocking=True)

    answer = answer_at(denoise, net, objective, x0, cond, noise, level_B)
    error = objective.error(answer, x0, noise, level_B)
    counted = error
    if loss_outlier_threshold is not None:
        counted = torch.where(error.abs() > loss_outlier_threshold, 0, error)
    loss_B = mean_square(counted, encoded.loss_mask) * objective.weight(level_B)
    if motion_sub_loss_ratio is not None and error.shape[2] > 2:
        loss_B = loss_B * (1 - motion_sub_loss_ratio) + mean_square(error.diff(dim=2)) * motion_sub_loss_ratio
    surcharge_B = objective.surcharge(answer, x0, noise, level_B)
    if surcharge_B is not None:
        loss_B = loss_B + surcharge_B
    return Loss(loss_B.mean(), level_B, loss_B.detach())
