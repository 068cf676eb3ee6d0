"""Clips to latents and back, as families share it whose VAE scales its latents as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.core.types import Posterior


def dtype_of(network: nn.Module) -> torch.dtype:
    """The dtype of a network's first weight, and so of its input. `.dtype` of diffusers goes through all weights at
    each call."""
    return next(network.parameters()).dtype


def encode_clip(vae: Any, pixels_BFCHW: Tensor) -> Posterior:
    """The distribution times the VAE's scaling factor."""
    latents = vae.encode(pixels_BFCHW.transpose(1, 2).to(dtype_of(vae))).latent_dist
    scale = vae.config.scaling_factor
    return Posterior(latents.mean.float() * scale, latents.logvar.float() + 2 * math.log(scale))


@torch.no_grad()
def decode_clip(vae: Any, x0_BCThw: Tensor) -> Tensor:
    """pixels_BFCHW float32, about [-1, 1]."""
    z = (x0_BCThw.float() / vae.config.scaling_factor).to(dtype_of(vae))
    return vae.decode(z).sample.float().transpose(1, 2)


def to_cells(x_BCFHW: Tensor, cells: Sequence[int]) -> Tensor:
    """Trilinear to (T, h, w), the first frame apart, since it has a latent frame of its own."""
    frames, *cell = cells
    pieces = [(x_BCFHW[:, :, :1], 1), (x_BCFHW[:, :, 1:], frames - 1)]
    sized = [F.interpolate(piece, (count, *cell), mode="trilinear") for piece, count in pieces if count]
    return torch.cat(sized, 2)
