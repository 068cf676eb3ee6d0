"""bf16 numbers lifted to fp32, and rounded back by chance: many tensors in one piece, so that each is one operation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGNED = 16  # numbers: 64 bytes, where torch's own tensors on the CPU begin


def lifted(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copies in fp32: the piece, one-dimensional, and the copies, which are views of it."""
    if not tensors:
        return torch.empty(0), []
    places = [0, *accumulate(-(-tensor.numel() // ALIGNED) * ALIGNED for tensor in tensors)]
    piece_N = tensors[0].new_empty(places[-1], dtype=torch.float32)
    copies = views(piece_N, tensors, places)
    torch._foreach_copy_(copies, list(tensors))
    return piece_N, copies


def views(piece_N: Tensor, like: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    return [
        piece_N[place : place + tensor.numel()].view(tensor.shape) for tensor, place in zip(like, places, strict=False)
    ]


def round_by_chance(piece_N: Tensor, parts: Sequence[Tensor], seeds: Sequence[int]) -> None:
    """Rounds in place to what bf16 can hold: a random number below one unit in the last bf16 place is added, then the
    low 16 bits are cut.

    parts: views of the piece, each of which has the chance of its own seed, wherever it lies.
    """
    noise_N = torch.empty_like(piece_N, dtype=torch.int32)
    places = [int(part.storage_offset()) for part in parts]
    generator = torch.Generator(piece_N.device)
    for noise, seed in zip(views(noise_N, parts, places), seeds, strict=True):
        noise.random_(0, 2**16, generator=generator.manual_seed(seed))
    piece_N.view(torch.int32).add_(noise_N).bitwise_and_(-(2**16))
