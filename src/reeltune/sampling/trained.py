"""The weights that `reeltune sample` makes clips with, and which they were: a checkpoint's, or the recipe's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reeltune.adapters.apply import applied, parameters_of
from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.state import Shared
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.families.spec import Family, Parts
from reeltune.memory.blocks import blocks_of, move, swap
from reeltune.optim.trainable import released_names
from reeltune.run.adapters import Given, digest, of_checkpoint, read, read_all
from reeltune.run.experts import of_expert, own_part, refuse_adapters, refuse_other_expert
from reeltune.run.model import choose_family, load_parts


@dataclass
class Trained:
    """The networks as they are loaded, and adapters beside them."""

    parts: Parts
    names: dict[str, str]  # of the trained one's parameters, ours -> released
    weights: dict[str, str]  # path and SHA-256 of its weights, without adapters
    adapters: list[Given] = field(default_factory=list)

    def told(self, factor: float = 1.0) -> dict[str, Any]:
        """What the .json of a clip says of its weights."""
        adapters = [one.times(factor).told for one in self.adapters]
        return {"weights": self.weights, **({"adapters": adapters} if adapters else {})}

    @contextmanager
    def at(self, factor: float, *, keep: bool) -> Iterator[None]:
        """Adapters in the network's weights, each at its strength times the factor.

        keep: take them out again afterwards, which takes memory for the weights that they change.
        """
        strengths = [(one.adapter, one.strength * factor) for one in self.adapters]
        with applied(self.parts.net, self.names, strengths, keep=keep):
            yield


def of_both(recipe: Recipe) -> Recipe:
    """The recipe of the first of two experts where both learn, beside which the other has the weights of the same
    checkpoint, or of the same settings; another recipe as it is. Raises UserError as `find`."""
    if recipe.model.expert != "both":
        return recipe
    choose_family(recipe)  # a model of one network is refused
    high, low = (of_expert(recipe, name) for name in ("high", "low"))
    path, adapter = low.model.transformer_path, low.adapter.adapter_path
    chosen = checkpoint.find(Path(recipe.output.output_dir), recipe.output.resume_from_checkpoint)
    if chosen is not None:
        part = str(checkpoint.part(chosen, "low"))
        path, adapter = (path, part) if checkpoint.is_adapter(chosen) else (part, None)
    return replace(high, model=replace(high.model, other_expert_path=path, other_expert_adapter=adapter))


def load_trained(recipe: Recipe, family: Family, device: torch.device, adapters: Sequence[str] = ()) -> Trained:
    """The network that clips are made with. adapters: FILE:strength each, beside that of a checkpoint which keeps one.
    Where neither is, the recipe's adapter_path counts. A checkpoint of any engine will do.

    Raises UserError if resume_from_checkpoint names none, or other weights than transformer_path; for checkpoints that
    are damaged, those of transformer_path and other_expert_path too; and for adapters that cannot be read or are of
    another network.
    """
    chosen = _checkpoint(recipe)
    if chosen is not None:
        refuse_other_expert("resume_from_checkpoint", chosen, family)
        chosen = checkpoint.part(chosen, family.expert)
    whole = None if chosen is not None and checkpoint.is_adapter(chosen) else chosen
    for path in (None if whole else recipe.model.transformer_path, recipe.model.other_expert_path):
        checkpoint.verify_weights(None if path is None else Path(path))
    source = None if whole is None else checkpoint.transformer_of(whole)
    parts = load_parts(recipe, family, device, source)
    names = released_names(parts.net, lambda state: family.to_released(state, parts.config))
    if whole is not None and checkpoint.is_shared(whole):
        Shared(whole).fill_network(parts.net, names)
    path = whole or recipe.model.transformer_path or recipe.model.pretrained_model_name_or_path
    weights = {"path": str(path), "sha256": digest(dict(parts.net.named_parameters()))}
    _swap(parts.net, recipe.memory.blocks_to_swap, family, device)
    base = parameters_of(parts.net, names)
    begun_with = own_part(recipe.adapter.adapter_path, family.expert)
    if begun_with is not None and not (adapters or chosen):
        given = [read(Path(begun_with), base)]
    else:
        given = [of_checkpoint(chosen, base)] if chosen is not None and whole is None else []
        given += read_all(adapters, base)
    refuse_adapters({one.path: one.adapter for one in given}, family)
    return Trained(parts, names, weights, given)


def _swap(net: nn.Module, count: int, family: Family, device: torch.device) -> None:
    """Puts the network on the device but for blocks to swap, as in training; without such blocks all of it is there
    already."""
    net.requires_grad_(False)
    if count:
        move(net, device, besides=swap(blocks_of(net, family.blocks), count, device))


def _checkpoint(recipe: Recipe) -> Path | None:
    """That of resume_from_checkpoint."""
    wanted, where, other = recipe.output.resume_from_checkpoint, recipe.output.output_dir, recipe.model.transformer_path
    chosen = checkpoint.find(Path(where), wanted)
    if wanted is not None and chosen is None:
        raise UserError("sample", f"resume_from_checkpoint is {wanted}, and {where} has no checkpoint")
    if chosen is None or checkpoint.is_adapter(chosen):
        return chosen
    if other is not None:
        both = f"transformer_path is {other} and resume_from_checkpoint is {wanted}"
        raise UserError("sample", f"{both}, which are two answers to whose weights are meant; leave one out")
    checkpoint.verify(chosen, under=checkpoint.WEIGHTS)
    return chosen
