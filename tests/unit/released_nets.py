"""Weights that are random, the same everywhere, in the formats of ControlNetHED.pth and mlsd_large_512_fp32.pth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CENTRE, ENDS = 7, slice(8, 12)  # of the 16 maps that M-LSD's last layer has


def weights(outline: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    """For names and shapes of a state dict, such that the nets' outputs are of use: greys of all shades, lines that are
    some cells long."""
    rng, made = np.random.RandomState(seed), {}
    for name, tensor in outline.items():
        made[name] = torch.from_numpy(_values(name, tensor.shape, rng))
    return made


def _values(name: str, shape: torch.Size, rng: np.random.RandomState) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.array(1)
    if name == "norm":
        return np.array([123, 116, 103], np.float32).reshape(shape)
    if name.endswith("running_var"):
        return (0.5 + rng.rand(*shape)).astype(np.float32)
    if len(shape) == 4:
        drawn = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        if "projection" in name:
            drawn *= 0.04
        if name == "block23.conv3.weight":
            drawn[CENTRE] *= 0.5
            drawn[ENDS] *= 0.7
        return drawn.astype(np.float32)
    if name.endswith("weight"):
        return (0.8 + 0.4 * rng.rand(*shape)).astype(np.float32)
    drawn = 0.1 * rng.standard_normal(shape)
    if name == "block23.conv3.bias":
        drawn[CENTRE] = -2
    if "projection" in name:
        drawn -= 1
    return drawn.astype(np.float32)


def picture(height: int = 64, width: int = 128) -> np.ndarray:
    """uint8 H W 3: blocks of colour under noise."""
    rng = np.random.RandomState(1)
    blocks = rng.randint(0, 200, (height // 16, width // 16, 3)).repeat(16, 0).repeat(16, 1)
    return (blocks + rng.randint(0, 56, (height, width, 3))).astype(np.uint8)


def save(make: Callable[[], nn.Module], file: Path) -> Path:
    with torch.device("meta"):
        outline = make().state_dict()
    torch.save(weights(outline), file)
    return file
