"""Inpainting conditions, as families share them: a mask of what is known, then the clip where it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reeltune.core.types import Batch, Posterior
from reeltune.diffusion.loss import gaussian
from reeltune.families.latents import to_cells
from reeltune.families.spec import needed


def condition(
    encode: Callable[[Tensor], Posterior],
    pixels_BFCHW: Tensor,
    mask_BFHW: Tensor,
    cells: Sequence[int],
    *,
    scale: float,
    seeds: Sequence[int] | None,
) -> Posterior:
    """B 1+C T h w: the mask in latent cells (1 = keep) times `scale`, as released models saw it; then the kept clip.

    seeds: of the noise on the kept clip; None for none (both measured on the reference, 2026-11).
    """
    seen = kept_pixels(pixels_BFCHW, mask_BFHW)
    if seeds is not None:
        seen = noisy(seen, seeds)
    mask_BCThw = to_cells((~mask_BFHW[:, None]).float(), cells) * scale
    return join_mask(mask_BCThw, encode(seen))


def kept_pixels(pixels_BFCHW: Tensor, mask_BFHW: Tensor) -> Tensor:
    """The clip, black (-1) where the mask says that it is to be generated."""
    return torch.where(mask_BFHW[:, :, None], -1, pixels_BFCHW)


def noisy(pixels_BFCHW: Tensor, seeds: Sequence[int]) -> Tensor:
    """Noise of deviation exp(N(-3, 0.5)) on all that is not exactly -1 (measured on the reference, 2026-11)."""
    deviation_B = (gaussian(pixels_BFCHW[:, 0, 0, 0, 0], seeds, "kept noise deviation") * 0.5 - 3).exp()
    noise = gaussian(pixels_BFCHW, seeds, "kept noise") * deviation_B[:, None, None, None, None]
    return torch.where(pixels_BFCHW == -1, pixels_BFCHW, pixels_BFCHW + noise)


def join_mask(mask_BCThw: Tensor, kept: Posterior) -> Posterior:
    """The mask's channels, then the clip's. The mask is known exactly: its variance is 0."""
    exactly = torch.full_like(mask_BCThw, -torch.inf)
    return Posterior(torch.cat([mask_BCThw, kept.mean], 1), torch.cat([exactly, kept.logvar], 1))


def kept(batch: Batch, mode: str) -> dict[str, Tensor]:
    """What the draw keeps; inpainting is dropped only where everything is to be generated."""
    inpaint = {"inpaint": kept_unless_all_masked(batch.keep, needed(batch.mask_BFHW))} if mode == "inpaint" else {}
    return batch.keep | inpaint


def kept_unless_all_masked(keep: dict[str, Tensor], mask_BFHW: Tensor) -> Tensor:
    """keep_B of "inpaint": only samples of which everything is to be generated lose it, by their draw."""
    fully_B = mask_BFHW.flatten(1).all(1)
    return keep.get("inpaint", torch.ones_like(fully_B)) | ~fully_B
