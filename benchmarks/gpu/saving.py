"""How long a checkpoint keeps training waiting: the copy of all that it holds, for a write in the background."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.gpu import step
from benchmarks.gpu.report import Part
from benchmarks.gpu.sizes import Network, Scale
from benchmarks.gpu.timing import give_back, seconds_of
from reeltune.memory.size import size_bytes
from reeltune.training.background_save import copied

WAYS = {"whole network": {}, "adapter": {"rank": 32, "base_weights": "int8"}}


def measure(part: Part, scale: Scale, device: torch.device, checkpoint: Path, network: Network) -> None:
    for name, changes in WAYS.items():
        with part.attempt(name):
            steps = step.Step(step.recipe_of(checkpoint, **changes), network, scale)
            steps()  # makes the optimizer's state
            for time in ("first", "second"):  # the first asks the system for the memory
                contents = steps.learner.weights(), steps.learner.state()
                size = size_bytes(tree_leaves(contents))
                seconds = seconds_of(lambda contents=contents: copied(contents), device)
                part.row(f"{name}, {time} copy", blocked_s=seconds, gb=size / 1e9, gb_s=size / 1e9 / seconds)
            del steps, contents
        give_back(device)
