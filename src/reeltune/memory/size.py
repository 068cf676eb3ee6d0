"""How many bytes tensors take."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves


def size_bytes(tree: Any) -> int:
    """Bytes of all tensors in a tree (lists, tuples, dicts), of a sharded one this process's share; nothing else has
    any."""
    here = (leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in tree_leaves(tree))
    return sum(leaf.numel() * leaf.element_size() for leaf in here if isinstance(leaf, Tensor))
