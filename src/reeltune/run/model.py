"""The model that a recipe asks for: its family, train mode and objective, and its networks, loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune import families
from reeltune.adapters.apply import merge, parameters_of
from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.state import Shared
from reeltune.config.recipe import Loss, Model, Recipe, Validation
from reeltune.core.errors import UserError, named_by, refuse, together
from reeltune.diffusion.objective import Objective
from reeltune.distributed.engine import DTYPES
from reeltune.families import weights
from reeltune.families.spec import Family, Parts, check_expert, check_mode
from reeltune.memory.blocks import blocks_of, move, swap
from reeltune.optim.trainable import released_names
from reeltune.run import adapters
from reeltune.run.experts import OTHER, check_experts, own_part, refuse_adapters
from reeltune.run.loading_memory import WORDS, told_when_full
from reeltune.run.precision import encoder_dtype
from reeltune.run.sizes import size_rules

LEVEL_CHOICES = ("uniform_sampling", "weighting_scheme", "logit_mean", "logit_std", "mode_scale")


def choose_family(recipe: Recipe) -> tuple[Family, str, Objective]:
    """The family found in the checkpoint, the train mode, and the objective with the recipe's noise levels; where both
    of two experts learn, the family of both, and an objective of all levels.

    Raises UserError if the checkpoint is unknown, or cannot do the mode, the loss and the sizes asked for.
    """
    family = families.find(recipe.model.pretrained_model_name_or_path, config_path=recipe.model.config_path)
    family = check_expert(family, recipe.model.expert)
    family = replace(family, geometry=replace(family.geometry, sides=even_side(recipe.parallel.context_parallel)))
    with together("recipe") as attempt:
        attempt(check_split, family, recipe.parallel.context_parallel)
        mode = attempt(check_mode, family, recipe.model.train_mode)
        objective = attempt(chosen_objective, family, recipe.loss)
        attempt(size_rules, recipe, family)
        attempt(check_reference, family, recipe.model)
        attempt(check_experts, family, recipe.model, recipe.adapter.adapter_path)
    return family, mode, objective


def even_side(processes: int) -> int:
    """Tokens: sides that are multiples of it hold a number of tokens that so many processes can share evenly."""
    return next(side for side in range(1, processes + 1) if side**2 % processes == 0)


def check_split(family: Family, processes: int) -> None:
    """Raises UserError if so many processes are to share a clip and the family does not know how."""
    if processes > 1 and family.split is None:
        raise UserError(
            "recipe",
            f"context_parallel is {processes}, but {family.name} has no plan to split a clip's tokens; leave it "
            "out, and use engine fsdp or zero3, gradient_checkpointing, or smaller clips",
        )


def check_reference(family: Family, model: Model) -> None:
    """Raises UserError for reference tokens of a network that has no weights for them."""
    if model.add_full_ref_image_in_self_attention and "full_ref" not in family.drop:
        raise UserError(
            "recipe",
            f"add_full_ref_image_in_self_attention is true, but {family.name} has no weights for such a reference "
            "picture; leave it out",
        )


def chosen_objective(family: Family, loss: Loss) -> Objective:
    """Raises UserError for a loss that the checkpoint was not trained with."""
    trained_with = type(family.objective).__name__.lower()
    if loss.loss_type not in (None, trained_with):
        raise UserError(
            "recipe",
            f"loss_type is {loss.loss_type!r}, but a checkpoint of {family.name} was trained with {trained_with}; "
            "leave loss_type out",
        )
    return with_levels(family.objective, loss)


def with_levels(objective: Any, loss: Loss) -> Objective:
    """The objective with the recipe's choice of noise levels. Raises UserError for a choice that it has not."""
    known = {field.name for field in fields(objective)}
    asked = {name: getattr(loss, name) for name in LEVEL_CHOICES}
    refuse(
        "recipe",
        [
            f"{name} is {value!r}, which is for flow alone; this checkpoint was trained with "
            f"{type(objective).__name__.lower()}; leave {name} out"
            for name, value in asked.items()
            if name not in known and value != getattr(Loss, name)
        ],
    )
    return replace(objective, **{name: value for name, value in asked.items() if name in known})


def encode_options(recipe: Recipe) -> dict[str, Any]:
    """Choices of the recipe that change what is encoded; `vae_mini_batch` is one only where clips are together."""
    together = recipe.training.vae_mini_batch
    return {
        "add_full_ref_image_in_self_attention": recipe.model.add_full_ref_image_in_self_attention,
        "vae_tiling": recipe.memory.vae_tiling,
        **({"vae_mini_batch": together} if together > 1 else {}),
    }


def network_dtype(recipe: Recipe) -> torch.dtype:
    """The type of the network's weights: of what learns, or beneath adapters the type it computes in."""
    if recipe.adapter.rank:
        return DTYPES[recipe.training.mixed_precision]
    return torch.float32 if recipe.model.trained_weights == "fp32" else torch.bfloat16


