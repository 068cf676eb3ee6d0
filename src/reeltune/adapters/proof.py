"""What a tool applies, compared with what was trained: layer by layer, without making a layer's whole change.

The inner product of two changes B1 @ A1 and B2 @ A2 is the sum of (B1ᵀ B2) * (A1 A2ᵀ), in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reeltune.adapters.adapter import LowRank
from reeltune.adapters.loaders import Applied

EXACT = 1e-5  # of ratio and error


@dataclass(frozen=True)
class Proof:
    """How near the applied change is to the trained one. ratio: of the trained change, how much of it is in the applied
    one (1: all). error: what is left, relative."""

    layers: int
    lowest_ratio: float
    highest_ratio: float
    error: float
    missing: list[str]
    """What was trained, and is not applied."""
    strange: list[str]
    """What is applied, and was not trained; or tensors that nothing came of."""
    refused: str | None = None

    def holds(self, most_error: float = EXACT) -> bool:
        bounds = (1 - self.lowest_ratio, self.highest_ratio - 1, self.error)
        return self.refused is None and not self.missing and not self.strange and max(bounds) <= most_error


def prove(layers: Mapping[str, LowRank], changes: Mapping[str, Tensor], applied: Applied) -> Proof:
    """Compares what a tool applies with `layers` and `changes`, which are as they were trained, by released name."""
    wanted = {*layers, *changes}
    there = {*applied.layers, *applied.changes}
    missing = [name for name in wanted - there if not _is_zero(layers.get(name))]
    found = list(_compared(layers, changes, applied))
    ratios = [ratio for ratio, _ in found] or [math.nan]
    return Proof(
        len(found),
        min(ratios),
        max(ratios),
        max((error for _, error in found), default=math.nan),
        sorted(missing),
        sorted(there - wanted) + list(applied.unused),
        applied.refused,
    )


def _compared(
    layers: Mapping[str, LowRank], changes: Mapping[str, Tensor], applied: Applied
) -> Iterator[tuple[float, float]]:
    for name in layers.keys() & applied.layers.keys():
        trained, theirs = layers[name], applied.layers[name]
        yield _measured(inner(trained, trained), inner(trained, theirs), inner(theirs, theirs))
    for name in changes.keys() & applied.changes.keys():
        trained, theirs = (one.double().flatten() for one in (changes[name], applied.changes[name]))
        yield _measured(float(trained @ trained), float(trained @ theirs), float(theirs @ theirs))


def _measured(trained: float, between: float, theirs: float) -> tuple[float, float]:
    if trained == 0:
        return (1.0, 0.0) if theirs == 0 else (math.inf, math.inf)
    return between / trained, math.sqrt(max(trained - 2 * between + theirs, 0.0) / trained)


def inner(one: LowRank, other: LowRank) -> float:
    """The inner product of their changes, as matrices."""
    A, B, C, D = (part.double() for part in (one.A_RI, one.B_OR, other.A_RI, other.B_OR))
    return one.scale * other.scale * float(((B.T @ D) * (A @ C.T)).sum())


def _is_zero(pair: LowRank | None) -> bool:
    return pair is not None and not torch.any(pair.B_OR)


def strengths(layers: Mapping[str, LowRank], applied: Applied) -> tuple[float, float] | None:
    """(least, most) of applied over meant scale, of layers that are applied; from alphas and ranks alone."""
    found = [applied.layers[name].scale / pair.scale for name, pair in layers.items() if name in applied.layers]
    return (min(found), max(found)) if found else None
