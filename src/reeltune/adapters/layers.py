"""Adapters in a network that trains: PEFT's layers around its linear ones, named and begun in our way."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from reeltune.adapters.adapter import Adapter
from reeltune.adapters.principal import put_gained
from reeltune.adapters.targets import Target, in_full
from reeltune.core.errors import refuse
from reeltune.core.imports import lean_imports
from reeltune.core.reading import few, grouped
from reeltune.core.rng import seed_of

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

SLOT = "default"  # PEFT's name of an adapter in a layer
KINDS = {  # PEFT's module in a layer -> what follows a released layer's name
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_magnitude_vector": "dora_scale",
}


def inject(
    net: nn.Module,
    targets: Sequence[Target],
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    rank_stabilised: bool = False,
    use_dora: bool = False,
    dropout: float = 0.0,
    start_dtype: torch.dtype | None = None,
) -> dict[str, str]:
    """Puts an adapter around each target, in place. Returns the names of all parameters as they are now, ours ->
    released, those of adapters among them ("blocks.0.self_attn.q.lora_A.weight").

    names: as they were. dtype: of adapters, which are not begun yet: B is zero.
    start_dtype: of what adapters of PiSSA begin with; None: they are none of PiSSA.
    """
    with lean_imports():
        from peft import LoraConfig, inject_adapter_in_model

    first, exact = targets[0], {target: f"^{re.escape(target.name)}$" for target in targets}
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # pyright: ignore[reportArgumentType] any number will do
        target_modules="|".join(re.escape(target.name) for target in targets),
        # Only of those that differ: PEFT tries every pattern of these on every layer.
        rank_pattern={name: target.rank for target, name in exact.items() if target.rank != first.rank},
        alpha_pattern={name: target.alpha for target, name in exact.items() if target.alpha != first.alpha},
        use_rslora=rank_stabilised,
        use_dora=use_dora,
        lora_dropout=dropout,
    )
    # Without values at first, which PEFT would draw three times over; DoRA's magnitudes are of values, though.
    inject_adapter_in_model(config, net, SLOT, low_cpu_mem_usage=not use_dora)
    released = {target.name: target.released for target in targets}
    for layer in adapted(net).values():
        layer.cast_input_dtype_enabled = False  # autocast does; a copy in fp32 would only cost memory
        base = cast("Tensor", layer.get_base_layer().weight)
        for kind in KINDS:
            for part in getattr(layer, kind).values():
                weight = part.weight.detach()
                zeros = base.new_zeros(weight.shape, dtype=dtype)
                part.weight = nn.Parameter(zeros if weight.is_meta else weight.to(dtype))
        if start_dtype is not None:
            put_gained(layer, SLOT, start_dtype)
    return {name: _released(name, released, names) for name, _ in net.named_parameters()}


def adapted(net: nn.Module) -> dict[str, LoraLayer]:
    """Our name -> PEFT's layer there."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in net.named_modules() if isinstance(module, LoraLayer)}


def _released(name: str, layers: Mapping[str, str], before: Mapping[str, str]) -> str:
    """A parameter's released name. name: ours, with adapters around layers; layers: our layer name -> released; before:
    our parameter name without adapters -> released."""
    for kind, suffix in KINDS.items():
        layer, found, ending = name.partition(f".{kind}.{SLOT}")
        if found:
            return f"{layers[layer]}.{kind}{ending}" if ending == ".start" else f"{layers[layer]}.{suffix}"
    return before[name.replace(".base_layer.", ".")]