def load_parts(
    recipe: Recipe,
    family: Family,
    device: torch.device,
    transformer: Path | None = None,
    *,
    encoders: bool = True,
    network: bool = True,
    start_on: torch.device | None = None,
    fake: AbstractContextManager | None = None,
) -> Parts:
    """The networks: the trained one as trained_weights says, the frozen ones as encoder_weights does.

    transformer: the folder to take the trained network from when a run is resumed. Without `encoders` the frozen ones
    are read when they are needed; without `network` the trained one's weights are not read. start_on: where all
    networks are to be at first, if not on the device. fake: torch's FakeTensorMode, to read no weights at all.
    """
    place = device if start_on is None else start_on
    load = partial(
        family.load,
        recipe.model.pretrained_model_name_or_path,
        dtype=network_dtype(recipe),
        frozen_dtype=encoder_dtype(recipe),
        device=place,
        low_vram=recipe.training.low_vram,
        encoders=encoders,
        network=network,
        network_device=torch.device("cpu") if recipe.memory.blocks_to_swap else None,
        vae_tiling=recipe.memory.vae_tiling,
        transformer_path=transformer or own_part(recipe.model.transformer_path, family.expert),
        fake=fake,
        base_weights=recipe.adapter.base_weights,
    )
    if fake is not None:
        parts = load()
    else:
        full = partial(told_when_full, recipe, place, partial(outlines, recipe, family, transformer), network=network)
        with full("networks are loaded", encoders=encoders):
            parts = load()
        for name, read in parts.loaders.items():
            parts.loaders[name] = partial(_read_within, full, name, read)
    parts.device = device
    return parts


def other_expert(family: Family, path: str | None) -> Family | None:
    """The one of two that does not learn, with its weights of `path` or of the model; None where it is in neither."""
    if family.expert is None:
        return None
    name = OTHER[family.expert]
    path = own_part(path, name)
    if path is None:
        return family.experts.get(name)
    shared = checkpoint.is_shared(Path(path))
    own = family.experts.get(name, family)
    return replace(own, expert=name, weights=own.weights if shared else weights.saved_transformer(path))


def may_preview(validation: Validation) -> bool:
    """Whether previews are made, of prompts or, where there are any, of held-out clips."""
    return bool(validation.validation_prompts or validation.preview_count)


def other_expert_bytes(recipe: Recipe, family: Family) -> int:
    """What the other expert takes of the host's memory, from the first preview on."""
    other, validation = other_expert(family, recipe.model.other_expert_path), recipe.validation
    if other is None or other.weights is None or not may_preview(validation):
        return 0
    count = sum(tensor.numel() for tensor in weights.peek(other.weights).values())
    return count * DTYPES[recipe.training.mixed_precision].itemsize


def load_other_expert(
    recipe: Recipe, family: Family, device: torch.device, *, strength: float = 1.0, network: bool = True
) -> nn.Module:
    """The network that does not learn, as it computes, with its adapter in its weights: its blocks wait in the CPU's
    memory, and visit the device.

    family: of the one that does, beside which it is. strength: of the adapter. network: as of Family.load; an adapter
    is looked at without, too. Raises UserError for weights that do not fit.
    """
    model = recipe.model
    other = other_expert(family, model.other_expert_path)
    assert other is not None
    path = own_part(model.other_expert_path, other.expert)
    shared = path is not None and checkpoint.is_shared(Path(path))
    parts = other.load(
        model.pretrained_model_name_or_path,
        dtype=DTYPES[recipe.training.mixed_precision],
        encoders=False,
        network=network,
        transformer_path=None if shared else path,
    )
    net = parts.net.requires_grad_(False)
    names = released_names(net, lambda state: other.to_released(state, parts.config))
    if shared and network:
        Shared(Path(path or "")).fill_network(net, names)
    if (adapter := own_part(model.other_expert_adapter, other.expert)) is not None:
        with named_by("other_expert_adapter", adapter):
            given = adapters.read(Path(adapter), parameters_of(net, names))
            refuse_adapters({given.path: given.adapter}, other)
        if network:
            merge(net, names, [(given.adapter, strength)])
    if network and device.type != "cpu":
        blocks = blocks_of(net, family.blocks)
        move(net, device, besides=swap(blocks, len(blocks), device))
    return net


def outlines(recipe: Recipe, family: Family, transformer: Path | None = None) -> Parts:
    """A recipe's networks, without their weights' values."""
    return load_parts(recipe, family, torch.device("cpu"), transformer, encoders=False, fake=FakeTensorMode())


def _read_within(full: Callable[..., AbstractContextManager], name: str, read: Callable[[], nn.Module]) -> nn.Module:
    with full(f"the {WORDS.get(name, name)} is loaded"):
        return read()
