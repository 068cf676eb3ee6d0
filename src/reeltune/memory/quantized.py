"""Frozen linear layers whose weights are kept in 8 or 4 bits, and computed with in the precision of the rest.

Letters: I inputs, O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from reeltune.core.errors import UserError

MOST = {"fp8": 448.0, "int8": 127.0}  # greatest number of each: of e4m3 by https://arxiv.org/abs/2209.05433, table 1
NF4_BLOCK = 64  # weights that share a scale (https://arxiv.org/abs/2305.14314, section 3)
CHUNK = 2**22  # weights that are lifted to fp32 at a time


@dataclass(frozen=True)
class Quantisation:
    """Which linear layers are quantised, and how."""

    kind: str
    """fp8 (e4m3) or int8, with a scale for each output; or nf4, with one for each NF4_BLOCK weights."""
    blocks: tuple[str, ...]
    """Class names of the modules whose linear layers are meant, but for those in norms, which modulate."""


class QuantizedLinear(nn.Linear):
    """F.linear(x, the weights as they were rounded, bias), which learns nothing but, if asked, its bias.

    `weight` has the bits as integers, whatever the kind, and so has the buffer of their scales, which no state dict
    has: what casts a module's floats leaves both alone. The weights in full are there only while they are multiplied
    with.
    """

    scale_bits: Tensor | None

    def __init__(self, plain: nn.Linear, kind: str):
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.kind, self.bias = kind, plain.bias
        self.register_buffer("scale_bits", None, persistent=False)
        self.weight = nn.Parameter(self.pack(self.weight.detach(), "meta"), requires_grad=False)

    def pack(self, weight_OI: Tensor, device: torch.device | str) -> Tensor:
        """What `weight` is to be for these weights, on the device; their scales are kept there.

        It is made where they are: on the CPU, so that all devices have the same bits.
        """
        if weight_OI.is_meta or isinstance(weight_OI, FakeTensor):
            packed, scale = _room(weight_OI, self.kind)
        else:
            packed, scale = _nf4(weight_OI) if self.kind == "nf4" else _eight_bits(weight_OI, self.kind)
        self.scale_bits = scale.view(torch.int32).to(device)
        return packed.to(device)

    @property
    def scale(self) -> Tensor:
        """fp32: of each output, or in nf4 of each block of weights."""
        assert self.scale_bits is not None
        return self.scale_bits.view(torch.float32)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights as they were rounded, OI."""
        return _dequantized(self.weight, self.scale, self.kind, (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:
        place = input.device.type
        dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        shape_OI = self.out_features, self.in_features
        return _Linear.apply(input.to(dtype), self.weight, self.scale, bias, self.kind, shape_OI)  # type: ignore

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class _Linear(torch.autograd.Function):
    """The backward pass dequantises again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, kind: str, shape_OI: Any):
        ctx.save_for_backward(weight, scale)
        ctx.kind, ctx.shape_OI = kind, shape_OI
        return F.linear(x, _dequantized(weight, scale, kind, shape_OI, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        weight, scale = ctx.saved_tensors
        needs_x, _, _, needs_bias, *_ = ctx.needs_input_grad
        of_x = grad @ _dequantized(weight, scale, ctx.kind, ctx.shape_OI, grad.dtype) if needs_x else None
        of_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return of_x, None, None, of_bias, None, None


def quantize_linears(net: nn.Module, how: Quantisation) -> dict[str, QuantizedLinear]:
    """Puts QuantizedLinears, empty, in the place of the linear layers meant; by the names of their weights.

    Raises UserError for nf4 without its library.
    """
    if how.kind == "nf4":
        _bitsandbytes()
    blocks = [(name, module) for name, module in net.named_modules() if type(module).__name__ in how.blocks]
    meant = [one for name, block in blocks for one in _linears(block, name)]
    layers = {}
    for name, parent, child in meant:
        layers[f"{name}.weight"] = layer = QuantizedLinear(getattr(parent, child), how.kind)
        setattr(parent, child, layer)
    return layers


def _linears(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """(its name, the module that has it, its name there)"""
    for child, inner in module.named_children():
        if isinstance(inner, nn.Linear):
            yield f"{name}.{child}", module, child
        elif "Norm" not in type(inner).__name__:
            yield from _linears(inner, f"{name}.{child}")


# ---- numbers


def _room(weight_OI: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Room for both: what a meta or fake tensor makes, which has no values to round."""
    if kind == "nf4":
        pairs, blocks = (-(-weight_OI.numel() // size) for size in (2, NF4_BLOCK))
        return weight_OI.new_empty(pairs, dtype=torch.uint8), weight_OI.new_empty(blocks, dtype=torch.float32)
    packed = weight_OI.new_empty(weight_OI.shape, dtype=torch.int8 if kind == "int8" else torch.uint8)
    return packed, weight_OI.new_empty(len(weight_OI), dtype=torch.float32)


def _eight_bits(weight_OI: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(integers OI, scale_O fp32): weight = number * scale, the greatest of each output at the type's greatest.

    Scales are rounded up to what bf16 can hold: numbers, of 4 or 7 significant bits, times scales are then rounded but
    once, in bf16 as in fp32.
    """
    packed, scale_O = _room(weight_OI, kind)
    rows = max(1, CHUNK // weight_OI.shape[1])
    for start in range(0, len(weight_OI), rows):
        part_OI = weight_OI[start : start + rows].float()
        least_O = part_OI.abs().amax(1) / MOST[kind]
        bits_O = (least_O.view(torch.int32) + 0xFFFF) >> 16 << 16
        some_O = bits_O.view(torch.float32).clamp(min=torch.finfo(torch.bfloat16).tiny)  # an output may be all 0
        scaled_OI = part_OI / some_O[:, None]
        rounded = scaled_OI.round_().to(torch.int8) if kind == "int8" else scaled_OI.to(torch.float8_e4m3fn)
        packed[start : start + rows] = rounded.view(packed.dtype)
        scale_O[start : start + rows] = some_O
    return packed, scale_O


def _nf4(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes of two numbers each, the greatest of each block in fp32)"""
    library = _bitsandbytes()
    parts = [
        library.quantize_4bit(part.float(), blocksize=NF4_BLOCK, quant_type="nf4")
        for part in weight_OI.reshape(-1).split(CHUNK)
    ]
    return torch.cat([packed.flatten() for packed, _ in parts]), torch.cat([state.absmax for _, state in parts])


def _dequantized(weight: Tensor, scale: Tensor, kind: str, shape_OI: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if kind == "nf4":
        library, count = _bitsandbytes(), shape_OI[0] * shape_OI[1]
        # As rows of one block, for of rows with other lengths its CPU kernel mixes up the scales (0.50.2, 2026-11-26).
        rows = torch.Size((count,) if count % NF4_BLOCK else (count // NF4_BLOCK, NF4_BLOCK))
        state = library.QuantState(scale, rows, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
        return library.dequantize_4bit(weight, state).view(shape_OI)
    wide = torch.float32 if dtype == torch.float16 else dtype  # fp16 has not the range of the scales
    numbers = weight if kind == "int8" else weight.view(torch.float8_e4m3fn)
    return numbers.to(wide).mul_(scale[:, None].to(wide)).to(dtype)


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as missing:
        raise UserError(
            "recipe", "base_weights is nf4, which needs bitsandbytes; pip install 'reeltune[eight-bit]', or use int8"
        ) from missing
    return functional
