"""What the network is asked for, and how its answer is walked back to a picture.

One object trains and samples, so the two cannot drift apart. The identity every objective keeps
(and the one test they all share):   to_x0(corrupt(x0, n, l), target(x0, n, l), l) == x0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor


def column(level_B: Tensor, like: Tensor) -> Tensor:
    """level_B shaped to broadcast over `like`'s other axes."""
    return level_B.to(like).reshape(-1, *[1] * (like.ndim - 1))


class Objective(Protocol):
    def draw(self, generator: torch.Generator, stratum: tuple[int, int]) -> float: ...  # one level in [0, 1]
    def quantile(self, u: float) -> float: ...  # the level at share u in [0, 1) of the schedule, noisiest first
    def corrupt(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor: ...
    def to_x0(self, x: Tensor, answer: Tensor, level_B: Tensor) -> Tensor: ...
    def weight(self, level_B: Tensor) -> Tensor: ...  # w_B
    def timestep(self, level_B: Tensor) -> Tensor: ...  # in the network's own unit


@dataclass(frozen=True)
class Flow:
    """Rectified flow: x = (1 - l) x0 + l n, and the network answers n - x0 (https://arxiv.org/abs/2209.03003).

    Levels are those of a discrete schedule of `steps` indices, noisiest first, shifted towards noise by
    shift t / (1 + (shift - 1) t) (https://arxiv.org/abs/2403.03206, eq. 23). Densities and weights of
    `weighting_scheme` are those of Stable Diffusion 3 (same paper, section 3.1) in diffusers' form
    (https://github.com/huggingface/diffusers/pull/8528).
    """

    shift: float = 5.0
    steps: int = 1000
    uniform_sampling: bool = False  # uniform over the stratum, instead of by density over the whole schedule
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    @cached_property
    def levels(self) -> Tensor:
        """float32[steps], in float32 arithmetic throughout, so that it equals the schedule released models saw."""
        t = torch.arange(self.steps, 0, -1, dtype=torch.float32) / self.steps
        return self.shift * t / (1 + (self.shift - 1) * t)

    def draw(self, generator: torch.Generator, stratum: tuple[int, int]) -> float:
        """A level from schedule indices [i/n, (i+1)/n) with uniform_sampling, else from all by the density."""
        if self.uniform_sampling:
            i, n = stratum
            return self.quantile((i + torch.rand((), generator=generator).item()) / n)
        return self.quantile(self._density(generator))

    def _density(self, generator: torch.Generator) -> float:
        if self.weighting_scheme == "logit_normal":
            return torch.normal(self.logit_mean, self.logit_std, (1,), generator=generator).sigmoid().item()
        u = torch.rand(1, generator=generator)
        if self.weighting_scheme == "mode":
            u = 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        return u.item()

    def quantile(self, u: float) -> float:
        index = math.floor(u * self.steps)
        return self.levels[min(max(index, 0), self.steps - 1)].item()  # u rounds to 1 once in 2^24 draws

    def corrupt(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        level = column(level_B, x0)
        return (1 - level) * x0 + level * noise

    def target(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        return noise - x0

    def to_x0(self, x: Tensor, answer: Tensor, level_B: Tensor) -> Tensor:
        return x - column(level_B, x) * answer

    def weight(self, level_B: Tensor) -> Tensor:
        if self.weighting_scheme == "sigma_sqrt":
            return level_B**-2.0
        if self.weighting_scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * level_B + 2 * level_B**2))
        return torch.ones_like(level_B)

    def timestep(self, level_B: Tensor) -> Tensor:
        """In [0, steps], fractional as it is (measured on the reference, 2026-11)."""
        return level_B * self.steps
