"""The weights that `reeltune sample` makes clips with, and which they were: a checkpoint's, or the recipe's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.state import Shared
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.families.spec import Family, Parts
from reeltune.optim.trainable import released_names
from reeltune.run.model import load_parts


def load_trained(recipe: Recipe, family: Family, device: torch.device) -> tuple[Parts, dict[str, str]]:
    """(the networks, path and SHA-256 of the trained one's weights). A checkpoint of any engine will do.

    Raises UserError if resume_from_checkpoint names none, one that is damaged, or other weights than transformer_path.
    """
    model, wanted = recipe.model, recipe.output.resume_from_checkpoint
    chosen = checkpoint.find(Path(recipe.output.output_dir), wanted)
    if wanted is not None and chosen is None:
        where = recipe.output.output_dir
        raise UserError("sample", f"resume_from_checkpoint is {wanted}, and {where} has no checkpoint")
    if chosen is None:
        parts, path = load_parts(recipe, family, device), model.transformer_path or model.pretrained_model_name_or_path
        return parts, {"path": str(path), "sha256": digest(parts.net)}
    if model.transformer_path is not None:
        both = f"transformer_path is {model.transformer_path} and resume_from_checkpoint is {wanted}"
        raise UserError("sample", f"{both}, which are two answers to whose weights are meant; leave one out")
    checkpoint.verify(chosen, under=checkpoint.WEIGHTS)
    is_shared = checkpoint.is_shared(chosen)
    parts = load_parts(recipe, family, device, None if is_shared else chosen / "transformer")
    if is_shared:
        names = released_names(parts.net, lambda state: family.to_released(state, parts.config))
        Shared(chosen).fill_network(parts.net, names)
    return parts, {"path": str(chosen), "sha256": digest(parts.net)}


def digest(net: nn.Module) -> str:
    """Of names, types, shapes and bytes of all parameters, whatever files they came from: 1.4 GB/s."""
    total = hashlib.sha256()
    for name, weight in sorted(net.named_parameters()):
        total.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        total.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
