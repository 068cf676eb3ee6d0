"""The adapters that a recipe asks for: put into the network, begun, and read back from a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from reeltune.adapters import saved
from reeltune.adapters.apply import parameters_of
from reeltune.adapters.dialects import read_adapter
from reeltune.adapters.layers import SLOT, adapted, begin, begin_from, inject
from reeltune.adapters.principal import find_starts, is_principal, is_start, iterations, round_the_rest, starts_of
from reeltune.adapters.targets import Target, in_full, targets
from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.folder import ADAPTER
from reeltune.checkpoint.state import Shared
from reeltune.config.recipe import Recipe
from reeltune.core.errors import named_by, refuse
from reeltune.core.reading import few, grouped
from reeltune.distributed.engine import DTYPES, Engine
from reeltune.families.spec import Family
from reeltune.run.base import base_of
from reeltune.run.experts import own_part, refuse_adapters


@dataclass(frozen=True)
class TrainedAdapter:
    """What a checkpoint writes of adapters beside their weights."""

    alphas: dict[str, float]  # by the layer's released name: the change is alpha / rank * B @ A
    about: dict[str, Any]  # what its file says of it
    notices: list[str]


def put_adapters(
    net: nn.Module, names: dict[str, str], family: Family, recipe: Recipe, *, resumed: bool
) -> tuple[dict[str, str], TrainedAdapter]:
    """Puts adapters around the network's layers, in place. Returns its parameters' names (ours -> released), which now
    include those of the adapters, and what the adapters are.

    They begin as the recipe says; resumed: a checkpoint will be read over them. Raises UserError for names
    that match nothing, and for an adapter_path that is no adapter of these layers and ranks.
    """
    wanted = recipe.adapter
    base = parameters_of(net, names)
    dtype = torch.float32 if recipe.model.trained_weights == "fp32" else torch.bfloat16
    problems = [
        f"train_whole has {part!r}, which is in no parameter name"
        for part in wanted.train_whole
        if not any(part in name for name in names.values())
    ]
    coarse = [names[name] for name, weight in net.named_parameters() if not weight.is_floating_point()]
    problems += [
        f"train_whole has {part!r} and base_weights is {wanted.base_weights}: {few_bits[0]} is kept in fewer bits "
        "than it needs to learn; leave one of the two out"
        for part in wanted.train_whole
        if (few_bits := [name for name in coarse if part in name])
    ]
    refuse("recipe", problems)
    around = targets(
        net,
        family.blocks,
        names,
        rank=wanted.rank,
        alpha=wanted.network_alpha,
        wanted=wanted.target_name,
        skipped=wanted.lora_skip_name,
        ranks=wanted.rank_pattern,
        alphas=wanted.alpha_pattern,
        whole=wanted.train_whole,
    )
    if is_principal(wanted.lora_init):
        _refuse_wide(net, around)
    names = inject(
        net,
        around,
        names,
        dtype=dtype,
        rank_stabilised=wanted.use_rslora,
        use_dora=wanted.use_dora,
        dropout=wanted.lora_dropout,
        start_dtype=DTYPES[recipe.training.mixed_precision] if is_principal(wanted.lora_init) else None,
    )
    notices: list[str] = []
    if not (resumed or is_principal(wanted.lora_init) or is_fake(net)):
        begin(net, names, how=wanted.lora_init, seed=recipe.training.seed)
    for name, weight in net.named_parameters():
        if in_full(names[name], wanted.train_whole):
            weight.data = weight.data.to(dtype)
    stabilised = {target.released: math.sqrt(target.rank) if wanted.use_rslora else 1.0 for target in around}
    alphas = {target.released: target.alpha * stabilised[target.released] for target in around}
    about = {
        "family": family.name,
        "base_model": recipe.model.pretrained_model_name_or_path,
        "transformer_path": recipe.model.transformer_path,
        **({"expert": recipe.model.expert} if recipe.model.expert is not None else {}),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in vars(wanted).items()},
    }
    if (begun_with := own_part(wanted.adapter_path, family.expert)) is not None and not resumed:
        weights = {names[name]: weight for name, weight in net.named_parameters()}
        with named_by("adapter_path", begun_with):
            adapter, _ = read_adapter(begun_with, base)
            refuse_adapters({begun_with: adapter}, family)
            notices += begin_from(adapter, weights, alphas, whole=wanted.train_whole, where=begun_with)
    return names, TrainedAdapter(alphas, about, notices)


def is_fake(net: nn.Module) -> bool:
    """Whether it has weights without values (torch's FakeTensor), beside which nothing is drawn or computed."""
    return any(isinstance(weight, FakeTensor) for weight in net.parameters())


def read_kept(net: nn.Module, names: dict[str, str], adapter: TrainedAdapter | None, resumed_from: Path) -> None:
    """Reads what the base does not have from a checkpoint. Raises UserError for adapters of another kind or scale."""
    if adapter is None:
        if checkpoint.is_shared(resumed_from):
            Shared(resumed_from).fill_network(net, names)
        return
    folder = resumed_from / ADAPTER
    table = saved.config_of(folder)
    before, how = table["alphas"], str(table.get("lora_init"))
    changed = [
        f"{layer} had alpha {before.get(layer, 'none')} and has {adapter.alphas.get(layer, 'none')}"
        for layer in {**before, **adapter.alphas}
        if before.get(layer) != adapter.alphas.get(layer)
    ]
    if is_principal(how) != is_principal(adapter.about["lora_init"]):
        changed.append(f"lora_init was {how} and is {adapter.about['lora_init']}")
    refuse(f"resume from {resumed_from}: the adapters are others; restore the recipe's settings", few(changed))
    kept = {name: weight for name, weight in net.named_parameters() if weight.requires_grad or is_start(names[name])}
    if checkpoint.is_shared(resumed_from):
        Shared(resumed_from).fill_network(net, {name: names[name] for name in kept})
    else:
        saved.fill({names[name]: weight for name, weight in kept.items()}, saved.read(folder), str(folder))


def take_principal_parts(
    net: nn.Module, names: dict[str, str], recipe: Recipe, engine: Engine, *, resumed: bool
) -> None:
    """Finds PiSSA's principal parts that adapters begin with, unless a checkpoint had them; processes share the
    layers. A base in 8 or 4 bits is read again and rounded without them. Does nothing for a fake network."""
    how = recipe.adapter.lora_init
    if not is_principal(how) or is_fake(net):
        return
    layers = {names[f"{name}.base_layer.weight"].removesuffix(".weight"): layer for name, layer in adapted(net).items()}
    read = base_of(recipe.model) if recipe.adapter.base_weights else None

    def weight(name: str) -> Tensor:
        own = layers[name].get_base_layer().weight if read is None else read[f"{name}.weight"]
        return cast("Tensor", own).to(engine.device)

    if not resumed:
        find_starts(layers, SLOT, weight, list(layers)[engine.rank :: engine.world], iterations(how))
        for i, layer in enumerate(layers.values()):
            for start in starts_of(layer, SLOT):
                engine.give_from(i % engine.world, start)
    round_the_rest(layers, SLOT, weight)


def _refuse_wide(net: nn.Module, around: list[Target]) -> None:
    """Raises UserError for PiSSA where twice the rank, in which adapters are written, is over a layer's own rank."""
    layers = {name: one for name, one in net.named_modules() if isinstance(one, nn.Linear)}
    sizes = {name: min(one.in_features, one.out_features) for name, one in layers.items()}
    twice = "and lora_init is pissa, whose adapters are written in twice the rank"
    wide = [
        (
            target.released,
            f"gets rank {target.rank} {twice}, and its own is {sizes[target.name]} at most; lower rank there",
        )
        for target in around
        if 2 * target.rank > sizes[target.name]
    ]
    refuse("recipe", few(grouped(wide)))
