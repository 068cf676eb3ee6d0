"""What the frozen networks take on fake tensors: to encode a batch, and to decode a preview's clip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune.core.types import Batch, Encoded
from reeltune.estimate.attribution import tensors_in, weights_of
from reeltune.estimate.memory_tracker import ELSEWHERE, Tracker
from reeltune.families.spec import Parts
from reeltune.memory.size import size_bytes
from reeltune.sampling.sample import Setup


@dataclass
class Visiting(Parts):
    """Frozen networks that count as on the device only while they are borrowed."""

    tracker: Tracker | None = None

    @contextmanager
    def borrow(self, name: str) -> Iterator[nn.Module]:
        assert self.tracker is not None
        self.tracker.own(weights_of(self.frozen[name]), "frozen")
        yield self.frozen[name]
        self.tracker.own(weights_of(self.frozen[name]), ELSEWHERE)


@dataclass(frozen=True)
class Work:
    """What frozen networks did."""

    peak: dict[str, int]  # part -> bytes at the fullest moment
    flops: int


@dataclass(frozen=True)
class Encoding(Work):
    encoded: Encoded
    null: dict[str, Tensor]
    batch_bytes: int  # of both, on the device until the step is done
    clip_bytes: int  # of latents and conditions of one clip
    frozen_bytes: int  # of frozen networks, on the device all the time; 0 where they only visit it
    weight_bytes: dict[str, int]  # frozen network -> bytes of its weights


def encode(setup: Setup, batch: Batch, fake: FakeTensorMode, *, visiting: bool) -> Encoding:
    """visiting: frozen networks are on the device only while they are borrowed."""
    tracker = Tracker(fake)
    setup = _tracked(setup, tracker, visiting=visiting)
    tracker.own(tensors_in(vars(batch)), ELSEWHERE)  # in the host's memory until Batch.to
    tracker.own(setup.parts.null.values(), "batch")
    with tracker, tracker.phase("encode"):
        encoded = setup.encode(batch)
    tensors, after = encoded.tensors(), Tracker()
    made = [tensor for name, tensor in tensors.items() if name.startswith(("x0", "cond"))]
    after.own([*tensors.values(), *setup.parts.null.values()], "batch")
    return Encoding(
        peak=tracker.peaks["encode"],
        flops=tracker.flops["encode"],
        encoded=encoded,
        null=setup.parts.null,
        batch_bytes=after.live["batch"],
        clip_bytes=size_bytes(made) // len(batch.draws),
        frozen_bytes=tracker.live["frozen"],
        weight_bytes={name: size_bytes(weights_of(network)) for name, network in setup.parts.frozen.items()},
    )


def decode(setup: Setup, x0_BCThw: Tensor, fake: FakeTensorMode, *, visiting: bool) -> Work:
    """Of one clip's latents, shaped as these. visiting: as for `encode`."""
    tracker = Tracker(fake)
    setup = _tracked(setup, tracker, visiting=visiting)
    with tracker, tracker.phase("preview"), torch.no_grad():
        setup.family.decode(setup.parts, torch.empty_like(x0_BCThw[:1], dtype=torch.float32))
    return Work(tracker.peaks["preview"], tracker.flops["preview"])


def _tracked(setup: Setup, tracker: Tracker, *, visiting: bool) -> Setup:
    """The same, its frozen networks known to the tracker. A Setup of its own, which remembers no captions yet."""
    parts = setup.parts
    for network in parts.frozen.values():
        tracker.own(weights_of(network), ELSEWHERE if visiting else "frozen")
    parts = Visiting(**vars(parts), tracker=tracker) if visiting else parts
    return Setup(setup.family, setup.mode, parts, setup.objective, setup.autocast, setup.options)
