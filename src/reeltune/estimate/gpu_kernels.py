"""What a GPU computes by other operators than a CPU, in a step that is rehearsed on fake tensors of the CPU.

These tensors have no values, so that room is all there is to an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def compute_as_gpu(net: nn.Module) -> None:
    """Has the network's norms make and keep for the backward pass what those of a GPU do."""
    for norm in net.modules():
        if isinstance(norm, nn.RMSNorm):
            norm.forward = partial(_rms_norm, norm, norm.forward)
        elif isinstance(norm, nn.LayerNorm) and type(norm).forward is nn.LayerNorm.forward:
            norm.forward = partial(_layer_norm, norm, norm.forward)


def step_as_gpu(optimizer: Any) -> None:
    """Has AdamW step by its fused kernel, as on a GPU (`build_optimizer`): it makes nothing beside its state."""
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True


def _layer_norm(norm: nn.LayerNorm, plain: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Under a GPU's autocast it is computed in fp32, under a CPU's as it comes
    (https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32")."""
    if not torch.is_autocast_enabled("cpu"):
        return plain(input)
    weight, bias = (None if given is None else given.float() for given in (norm.weight, norm.bias))
    return F.layer_norm(input.float(), norm.normalized_shape, weight, bias, norm.eps)


def _rms_norm(norm: nn.RMSNorm, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of weights in another precision torch has no kernel (aten/src/ATen/native/layer_norm.cpp, rms_norm_symint).
    Families compute it outside of autocast (wan_fun/net.py, UncastRMSNorm)."""
    if norm.weight is not None and norm.weight.dtype != x.dtype:
        return plain(x)
    return _FusedRMSNorm.apply(x, norm.weight, len(norm.normalized_shape))  # pyright: ignore[reportReturnType]


class _FusedRMSNorm(torch.autograd.Function):
    """aten::_fused_rms_norm, which a CPU takes apart: it keeps what it was given and, of each vector that it
    normalises, a number in fp32 (tools/autograd/derivatives.yaml). A CPU keeps copies in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> Tensor:
        roots = x.new_empty((*x.shape[:-dims], *[1] * dims), dtype=torch.float32)
        ctx.save_for_backward(x, weight, roots)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, _ = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        return torch.empty_like(x) if of_x else None, torch.empty_like(weight) if of_weight else None, None
