"""Models of two networks, the experts high and low: whose weights were given, as far as that can be told, and what a
recipe says of each where both learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from reeltune.adapters.adapter import Adapter
from reeltune.adapters.writing import OURS
from reeltune.checkpoint.folder import PARTS, part, parts
from reeltune.config.parse import read
from reeltune.config.recipe import Model, Recipe
from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import json_value
from reeltune.families.spec import Family

OTHER = {"high": "low", "low": "high"}


def of_expert(recipe: Recipe, expert: str | None) -> Recipe:
    """The recipe by which that one learns, of a run in which both do; any other recipe as it is."""
    if recipe.model.expert != "both" or expert is None:
        return recipe
    model, adapter, optimization = recipe.model, recipe.adapter, recipe.optimization
    rate, norm = optimization.low_expert_learning_rate, optimization.low_expert_max_grad_norm
    low = {"learning_rate": rate, "max_grad_norm": norm} if expert == "low" else {}
    own = {name: value for name, value in low.items() if value is not None}
    return replace(
        recipe,
        model=replace(model, expert=expert, transformer_path=own_part(model.transformer_path, expert)),
        adapter=replace(adapter, adapter_path=own_part(adapter.adapter_path, expert)),
        optimization=replace(optimization, low_expert_learning_rate=None, low_expert_max_grad_norm=None, **own),
    )


def own_part(path: str | None, expert: str | None) -> str | None:
    """That expert's part of a folder that has both; any other path as it is."""
    return None if path is None else str(part(Path(path), expert))


def whose(path: str | Path, family: Family) -> Any:
    """Which expert weights are of, by the recipe of a run's checkpoint, or by their place in the model's folder; None
    where neither tells."""
    given = Path(path)
    for folder in (given, given.parent, given.parent.parent):
        if all((folder / name).is_file() for name in ("progress.json", "recipe.yaml")):
            said = read(folder / "recipe.yaml").get("expert")
            inside = {name: folder / part for name, part in PARTS.items() if said == "both"}
            return next((name for name, part in inside.items() if part in (given, *given.parents)), None) or (
                None if inside else said
            )
    places = {expert.weights.resolve(): name for name, expert in family.experts.items() if expert.weights is not None}
    return places.get(given.resolve(), places.get(given.parent.resolve()))


def refuse_other_expert(setting: str, path: str | Path, family: Family) -> None:
    """Raises UserError for weights that are known to be of the other expert than the family is."""
    if family.expert is not None and (found := whose(path, family)) not in (None, family.expert):
        raise UserError("recipe", _told(setting, path, found, family.expert))


def refuse_adapters(adapters: Mapping[str, Adapter], family: Family) -> None:
    """Raises UserError for adapters that say that they are of the other expert. adapters: by path."""
    if family.expert is not None:
        said = {path: _said(adapter.about) for path, adapter in adapters.items()}
        wrong = [
            _told("an adapter", path, one, family.expert) for path, one in said.items() if one == OTHER[family.expert]
        ]
        refuse("adapters", wrong)


def _said(about: Mapping[str, Any]) -> Any:
    """Which expert an adapter says that it is of, as it was trained, or as `reeltune export` wrote it for another
    tool."""
    if "expert" in about:
        return about["expert"]
    try:
        trained = json_value(str(about.get(OURS, "null")).encode())
    except ValueError:
        return None
    return trained.get("expert") if isinstance(trained, dict) else None


def check_experts(family: Family, model: Model, adapter_path: str | None = None) -> None:
    """Raises UserError for weights of the wrong expert, for those of one where both learn, and for those of another
    where there is one network."""
    other = model.other_expert_path
    if family.expert is None and family.experts:
        _refuse_one_for_both({"transformer_path": model.transformer_path, "adapter_path": adapter_path})
        return
    if family.expert is None:
        refuse(
            "recipe",
            [
                f"{name} is {getattr(model, name)!r}, but a checkpoint of {family.name} has one network for all noise "
                "levels; leave it out"
                for name in ("other_expert_path", "other_expert_adapter")
                if getattr(model, name) is not None
            ],
        )
        return
    given = {"transformer_path": (model.transformer_path, family.expert)}
    given["other_expert_path"] = other, OTHER[family.expert]
    problems = []
    for setting, (path, meant) in given.items():
        found = None if path is None else whose(path, family)
        if found not in (None, meant):
            problems.append(_told(setting, path, found, meant))
    if model.other_expert_adapter is not None and other is None and OTHER[family.expert] not in family.experts:
        problems.append(
            f"other_expert_adapter is {model.other_expert_adapter!r}, and the checkpoint holds the weights of "
            f"{family.expert} alone; give those that it changes in other_expert_path, or leave it out"
        )
    refuse("recipe", problems)


def _refuse_one_for_both(given: Mapping[str, str | None]) -> None:
    refuse(
        "recipe",
        [
            f"{name} is {path!r} and expert is both; give a checkpoint-N folder of a run that trained both, or one "
            f"that has {' and '.join(PARTS.values())}"
            for name, path in given.items()
            if path is not None and not parts(Path(path))
        ],
    )


def _told(setting: str, path: str | Path | None, found: Any, meant: str) -> str:
    return f"{setting} is {str(path)!r}, whose weights are those of expert {found}, and {meant} is meant; give its own"
