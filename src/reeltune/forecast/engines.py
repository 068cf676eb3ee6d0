"""What a step takes on each of several GPUs: a rehearsed step on one, its parts copied or shared out.  (no torch)

Psi is the number of trained parameters, N of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reeltune.forecast.parts import Rehearsal

Parts = dict[str, int]
HALF, FULL = 2, 4  # bytes of a number in bf16 and fp32
BUCKET = 500_000_000  # numbers: reduce_bucket_size and allgather_bucket_size (deepspeed.ai/docs/config-json)
LIVE = 1_000_000_000  # numbers: stage3_max_live_parameters, of the same page


@dataclass(frozen=True)
class Engine:
    """How parts of a step on one GPU become parts of a step on each of N."""

    words: str
    share: Callable[[Rehearsal, str, int], Parts]
    """(rehearsal, phase, N) -> parts at the fullest moment of the phase."""
    half_weights: bool
    """The network computes with bf16 copies of its own, not under autocast."""
    exchanged: Callable[[int, int], float]
    """(Psi, N) -> bytes that each GPU sends in an optimizer step."""


def _one(found: Rehearsal, phase: str, gpus: int) -> Parts:
    return dict(found.peaks[phase])


def _ddp(found: Rehearsal, phase: str, gpus: int) -> Parts:
    """Gradients are copied into buckets that are exchanged (torch/csrc/distributed/c10d/reducer.cpp)."""
    return {**found.peaks[phase], "buckets": found.peaks[phase]["weights"]}


def _zero2(found: Rehearsal, phase: str, gpus: int) -> Parts:
    """bf16 weights whole; fp32 copies, state and gradients shared out (https://arxiv.org/abs/1910.02054, section 5)."""
    share = -(-found.trainable // gpus)
    parts = _computed_in_half(found, phase)
    parts |= {"masters": FULL * share, "optimizer": _state(found, share), "gradients": HALF * share}
    if phase == "step":
        parts["gradients"] += FULL * share  # fp32 gradients of the share that this GPU steps
    parts["buckets"] = 2 * HALF * min(BUCKET, found.trainable)  # one filled while the other is sent (overlap_comm)
    return parts


def _zero3(found: Rehearsal, phase: str, gpus: int) -> Parts:
    """As ZeRO-2, and the weights too: whole only where they are at work, up to stage3_max_live_parameters."""
    parts = _zero2(found, phase, gpus)
    whole = parts["weights"]
    parts["weights"] = -(-whole // gpus)
    parts["gathered"] = HALF * min(LIVE, found.parameters) if phase != "encode" else 0
    return parts


def _fsdp(found: Rehearsal, phase: str, gpus: int) -> Parts:
    """fp32 weights, gradients and state shared out; two blocks of bf16 weights and one of gradients whole at a time
    (docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html: one block computes while the next is gathered)."""
    share = -(-found.trainable // gpus)
    parts = _computed_in_half(found, phase)
    parts["weights"] = FULL * share + parts.pop("still", 0) // gpus
    parts |= {"optimizer": _state(found, share), "gathered": 2 * HALF * found.block_parameters}
    if phase in ("backward", "step"):
        parts["gradients"] = FULL * share
    if phase == "backward":
        parts["gathered"] += HALF * found.block_parameters
    return parts


def _computed_in_half(found: Rehearsal, phase: str) -> Parts:
    """The phase's parts; of weights kept in fp32, their bf16 copies."""
    parts = dict(found.peaks[phase])
    parts["weights"] = HALF * found.trainable
    parts.pop("gradients", None)
    return parts


def _state(found: Rehearsal, share: int) -> int:
    return found.state_bytes * share // max(found.trainable, 1)


ENGINES = {
    "one": Engine("one device", _one, False, lambda psi, gpus: 0.0),
    "ddp": Engine("DDP", _ddp, False, lambda psi, gpus: 2 * FULL * psi * (gpus - 1) / gpus),
    "zero2": Engine("ZeRO-2", _zero2, True, lambda psi, gpus: 2 * HALF * psi * (gpus - 1) / gpus),
    "zero3": Engine("ZeRO-3", _zero3, True, lambda psi, gpus: 3 * HALF * psi * (gpus - 1) / gpus),
    "fsdp": Engine("FSDP", _fsdp, True, lambda psi, gpus: (2 * HALF + FULL) * psi * (gpus - 1) / gpus),
}


def peaks(found: Rehearsal, engine: str, gpus: int) -> dict[str, Parts]:
    """phase -> part -> bytes on each GPU."""
    share = ENGINES[engine].share
    return {
        phase: {part: size for part, size in share(found, phase, gpus).items() if size > 0} for phase in found.peaks
    }
