"""What a step takes on each of several GPUs: the step of one, its parts copied or sharded.  (no torch)

Psi is the number of trained parameters, N of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reeltune.estimate.result import StepEstimate

Parts = dict[str, int]
OF_A_NETWORK = ("weights", "masters", "still", "optimizer", "average")  # between two steps
FULL = 4  # bytes of a number in fp32; those that compute have step.number_bytes
BUCKET = 500_000_000  # numbers: reduce_bucket_size and allgather_bucket_size (deepspeed.ai/docs/config-json)
LIVE = 1_000_000_000  # numbers: stage3_max_live_parameters, of the same page


@dataclass(frozen=True)
class Engine:
    """How parts of a step on one GPU become parts of a step on each of N."""

    words: str
    share: Callable[[StepEstimate, str, int], Parts]
    """(step, phase, N) -> parts at the fullest moment of the phase."""
    own_copies: bool
    """The network computes with copies of its own in the run's precision, not under autocast."""
    offloaded: tuple[str, ...] = ()
    """Parts that `offload` keeps in the machine's own memory."""


def _one(step: StepEstimate, phase: str, gpus: int) -> Parts:
    return dict(step.peaks[phase])


def _ddp(step: StepEstimate, phase: str, gpus: int) -> Parts:
    """Gradients are copied into buckets that are exchanged (torch/csrc/distributed/c10d/reducer.cpp)."""
    return {**step.peaks[phase], "buckets": step.peaks[phase]["weights"]}


def _zero2(step: StepEstimate, phase: str, gpus: int) -> Parts:
    """bf16 weights whole; fp32 copies, state and gradients sharded (https://arxiv.org/abs/1910.02054, section 5)."""
    share = -(-step.trainable // gpus)
    parts = _computed_in_copies(step, phase)
    parts |= {"masters": FULL * share, "optimizer": _state(step, share), "gradients": FULL * share}
    if phase == "step":
        parts["gradients"] += FULL * share  # once more, in one piece
    parts["buckets"] = step.number_bytes * BUCKET  # whole, however small the network (stage_1_and_2.py, setup_buckets)
    return parts


def _zero3(step: StepEstimate, phase: str, gpus: int) -> Parts:
    """ZeRO-2's parts, with the weights sharded too: whole only where they are at work, up to
    stage3_max_live_parameters."""
    parts = _zero2(step, phase, gpus)
    whole = parts["weights"]
    parts["weights"] = -(-whole // gpus)
    parts["still"] = _still(step, parts, gpus)
    parts["gathered"] = _gathered(step, min(LIVE, step.parameters)) if phase != "encode" else 0
    return parts


def _fsdp(step: StepEstimate, phase: str, gpus: int) -> Parts:
    """fp32 weights, gradients and state sharded. Whole are two blocks of bf16 weights, as one computes while the
    next is gathered; what is in no block, in fp32; and a block's gradients in bf16 and, to be added up, in fp32
    (docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)."""
    share = -(-step.trainable // gpus)
    parts = _computed_in_copies(step, phase)
    parts["weights"], parts["still"] = FULL * share, _still(step, parts, gpus)
    parts["optimizer"] = _state(step, share)
    if phase != "encode":
        parts["gathered"] = 2 * step.block_bytes + FULL * step.other_parameters
    if phase in ("backward", "step"):
        parts["gradients"] = FULL * share
    if phase == "backward":
        parts["gathered"] += (step.number_bytes + FULL) * step.block_parameters * step.trainable // step.parameters
    return parts


def _fsdp_gathered(step: StepEstimate, phase: str, gpus: int) -> Parts:
    """FSDP's parts with keep_gathered: all blocks stay whole from forward to backward pass."""
    parts = _fsdp(step, phase, gpus)
    if phase in ("forward", "backward"):
        in_blocks = step.parameters - step.other_parameters
        parts["gathered"] += _gathered(step, in_blocks - 2 * step.block_parameters)
    return parts


def _computed_in_copies(step: StepEstimate, phase: str) -> Parts:
    """The phase's parts; of weights kept in fp32, the copies that compute."""
    parts = dict(step.peaks[phase])
    parts["weights"] = step.number_bytes * step.trainable
    parts.pop("gradients", None)
    return parts


def _still(step: StepEstimate, parts: Parts, gpus: int) -> int:
    """A process's share of what does not learn."""
    whole = parts.get("still", 0)
    copied = min(step.buffer_bytes, whole)
    return copied + -(-(whole - copied) // gpus)


def _gathered(step: StepEstimate, parameters: int) -> int:
    """Bytes of so many of the blocks' parameters."""
    return step.block_bytes * parameters // max(step.block_parameters, 1)


def _state(step: StepEstimate, share: int) -> int:
    return step.state_bytes * share // max(step.trainable, 1)


ENGINES = {
    "one": Engine("one device", _one, own_copies=False),
    "ddp": Engine("DDP", _ddp, own_copies=False),
    "zero2": Engine("ZeRO-2", _zero2, own_copies=True, offloaded=("masters", "optimizer", "gradients")),
    "zero3": Engine("ZeRO-3", _zero3, own_copies=True, offloaded=("masters", "optimizer", "gradients")),
    "fsdp": Engine("FSDP", _fsdp, own_copies=True, offloaded=("weights", "still", "optimizer", "gradients")),
}


def resting(step: StepEstimate, engine: str, gpus: int, *, offload: bool = False) -> tuple[int, int]:
    """What a network of the same sizes takes while it is not its turn, where two learn in one run: (bytes on each GPU,
    bytes that each process has in the machine's own memory).

    What is sharded stays where it is. What is not waits in the machine's memory, where the one whose turn it is keeps
    its place, too; DDP's buckets stay.
    """
    kind, phase = ENGINES[engine], next(iter(step.peaks))
    parts = kind.share(step, phase, gpus)
    network = sum(parts.get(part, 0) for part in OF_A_NETWORK)
    if not kind.own_copies:
        return parts.get("buckets", 0), 2 * network + step.swapped_bytes
    away = sum(parts.get(part, 0) for part in OF_A_NETWORK if offload and part in kind.offloaded)
    return network - away, away


def peaks(
    step: StepEstimate, engine: str, gpus: int, *, offload: bool = False, keep_gathered: bool = False
) -> tuple[dict[str, Parts], int]:
    """(phase -> part -> bytes on each GPU, bytes that each process keeps in the machine's own memory)."""
    kind = ENGINES[engine]
    share = _fsdp_gathered if engine == "fsdp" and keep_gathered else kind.share
    all_parts = {phase: share(step, phase, gpus) for phase in step.peaks}
    kept = kind.offloaded if offload else ()
    host = max(sum(parts.get(part, 0) for part in kept) for parts in all_parts.values())
    return {
        phase: {part: size for part, size in parts.items() if size > 0 and part not in kept}
        for phase, parts in all_parts.items()
    }, host
