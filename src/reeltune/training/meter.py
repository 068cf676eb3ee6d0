"""What a step costs and gives: its row of metrics.jsonl, and the seconds of its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reeltune.core.types import Geometry, Progress, Shape
from reeltune.distributed.engine import Engine, FlopCount, Stopwatch
from reeltune.distributed.watchdog import Doing, Watchdog
from reeltune.reporting.metrics import PARTS

SECONDS: dict[Doing, str] = dict(zip(("data", "encode", "forward", "step"), PARTS, strict=True))  # stage -> its time


class Meter:
    """Counts the losses, tokens, FLOPs and seconds of a step for its row of metrics.jsonl.

    samples: in a step, over all processes. count_flops: whether the device's peak is known, to compare them with.
    """

    def __init__(self, engine: Engine, watchdog: Watchdog, geometry: Geometry, *, samples: int, count_flops: bool):
        self._engine, self._watchdog, self._geometry, self._samples = engine, watchdog, geometry, samples
        self._flop_count = FlopCount(enabled=count_flops)

    def begin(self, step: int) -> None:
        """Begins a step. step: how many have been taken before."""
        self._step, self._stopwatch = step, Stopwatch(self._engine.device)
        self._losses: list[Tensor] = []
        self._tokens = self._flops = 0

    @contextmanager
    def stage(self, name: Doing) -> Iterator[None]:
        """Times what runs inside, with what ran since the stage before, as stage `name`; the watchdog is told too."""
        self._watchdog.doing(name, self._step)
        yield
        self._stopwatch.mark(SECONDS[name])

    def counts(self, shape: Shape) -> bool:
        """Whether the next `flops` of that shape will count: each shape is counted once."""
        return self._flop_count.enabled and shape not in self._flop_count.known

    def flops(self, shape: Shape) -> AbstractContextManager:
        """Counts FLOPs, entered around the forward pass of a batch of that shape."""
        return self._flop_count.forward(shape)

    def count(self, loss: Tensor, shape: Shape, samples: int) -> None:
        """Adds a pass. loss: its mean over all processes; samples: those of this process."""
        self._shape = shape
        self._losses.append(loss)
        self._tokens += self._geometry.tokens(shape) * samples * self._engine.place[1]
        self._flops += self._flop_count.known.get(shape, 0) * self._engine.world

    def row(self, progress: Progress, grad_norm: Tensor, rates: Mapping[str, Any]) -> dict[str, Any]:
        """The finished step's row, for `Log.step`; tensors are still on the device. rates: "lr", and others."""
        return {
            "step": progress.step,
            "epoch": progress.epoch,
            "loss": torch.stack(self._losses).mean(),
            "grad_norm": grad_norm,
            **rates,
            "shape": list(self._shape),
            "samples": self._samples,
            "tokens": self._tokens,
            "flops": self._flops,
            "peak_memory_bytes": self._engine.peak_memory_bytes(),
        }

    def seconds(self) -> Callable[[], dict[str, float]]:
        """A function that returns the seconds of each of PARTS; it may wait for the device."""
        return partial(self._stopwatch.seconds, PARTS)
