"""PiSSA (https://arxiv.org/abs/2404.02948): adapters that begin as the principal part of their layers' weights.

There a pair B A begins as the weight's largest singular directions B0 A0, which are taken out of the base. Here the
base keeps its bits, and the change is what the pair has gained. With A = A0 + a and B = B0 + b, of which a and b learn,

    B A - B0 A0 = B0 a + b A = [B0 b] [a; A],

which is an adapter of twice the rank: in training, in files and in every tool. Its gradients are the paper's. Nothing
is subtracted from what is near it, so no digits are lost, and while a and b are 0 the change is 0 to the last bit.

Of a base in 8 or 4 bits the principal part is taken out before the rest is rounded (QPiSSA, the same paper), and the
layer adds it: [B0 B0 b] [A0; a; A].
Letters: I inputs, O outputs of a layer, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.adapters.adapter import LowRank
from reeltune.adapters.factors import ITERATIONS, factors
from reeltune.memory.quantized import CHUNK, QuantizedLinear

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

START_A, START_B = "lora_A.start", "lora_B.start"  # behind a released layer's name: A0 and B0, which do not learn


class Gained(nn.Module):
    """What stands in the place of PEFT's linear layer: `weight` learns and begins at 0, `start` does not learn."""

    def __init__(self, like: Tensor, start_dtype: torch.dtype, *, adds_start: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(like))
        self.start = nn.Parameter(torch.zeros_like(like, dtype=start_dtype), requires_grad=False)
        self.adds_start = adds_start


class GainedA(Gained):
    def forward(self, x: Tensor) -> Tensor:
        whole = widened_in(self.start, self.weight)
        return F.linear(x, torch.cat([self.start.to(whole), whole]) if self.adds_start else whole)


class GainedB(Gained):
    def forward(self, x: Tensor) -> Tensor:
        whole = widened_out(self.start, self.weight)
        return F.linear(x, torch.cat([self.start.to(whole), whole], 1) if self.adds_start else whole)


def widened_in(start_RI: Tensor, gained_RI: Tensor) -> Tensor:
    """[a; A], of 2 R rows."""
    return torch.cat([gained_RI, start_RI.to(gained_RI) + gained_RI])


def widened_out(start_OR: Tensor, gained_OR: Tensor) -> Tensor:
    """[B0 b], of 2 R columns."""
    return torch.cat([start_OR.to(gained_OR), gained_OR], 1)


def change_of(start_A: Tensor, start_B: Tensor, gained: LowRank) -> LowRank:
    """The change that the layer applies. gained: a and b, with the pair's alpha."""
    return LowRank(widened_in(start_A, gained.A_RI), widened_out(start_B, gained.B_OR), 2 * gained.alpha)


def put_gained(layer: LoraLayer, slot: str, start_dtype: torch.dtype) -> None:
    """Puts the parts that PiSSA trains into PEFT's layer, in the place of its pair."""
    coarse = isinstance(layer.get_base_layer(), QuantizedLinear)
    layer.lora_A[slot] = GainedA(cast("nn.Linear", layer.lora_A[slot]).weight, start_dtype, adds_start=coarse)
    layer.lora_B[slot] = GainedB(cast("nn.Linear", layer.lora_B[slot]).weight, start_dtype, adds_start=coarse)


def starts_of(layer: LoraLayer, slot: str) -> tuple[nn.Parameter, nn.Parameter]:
    """(A0, B0)"""
    return cast("Gained", layer.lora_A[slot]).start, cast("Gained", layer.lora_B[slot]).start


def is_start(released: str) -> bool:
    """Whether that is the name of a part of an adapter that does not learn."""
    return released.endswith((START_A, START_B))


def without(weight_OI: Tensor, A_RI: Tensor, B_OR: Tensor) -> Tensor:
    """weight - B A in fp32. In fp64 till then, some rows at a time: rounded once, it is the same on other machines but
    for a rare last bit."""
    rest_OI = torch.empty_like(weight_OI, dtype=torch.float32)
    rows = max(1, CHUNK // weight_OI.shape[1])
    for start in range(0, len(weight_OI), rows):
        some = slice(start, start + rows)
        rest_OI[some] = weight_OI[some].double() - B_OR[some].to(weight_OI.device) @ A_RI.to(weight_OI.device)
    return rest_OI


# ---- where they begin


def is_principal(how: str) -> bool:
    """Whether lora_init says that adapters begin so."""
    return how.startswith("pissa")


def iterations(how: str) -> int:
    """How many iterations "pissa" or "pissa_niter_N" asks for."""
    return int(how.rpartition("_")[2]) if "_niter_" in how else ITERATIONS


@torch.no_grad()
def find_starts(
    layers: Mapping[str, LoraLayer], slot: str, weight: Callable[[str], Tensor], names: Iterable[str], rounds: int
) -> None:
    """Puts the principal parts of the layers that are named into their pairs: scale * B0 A0, shared out evenly.

    weight: of a layer in full, by its released name, which seeds the random directions of a large one.
    """
    for name in names:
        layer, weight_OI = layers[name], weight(name)
        pair = factors(weight_OI.float(), layer.r[slot], name, iterations=rounds).low_rank(layer.r[slot])
        for start, half in zip(starts_of(layer, slot), (pair.A_RI, pair.B_OR), strict=True):
            start.copy_(half / layer.scaling[slot] ** 0.5)


@torch.no_grad()
def round_the_rest(layers: Mapping[str, LoraLayer], slot: str, weight: Callable[[str], Tensor]) -> None:
    """Bases in 8 or 4 bits without the principal parts, made of the weights in full."""
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if isinstance(base, QuantizedLinear):
            start_A, start_B = (start.detach().double() for start in starts_of(layer, slot))
            rest_OI = without(weight(name), start_A, layer.scaling[slot] * start_B)
            base.weight.data = base.pack(rest_OI.cpu(), base.weight.device)
