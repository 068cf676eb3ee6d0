"""Layers that are one in HunyuanVideo's own code (query, key, value, and what stands beside them), and apart here.

Fused, their pairs stand side by side: A one below the other, B block by block along the diagonal, so that the fused
change is theirs, one below the other (https://arxiv.org/abs/2106.09685: a change is B @ A).
Letters: O outputs, I inputs, R rank of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from reeltune.adapters.adapter import LowRank


def fuse(parts: Mapping[int, LowRank], outputs: Sequence[int]) -> LowRank:
    """One pair of scale 1 for layers of these outputs, in their order; those that are not in `parts` do not change.

    B is in fp32, to be rounded once.
    """
    first = next(iter(parts.values()))
    ranks = {place: part.rank for place, part in parts.items()}
    A = torch.cat([part.A_RI for part in parts.values()])
    B = first.B_OR.new_zeros(sum(outputs), sum(ranks.values()), dtype=torch.float32)
    rows, columns = [0, *accumulate(outputs)], 0
    for place, part in parts.items():
        B[rows[place] : rows[place + 1], columns : columns + part.rank] = part.B_OR.float() * part.scale
        columns += part.rank
    return LowRank(A, B, alpha=float(A.shape[0]))


def outputs_of(pair: LowRank, count: int) -> list[int]:
    """Outputs of each of `count` layers in one: query, key and value have as many as inputs, a fourth has the rest."""
    width = pair.A_RI.shape[1]
    return [width] * 3 + ([pair.B_OR.shape[0] - 3 * width] if count == 4 else [])


def split(pair: LowRank, outputs: Sequence[int]) -> list[LowRank | None]:
    """The pair of each layer: of its own rank where no two share columns of B, else of the whole rank; None: no change.

    On the meta device nothing is known of B, and each has the whole rank.
    """
    rows = [0, *accumulate(outputs)]
    places = [slice(rows[place], rows[place + 1]) for place in range(len(outputs))]
    own = _own_columns([pair.B_OR[place] for place in places]) if pair.magnitude_O is None else None
    parts: list[LowRank | None] = []
    for i, place in enumerate(places):
        low, high = (0, pair.rank) if own is None else own[i]
        magnitude = None if pair.magnitude_O is None else pair.magnitude_O[place]
        A, B = pair.A_RI[low:high], pair.B_OR[place, low:high]
        parts.append(LowRank(A, B, pair.scale * (high - low), magnitude_O=magnitude) if high > low else None)
    return parts


def _own_columns(blocks: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """(first column, end) of what is not zero in each block; None if two of these overlap, or if all are empty."""
    if blocks[0].is_meta:
        return None
    found = [block.ne(0).any(0).nonzero().reshape(-1).tolist() for block in blocks]
    spans = [(columns[0], columns[-1] + 1) if columns else (0, 0) for columns in found]
    filled = sorted(span for span in spans if span[1])
    apart = all(before[1] <= after[0] for before, after in pairwise(filled))
    return spans if filled and apart else None
