"""What an adapter is, whichever tool wrote it: low-rank changes of linear layers, and whole weights beside them.

Names are the released ones, of modules ("blocks.0.self_attn.q") and of parameters ("patch_embedding.weight").
Letters: I inputs, O outputs of a layer, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The change of one linear layer: scale * B @ A (https://arxiv.org/abs/2106.09685, section 4.1)."""

    A_RI: Tensor
    B_OR: Tensor
    alpha: float
    rank_stabilised: bool = False
    """The scale is alpha / sqrt(rank), not alpha / rank (https://arxiv.org/abs/2312.03732)."""
    magnitude_O: Tensor | None = None
    """DoRA's: the weight is magnitude * (W + change) / norm of its rows (https://arxiv.org/abs/2402.09353). None: no
    DoRA."""

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def changed(self, weight_OI: Tensor, strength: float = 1.0) -> Tensor:
        """The layer's weight with `strength` times the change in it, computed in fp32, in the type of `weight_OI`.

        Of DoRA the change is that of direction and magnitude together, so that strength 0 is always the weight itself.
        """
        A_RI, B_OR = (one.to(weight_OI.device, torch.float32) for one in (self.A_RI, self.B_OR))
        if self.magnitude_O is None:
            return (weight_OI.float() + strength * self.scale * (B_OR @ A_RI)).to(weight_OI.dtype)
        new_OI = weight_OI.float() + self.scale * (B_OR @ A_RI)
        new_OI = new_OI * (self.magnitude_O.to(new_OI) / new_OI.norm(dim=1))[:, None]
        return torch.lerp(weight_OI.float(), new_OI, strength).to(weight_OI.dtype)


@dataclass(frozen=True)
class Adapter:
    layers: dict[str, LowRank] = field(default_factory=dict)
    """Low-rank changes, by the released name of the layer's module."""
    whole: dict[str, Tensor] = field(default_factory=dict)
    """Weights that were trained in full, as they are now, by released parameter name."""
    changes: dict[str, Tensor] = field(default_factory=dict)
    """The same where a file has their change alone: to be added to the base's weight."""
    about: dict[str, Any] = field(default_factory=dict)
    """What its file says of it: base model, family, steps, trigger words and the like."""
