"""What the frozen networks take on fake tensors: to encode a batch, and to decode a preview's clip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune.core.types import Batch, Encoded
from reeltune.estimate.memory_tracker import ELSEWHERE, Tracker, Work, tensors_in, weights_of
from reeltune.estimate.repeated_calls import counted_once
from reeltune.families.spec import Parts
from reeltune.memory.size import size_bytes
from reeltune.sampling.sample import Setup


@dataclass
class Visiting(Parts):
    """Frozen networks that count as on the device only while they are borrowed."""

    tracker: Tracker = field(kw_only=True)

    @contextmanager
    def borrow(self, name: str) -> Iterator[nn.Module]:
        self.tracker.own(weights_of(self.frozen[name]), "frozen")
        yield self.frozen[name]
        self.tracker.own(weights_of(self.frozen[name]), ELSEWHERE)


@dataclass(frozen=True)
class Encoding:
    work: Work
    left: dict[str, int]  # bytes afterwards: "batch", which is `encoded` and `null`; "frozen", unless they only visit
    encoded: Encoded
    null: dict[str, Tensor]
    clip_bytes: int  # of latents and conditions of one clip
    weight_bytes: dict[str, int]  # frozen network -> bytes of its weights


def encode(setup: Setup, batch: Batch, fake: FakeTensorMode) -> Encoding:
    tracker, parts = Tracker(fake), setup.parts
    tracker.own(tensors_in(vars(batch)), ELSEWHERE)  # in the host's memory until Batch.to
    tracker.own(parts.null.values(), "batch")
    with frozen_counted(setup, tracker, "encode") as counted:
        encoded = counted.encode(batch)
    tensors = encoded.tensors()
    tracker.own(tensors.values(), "batch")
    made = [tensor for name, tensor in tensors.items() if name.startswith(("x0", "cond"))]
    return Encoding(
        work=tracker.work("encode"),
        left={part: tracker.live[part] for part in ("batch", "frozen")},
        encoded=encoded,
        null=parts.null,
        clip_bytes=size_bytes(made) // len(batch.draws),
        weight_bytes={name: size_bytes(weights_of(network)) for name, network in parts.frozen.items()},
    )


def decode(setup: Setup, x0_BCThw: Tensor, fake: FakeTensorMode) -> Work:
    """The work of decoding one clip's latents, shaped as these."""
    tracker = Tracker(fake)
    with frozen_counted(setup, tracker, "preview") as counted, torch.no_grad():
        counted.family.decode(counted.parts, torch.empty_like(x0_BCThw[:1], dtype=torch.float32))
    return tracker.work("preview")


@contextmanager
def frozen_counted(setup: Setup, tracker: Tracker, phase: str) -> Iterator[Setup]:
    """The Setup with frozen networks whose work the tracker counts in that phase. It is a Setup of its own, which
    remembers no captions yet."""
    parts = setup.parts
    for network in parts.frozen.values():
        tracker.own(weights_of(network), ELSEWHERE if parts.low_vram else "frozen")
    with tracker, tracker.phase(phase), counted_once(parts.frozen.get("vae"), tracker):
        yield replace(setup, parts=Visiting(**vars(parts), tracker=tracker) if parts.low_vram else parts)
