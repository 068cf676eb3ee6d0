"""Dropout whose choices are a function of where a run is, so that a resumed one drops the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reeltune.core.rng import seed_of


@contextmanager
def seeded_dropout(
    share: float, device: torch.device, seed: int, step: int, micro_step: int, rank: int
) -> Iterator[None]:
    """Seeds the dropout of a forward pass, entered around it. Recomputed blocks drop the same: torch keeps the
    generator's state for them."""
    if not share:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, "dropout", step, micro_step, rank))
        yield
