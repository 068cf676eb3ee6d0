"""Noise -> latents, with the functions that training uses, through a diffusers scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from reeltune.diffusion.loss import Cond, Denoise, blank, gaussian
from reeltune.diffusion.objective import Ddpm, Flow, Objective, Sigma

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def sampler(objective: Objective) -> SchedulerMixin:
    """The plain deterministic sampler of the objective's own schedule: Euler, or DDIM with trailing steps."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if isinstance(objective, Flow):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=objective.steps, shift=objective.shift)
    assert isinstance(objective, Ddpm | Sigma)
    return DDIMScheduler(
        num_train_timesteps=objective.steps,
        trained_betas=objective.betas.tolist(),
        prediction_type=objective.prediction_type,
        timestep_spacing="trailing",  # so that it starts where training's noise ends (https://arxiv.org/abs/2305.08891)
        clip_sample=False,
    )


def schedule(scheduler: Any, objective: Objective, steps: int, device: torch.device) -> list[float]:
    """Sets the scheduler to `steps` steps and returns their noise levels, noisiest first, without the last 0.

    Flow's are evenly spaced from 1 to 0 before the scheduler's own shift, as in Wan's released sampler (left to
    itself, diffusers' Euler scheduler shifts twice). DPM++ cannot be told and has very nearly these.
    """
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1], device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    if isinstance(objective, Flow):
        return scheduler.sigmas[:-1].tolist()
    return (scheduler.timesteps / objective.steps).tolist()


@torch.no_grad()
def sample(
    denoise: Denoise,
    net: nn.Module,
    objective: Objective,
    cond: Cond,
    null: Cond,
    shape_BCThw: Sequence[int],
    *,
    scheduler: Any,
    seeds: Sequence[int],
    steps: int,
    guidance: float = 1.0,
    caption: Sequence[str] = ("text",),
    device: torch.device | str = "cpu",
) -> Tensor:
    """x0_BCThw in float32. `scheduler` is any of diffusers' that suits the objective, `sampler`'s or another.

    guidance: blind + guidance * (answer - blind) (https://arxiv.org/abs/2207.12598), where the blind pass lacks
    the conditions named in `caption` and keeps all others, as the released pipelines do. 1 makes no blind pass.
    """
    x = gaussian(torch.empty(tuple(shape_BCThw), device=device), seeds, "noise")
    keep_none = torch.zeros(len(seeds), dtype=torch.bool)
    blind = blank(cond, dict.fromkeys(caption, keep_none), null)
    for level, t in zip(schedule(scheduler, objective, steps, x.device), scheduler.timesteps, strict=True):
        timestep_B = objective.timestep(torch.full((len(seeds),), level, device=x.device))
        answer = denoise(net, x, timestep_B, cond).float()
        if guidance != 1:
            without = denoise(net, x, timestep_B, blind).float()
            answer = without + guidance * (answer - without)
        x = scheduler.step(answer[:, : x.shape[1]], t, x, return_dict=False)[0]  # channels of a variance are not used
    return x