@torch.no_grad()
def begin(net: nn.Module, names: Mapping[str, str], *, how: str, seed: int) -> None:
    """Draws each A as a pure function of (seed, its released name); B stays zero, so that nothing changes yet.

    uniform: as torch.nn.Linear begins, within 1 / sqrt(inputs) of 0. gaussian: with deviation 1 / rank, as PEFT's.
    """
    for name in adapted(net):
        A_RI = net.get_parameter(f"{name}.lora_A.{SLOT}.weight")
        drawn_RI = torch.empty(A_RI.shape)
        generator = torch.Generator().manual_seed(seed_of(seed, "adapter", names[f"{name}.lora_A.{SLOT}.weight"]))
        if how == "gaussian":
            drawn_RI.normal_(std=1 / A_RI.shape[0], generator=generator)
        else:
            bound = 1 / math.sqrt(A_RI.shape[1])
            drawn_RI.uniform_(-bound, bound, generator=generator)
        A_RI.copy_(drawn_RI)


@torch.no_grad()
def begin_from(
    adapter: Adapter, weights: Mapping[str, Tensor], alphas: Mapping[str, float], *, whole: Sequence[str], where: str
) -> list[str]:
    """Copies an adapter into the one that learns. Returns a notice of layers that it lacks, which stay as begun.

    weights: all of the network's now, by released name. alphas: of its layers; B is scaled where the file's differ.
    whole: parts of released names of weights that learn in full. Raises UserError for what finds no place.
    """
    refuse(where, few(grouped(_misplaced(adapter, weights, alphas, whole))))
    A, B, magnitude = KINDS.values()
    for layer, pair in adapter.layers.items():
        ratio = pair.scale / (alphas[layer] / pair.rank)
        weights[f"{layer}.{A}"].copy_(pair.A_RI)
        weights[f"{layer}.{B}"].copy_(pair.B_OR if ratio == 1 else pair.B_OR.float() * ratio)
        if pair.magnitude_O is not None:
            weights[f"{layer}.{magnitude}"].copy_(pair.magnitude_O)
    for name, value in adapter.whole.items():
        weights[name].copy_(value)
    for name, change in adapter.changes.items():
        weights[name].add_(change.to(weights[name]))
    lacking = [layer for layer in alphas if layer not in adapter.layers]
    return [f"{where} has no {', '.join(few(lacking))}: adapters of these layers begin anew"] if lacking else []


def _misplaced(
    adapter: Adapter, weights: Mapping[str, Tensor], alphas: Mapping[str, float], whole: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """What does not fit, as pairs that `grouped` takes."""
    for layer, pair in adapter.layers.items():
        if layer not in alphas:
            yield "", f"it changes {layer}, which gets no adapter; name it in target_name"
            continue
        rank = weights[f"{layer}.{KINDS['lora_A']}"].shape[0]
        if pair.rank != rank:
            yield layer, f"has rank {pair.rank} in it and {rank} in the recipe; set rank or rank_pattern"
        has_magnitude = pair.magnitude_O is not None
        if has_magnitude != (f"{layer}.{KINDS['lora_magnitude_vector']}" in weights):
            has = "magnitudes (DoRA)" if has_magnitude else "no magnitudes"
            yield layer, f"has {has} in it; set use_dora to {str(has_magnitude).lower()}"
    for name in {**adapter.whole, **adapter.changes}:
        if not in_full(name, whole):
            yield "", f"it changes all of {name}, which does not learn; name it in train_whole"


def groups(net: nn.Module, names: Mapping[str, str], *, whole: Sequence[str], ratio: float) -> list[dict[str, Any]]:
    """What learns, for the optimizer: all at the learning rate, but each B at `ratio` times it. Sets requires_grad.

    whole: parts of released names of weights that learn in full.
    """
    learning: dict[float, list[nn.Parameter]] = {1.0: [], ratio: []}
    for name, parameter in net.named_parameters():
        learns = is_adapter(names[name]) or in_full(names[name], whole)
        parameter.requires_grad_(learns)
        if learns:
            learning[ratio if names[name].endswith(KINDS["lora_B"]) else 1.0].append(parameter)
    return [{"params": parameters, "rate": rate} for rate, parameters in learning.items() if parameters]


def is_adapter(released: str) -> bool:
    """Whether that is the name of a parameter of an adapter."""
    return released.endswith(tuple(KINDS.values()))
