"""What a block keeps of its forward pass where it recomputes the rest in the backward pass.

Names are values of the recipe's `gradient_checkpointing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from reeltune.memory import attention
from reeltune.memory.blocks import Contexts

aten = torch.ops.aten
PRODUCTS = (  # that layers with weights become; bmm where a linear layer is given a part of each clip's tokens
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.convolution.default,
)
THIN = 8  # outputs for each number summed over


def attention_kept() -> Contexts:
    """What attention gave.

    Attention over fewer keys than queries, such as of a clip to a caption, is recomputed like the rest: its output is
    as large as that of attention within the clip, and its arithmetic a small part.
    """
    return create_selective_checkpoint_contexts(_attention)


def products_kept() -> Contexts:
    """What attention gave, as above, and what the layers with weights gave: linear ones and convolutions.

    A thin product is recomputed like the rest: one over so few numbers that its outputs cost no more than a sum, such
    as that of the second of an adapter's two matrices, whose output is as large as its layer's.
    """
    return create_selective_checkpoint_contexts(_products)


KEPT: dict[str, Callable[[], Contexts]] = {contexts.__name__: contexts for contexts in (attention_kept, products_kept)}


def _attention(_: Any, operator: Any, *given: Any, **__: Any) -> CheckpointPolicy:
    return _policy(_is_long_attention(operator, given))


def _products(_: Any, operator: Any, *given: Any, **__: Any) -> CheckpointPolicy:
    return _policy(_is_long_attention(operator, given) or (operator in PRODUCTS and not _is_thin(operator, given)))


def _policy(keep: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _is_long_attention(operator: Any, given: tuple[Any, ...]) -> bool:
    """given: query, key and value first, each B heads L D, if it is attention."""
    return operator in attention.OPERATORS and given[1].shape[-2] >= given[0].shape[-2]


def _is_thin(operator: Any, given: tuple[Any, ...]) -> bool:
    """given: of a product, its factors, after what is added to it; of a convolution the kernels second."""
    if operator is aten.convolution.default:
        outputs, *summed = given[1].shape
        return THIN * math.prod(summed) < outputs
    *_, summed, outputs = given[-1].shape
    return THIN * summed < outputs
