"""Rotary positions on a resized grid, as EasyAnimate and CogVideoX-Fun share them."""

from __future__ import annotations

from collections.abc import Sequence

Corner = tuple[float, ...]


def open_grid(start: Sequence[float], stop: Sequence[float], counts: Sequence[int]) -> tuple[Corner, Corner]:
    """The (start, stop) to give diffusers, so that n positions go from start to stop, stop left out, in equal steps.

    That is how the released code has it (measured on the reference, 2026-11). diffusers 0.42
    (https://github.com/huggingface/diffusers, embeddings.py, get_3d_rotary_pos_embed) takes n from start to
    stop (n - 1) / n, which is stretched wherever start is not 0; given stop + start / (n - 1) it is the same.
    """
    return tuple(start), tuple(b + a / max(n - 1, 1) for a, b, n in zip(start, stop, counts, strict=True))
