"""Which kernel computes blocks' attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from reeltune.core.errors import UserError

aten = torch.ops.aten
OPERATORS = (  # that attention becomes by each kernel but `math`, which is many
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)
AUTO = "auto"
MATH = "math"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    MATH: SDPBackend.MATH,
}
CANDIDATES = {"cpu": ("flash",), "cuda": ("flash", "cudnn", "efficient")}
"""Device -> those that AUTO may find there: all that keep no matrix of scores. Where none is sooner, the first."""
NO_KERNEL = ("No available kernel", "No viable backend")  # as torch says it of a GPU and of a CPU
TRIED = (1, 1, 64, 64)  # B heads L D that every kernel can do, if it can do anything there


def refuse_missing(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError if torch cannot compute attention so on that device, nor its gradients. kernel: AUTO, or of
    KERNELS."""
    if kernel == AUTO:
        return
    with _only(kernel, f"on {device.type} in {_name(dtype)}"), warnings.catch_warnings(action="ignore"):
        query = torch.zeros(TRIED, device=device, dtype=dtype, requires_grad=True)
        scaled_dot_product_attention(query, query, query).sum().backward()


def notices(kernel: str) -> list[str]:
    return [] if kernel == AUTO else [f"the network's attention is computed by torch's kernel {kernel}, and no other"]


def in_order(kernel: str, others: Sequence[str]) -> list[str]:
    """The kernels that are asked one after the other: that one, then the others, and `math`, which can do anything."""
    return list(dict.fromkeys((kernel, *others, MATH))) if kernel != MATH else [MATH]


@contextmanager
def preferring(kernels: Sequence[str]) -> Iterator[None]:
    """Attention is computed by the first of these that can do what is asked, and by no others."""
    with sdpa_kernel([KERNELS[kernel] for kernel in kernels], set_priority=True):
        yield


class Attention:
    """Sets the kernel of attention in these blocks, and again where they recompute: this comes before `recompute`.

    torch's choice is of the whole process: meanwhile no other thread may compute attention.

    kernel: of KERNELS, and no other is taken; or AUTO, as torch chooses, until `prefer` says otherwise.
    """

    def __init__(self, blocks: Sequence[nn.Module], kernel: str):
        asks = "for what this network asks of it, such as a mask or the width of its heads"
        self._within = nullcontext if kernel == AUTO else partial(_only, kernel, asks)
        self.blocks = list(blocks)  # whose classes have other names once they are sharded
        for block in blocks:
            block.forward = partial(self._forward, block.forward)

    def prefer(self, kernels: Sequence[str]) -> None:
        """Has a block's attention computed by the first of these kernels that can do what it asks, from here on."""
        self._within = partial(preferring, kernels)

    def _forward(self, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        with self._within():
            return forward(*given, **named)


@contextmanager
def _only(kernel: str, where: str) -> Iterator[None]:
    with sdpa_kernel(KERNELS[kernel]):
        try:
            yield
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_KERNEL):
                raise
            raise UserError(
                "recipe",
                f"attention is {kernel}, a kernel that torch {torch.__version__} does not have {where}; use another, "
                "or auto",
            ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
