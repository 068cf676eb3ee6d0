"""Which kernel computes blocks' attention."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from reeltune.core.errors import UserError
from reeltune.memory import flash_4
from reeltune.memory.compiled import Compiled

aten = torch.ops.aten
OPERATORS = (  # that attention becomes by each kernel but `math`, which is many
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    flash_4.OPERATOR,
)
AUTO = "auto"
MATH = "math"
TORCHS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    MATH: SDPBackend.MATH,
}
KERNELS = (*TORCHS, flash_4.NAME)
CANDIDATES = {"cpu": ("flash",), "cuda": ("flash", "cudnn", "efficient")}
"""Device -> torch's that AUTO may find there: all that keep no matrix of scores. Where none is sooner, the first."""
NO_KERNEL = (flash_4.NONE, "No viable backend")  # as torch says it of a GPU and of a CPU
TRIED = (1, 1, 64, 64)  # B heads L D that every kernel can do, if it can do anything there


def candidates(device_type: str) -> tuple[str, ...]:
    """Kernels that AUTO may find on such a device: torch's, and FlashAttention 4 where it is installed."""
    is_there = device_type in flash_4.DEVICES and flash_4.installed() is not None
    return (*CANDIDATES[device_type], flash_4.NAME) if is_there else CANDIDATES[device_type]


def refuse_missing(kernel: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError if attention cannot be computed so on that device, nor its gradients. kernel: AUTO, or of
    KERNELS."""
    if kernel == AUTO:
        return
    if kernel == flash_4.NAME:
        flash_4.refuse_missing()
    with _only(kernel, f"on {device.type} in {_name(dtype)}"), warnings.catch_warnings(action="ignore"):
        query = torch.zeros(TRIED, device=device, dtype=dtype, requires_grad=True)
        scaled_dot_product_attention(query, query, query).sum().backward()


def notices(kernel: str) -> list[str]:
    whose = f"{_maker(kernel)}'s" if kernel == flash_4.NAME else "torch's"
    return [] if kernel == AUTO else [f"the network's attention is computed by {whose} kernel {kernel}, and no other"]


def in_order(kernel: str, others: Sequence[str]) -> list[str]:
    """The kernels that are asked one after the other: that one, then the others, and `math`, which can do anything."""
    return list(dict.fromkeys((kernel, *others, MATH))) if kernel != MATH else [MATH]


@contextmanager
def preferring(kernels: Sequence[str], *, compiled: bool = False) -> Iterator[None]:
    """Attention is computed by the first of these that can do what is asked, and by no others; by FlashAttention 4 if
    it is the first of all, unless what is compiled has it anyway."""
    torchs = [TORCHS[kernel] for kernel in kernels if kernel in TORCHS]
    own = kernels[0] == flash_4.NAME and not compiled
    first = flash_4.Preferred(others=bool(torchs)) if own else nullcontext()
    with first, sdpa_kernel(torchs, set_priority=True) if torchs else nullcontext():
        yield


class Attention:
    """Sets the kernel of attention in these blocks, and again where they recompute: this comes before `recompute`.

    A choice of torch's kernels is of the whole process: meanwhile no other thread may compute attention.

    kernel: of KERNELS, and no other is taken; or AUTO, as torch chooses, until `prefer` says otherwise. compiled: the
    blocks' passes where they are compiled.
    """

    def __init__(self, blocks: Sequence[nn.Module], kernel: str, compiled: Compiled | None = None):
        self._compiled = compiled
        self._within: Callable[..., AbstractContextManager] = _as_torch_chooses
        self.blocks = list(blocks)  # whose classes have other names once they are sharded
        if kernel != AUTO:
            asks = "for what this network asks of it, such as a mask or the width of its heads"
            self._take([kernel], partial(_only, kernel, asks))
        for block in blocks:
            block.forward = partial(self._forward, block.forward)

    def prefer(self, kernels: Sequence[str]) -> None:
        """Has a block's attention computed by the first of these kernels that can do what it asks, from here on."""
        self._take(kernels, partial(preferring, kernels))

    def _take(self, kernels: Sequence[str], within: Callable[..., AbstractContextManager]) -> None:
        self._within = within
        if self._compiled is not None:
            own = partial(flash_4.in_graph, others=len(kernels) > 1) if kernels[0] == flash_4.NAME else None
            self._compiled.change = own

    def _forward(self, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
        with self._within(compiled=self._compiled is not None and self._compiled.computes):
            return forward(*given, **named)


def _as_torch_chooses(*, compiled: bool) -> AbstractContextManager:
    return nullcontext()


@contextmanager
def _only(kernel: str, where: str, *, compiled: bool = False) -> Iterator[None]:
    with preferring([kernel], compiled=compiled):
        try:
            yield
        except (RuntimeError, UserError) as error:
            if (said := _no_kernel(error)) is None:
                raise
            reason = f" ({said})" if kernel == flash_4.NAME else ""  # torch's says none
            raise UserError(
                "recipe",
                f"attention is {kernel}, a kernel that {_maker(kernel)} does not have {where}{reason}; use another, or "
                "auto",
            ) from error


def _no_kernel(error: BaseException) -> str | None:
    """What an error says where there is no kernel; of one that tells what cannot be compiled, its cause."""
    said = str(error.__cause__ if isinstance(error, UserError) else error)
    begin = max(said.find(words) for words in NO_KERNEL)
    return None if begin < 0 else said[begin:].splitlines()[0]


def _maker(kernel: str) -> str:
    if kernel == flash_4.NAME:
        return f"{flash_4.PACKAGE} {flash_4.installed()}"
    return f"torch {torch.__version__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
