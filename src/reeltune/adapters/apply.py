"""Adapters put into a network's weights: one or several, each at its strength.

Every adapter's change is that of the base's weight, and changes add up, so that none depends on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import few
from reeltune.memory.quantized import QuantizedLinear

Strengths = Sequence[tuple[Adapter, float]]  # 1: as it was trained; 0: not at all
PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # types of weights that can be changed


def touched(adapter: Adapter) -> set[str]:
    """Released names of the parameters that it changes."""
    return {f"{layer}.weight" for layer in adapter.layers} | adapter.whole.keys() | adapter.changes.keys()


def check(adapter: Adapter, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Whether an adapter fits a network. shapes: the parameters', by released name.

    Raises UserError that names what of the adapter the network lacks, or has in another shape.
    """
    found = {f"{layer}.weight": _shapes(low_rank) for layer, low_rank in adapter.layers.items()}
    found |= {name: [tuple(tensor.shape)] for kind in (adapter.whole, adapter.changes) for name, tensor in kind.items()}
    missing = [f"{name} is not in the network" for name in sorted(found) if name not in shapes]
    misshapen = [
        f"{name} is {_by(shape)} in it, and {_by(shapes[name])} in the network"
        for name in sorted(found)
        for shape in found[name]
        if name in shapes and shape != tuple(shapes[name])
    ]
    problems = [*few(missing), *few(misshapen)]
    if 2 * (len(missing) + len(misshapen)) > len(found):
        problems.insert(0, "most of it does not fit: it was made for another model or size; give that model")
    refuse(where, problems)


def _shapes(low_rank: LowRank) -> list[tuple[int, ...]]:
    """The changed weight's shape, as each tensor of the change implies it."""
    outputs, inputs = low_rank.B_OR.shape[0], low_rank.A_RI.shape[1]
    magnitude_O = low_rank.magnitude_O
    return [(outputs, inputs), *([] if magnitude_O is None else [(magnitude_O.numel(), inputs)])]


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "one number"


def merged(name: str, weight: Tensor, adapters: Strengths) -> Tensor:
    """The weight of that released name with the adapters in it, in fp32; of strength 0 none is."""
    base = weight.float()
    new = base
    for adapter, strength in adapters:
        changed = _changed(name, base, adapter, strength) if strength else base
        if changed is not base:
            new = changed if new is base else changed + (new - base)
    return new


def _changed(name: str, base: Tensor, adapter: Adapter, strength: float) -> Tensor:
    """`base` itself where the adapter does not change it."""
    new = base
    if name in adapter.whole:
        new = torch.lerp(base, adapter.whole[name].to(base), strength)
    if name in adapter.changes:
        new = new + strength * adapter.changes[name].to(base)
    layer = adapter.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    return new if layer is None else layer.changed(new, strength)


def parameters_of(net: nn.Module, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The network's parameters by released name; of quantised ones an outline, of the shape that they stand for.

    names: ours -> released.
    """
    found: dict[str, Tensor] = {names[name]: weight for name, weight in net.named_parameters()}
    for name, layer in _quantised(net, names).items():
        found[name] = torch.empty(layer.out_features, layer.in_features, device="meta")
    return found


def _quantised(net: nn.Module, names: Mapping[str, str]) -> dict[str, QuantizedLinear]:
    """The network's quantised layers, by the released name of the weight."""
    layers = {name: module for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}
    return {names[f"{name}.weight"]: layer for name, layer in layers.items()}


def merge(net: nn.Module, names: Mapping[str, str], adapters: Strengths) -> None:
    """Puts adapters into the network's weights, in place: computed in fp32, rounded once to each weight's own type.

    names: of its parameters, ours -> released. `check` is to be called before. Raises UserError for quantised weights.
    """
    _merge(_changing(net, names, adapters), adapters)


@torch.no_grad()
def _merge(weights: Mapping[str, Tensor], adapters: Strengths) -> None:
    refuse_quantised(weights)
    for name, weight in weights.items():
        weight.copy_(merged(name, weight, adapters))


@contextmanager
def applied(net: nn.Module, names: Mapping[str, str], adapters: Strengths, *, keep: bool = True) -> Iterator[None]:
    """Within, the network answers with the adapters: they are in its weights, and into quantised ones they are put at
    each use, when these are lifted to fp32.

    keep: afterwards it has its own bits again, which wait in the CPU's memory.
    """
    chosen, coarse = _changing(net, names, adapters), _quantised(net, names)
    plain = {name: weight for name, weight in chosen.items() if name not in coarse}
    kept = {name: weight.detach().to("cpu", copy=True) for name, weight in plain.items() if keep}
    try:
        _merge(plain, adapters)
        for name in chosen.keys() & coarse.keys():
            coarse[name].forward = partial(_forward, coarse[name], name, adapters)
        yield
    finally:
        for name in chosen.keys() & coarse.keys():
            coarse[name].__dict__.pop("forward", None)
        with torch.no_grad():
            for name, own in kept.items():
                plain[name].copy_(own)


def _forward(layer: QuantizedLinear, name: str, adapters: Strengths, input: Tensor) -> Tensor:
    """The forward pass of a quantised layer, with adapters merged into its dequantised weight."""
    place = input.device.type
    dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else input.dtype
    weight_OI = merged(name, layer.dequantized(torch.float32), adapters).to(dtype)
    return F.linear(input.to(dtype), weight_OI, None if layer.bias is None else layer.bias.to(dtype))


def _changing(net: nn.Module, names: Mapping[str, str], adapters: Strengths) -> dict[str, nn.Parameter]:
    """Released name -> the parameters that are changed."""
    wanted = {name for adapter, strength in adapters if strength for name in touched(adapter)}
    return {names[ours]: weight for ours, weight in net.named_parameters() if names[ours] in wanted}


def refuse_quantised(weights: Mapping[str, Tensor]) -> None:
    """Raises UserError for weights of a type into which no change can be merged."""
    coarse = {str(weight.dtype).removeprefix("torch.") for weight in weights.values() if weight.dtype not in PLAIN}
    if coarse:
        kept = " and ".join(sorted(coarse))
        raise UserError(
            "adapters",
            f"the network's weights are kept as {kept}, which has no room for a change; merge into the model in bf16, "
            "fp16 or fp32: leave base_weights out",
        )
