"""What the network is asked for, and how its answer is walked back to a picture.

One object trains and samples, so the two cannot drift apart. The identity every objective keeps
(and the one test they all share):   to_x0(corrupt(x0, n, l), target(x0, n, l), l) == x0
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def column(level_B: Tensor, like: Tensor) -> Tensor:
    """level_B shaped to broadcast over `like`'s other axes."""
    return level_B.to(like).reshape(-1, *[1] * (like.ndim - 1))


class Objective(Protocol):
    def draw(self, generator: torch.Generator, stratum: tuple[int, int]) -> float: ...  # one level in [0, 1]
    def corrupt(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor: ...
    def to_x0(self, x: Tensor, answer: Tensor, level_B: Tensor) -> Tensor: ...
    def weight(self, level_B: Tensor) -> Tensor: ...  # w_B
    def timestep(self, level_B: Tensor) -> Tensor: ...  # in the network's own unit
