"""How long a checkpoint keeps training waiting: the copy of all that it holds, for a write in the background."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import step
from benchmarks.gpu.report import Part
from benchmarks.gpu.sizes import Network, Scale
from benchmarks.gpu.timing import give_back, seconds_of
from reeltune.training.host_copies import HostCopies, copied_bytes

WAYS = {"whole network": {}, "adapter": {"rank": 32, "base_weights": "int8"}}


def measure(part: Part, scale: Scale, device: torch.device, checkpoint: Path, network: Network) -> None:
    for name, changes in WAYS.items():
        with part.attempt(name):
            steps = step.Step(step.recipe_of(checkpoint, **changes), network, scale)
            steps()  # makes the optimizer's state
            contents = steps.learner.weights(), steps.learner.state()
            gb = copied_bytes(contents) / 1e9
            for what, kind, seconds in _times(contents, device):
                part.row(f"{name}, {what}", **{kind: seconds}, gb=gb, gb_s=gb / seconds)
            del steps, contents
        give_back(device)


def _times(contents: Any, device: torch.device) -> Iterator[tuple[str, str, float]]:
    """(what, whether that is beside training or blocks it, seconds), as a run has it."""
    copies, made = HostCopies(), []

    def reserve() -> None:
        copies.reserve(contents)
        copies.held_bytes()  # waits

    yield "memory reserved", "beside_s", seconds_of(reserve, device)
    for time in ("first", "second"):
        yield f"{time} copy", "blocked_s", seconds_of(lambda: made.append(copies.copied(contents)), device)
        copies.give_back(made.pop())
