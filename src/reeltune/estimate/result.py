"""What a step takes: its parts, and when.  (no torch)"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = {  # part -> what it is, in the order in which it is told
    "weights": "trained weights",
    "masters": "fp32 copies of them",
    "still": "weights that do not learn",
    "gathered": "weights gathered to compute",
    "gradients": "gradients",
    "buckets": "gradients being exchanged",
    "optimizer": "optimizer state",
    "average": "moving average",
    "other": "the other expert, whose turn it is not",
    "frozen": "frozen networks",
    "batch": "batch and conditions",
    "casts": "weights in another precision",
    "activations": "activations kept",
    "encode": "at work: encoding",
    "forward": "at work: forward pass",
    "backward": "at work: backward pass",
    "step": "at work: optimizer",
    "preview": "at work: preview",
}
PHASES = {
    "encode": "encoding",
    "forward": "forward pass",
    "backward": "backward pass",
    "step": "optimizer's step",
    "preview": "preview",
}


@dataclass(frozen=True)
class StepEstimate:
    """What one step of one process on one device takes, at the shape it was given."""

    peaks: dict[str, dict[str, int]]
    """phase -> part -> bytes at the fullest moment of the phase."""
    flops: dict[str, int]
    """phase -> FLOPs of a micro-step; a preview's are of one denoising pass and decoding."""
    resident: dict[str, int]
    """part -> bytes that are there in every phase."""
    saved_bytes: int
    """Activations kept for the backward pass, when it begins."""
    offloaded_bytes: int
    """Activations that wait in the machine's own memory."""
    swapped_bytes: int
    """Weights of swapped blocks, which wait there too."""
    gradient_bytes: int
    parameters: int
    trainable: int
    """Parameters that learn."""
    number_bytes: int
    """Bytes of a number in the precision in which the network computes."""
    weight_bytes: dict[str, int]
    """name -> bytes of the trained network ("network") and of each frozen one."""
    kept_bytes: int
    """Weights in a checkpoint."""
    block_parameters: int
    """Parameters of the largest block, which an engine that shards gathers whole."""
    blocks: int
    still_blocks: int
    """Blocks with weights that do not learn, which can wait on the host."""
    block_bytes: int
    """Bytes of that block once gathered: in the precision that computes, but for weights in 8 or 4 bits."""
    other_parameters: int
    """Parameters outside of blocks."""
    buffer_bytes: int
    """Bytes of buffers, such as scales of weights in 8 or 4 bits, which are never sharded: each process has all."""
    encoded_bytes: int = 0
    """Bytes that encoding makes of one sample, in float32."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return self.resident["optimizer"]

    @property
    def passes(self) -> dict[str, int]:
        """phase -> FLOPs, for the phases that each micro-step has."""
        return {phase: self.flops.get(phase, 0) for phase in ("encode", "forward", "backward")}
