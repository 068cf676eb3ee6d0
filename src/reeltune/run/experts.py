"""Of two networks, the experts high and low: whose weights were given, as far as that can be told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reeltune.adapters.adapter import Adapter
from reeltune.config.parse import read
from reeltune.config.recipe import Model
from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import json_value
from reeltune.families.spec import Family

OTHER = {"high": "low", "low": "high"}


def whose(path: str | Path, family: Family) -> Any:
    """By the recipe of a run's checkpoint, or by the place in the model's folder; None where neither tells."""
    given = Path(path)
    for folder in (given, given.parent, given.parent.parent):
        if all((folder / name).is_file() for name in ("progress.json", "recipe.yaml")):
            return read(folder / "recipe.yaml").get("expert")
    places = {expert.weights.resolve(): name for name, expert in family.experts.items() if expert.weights is not None}
    return places.get(given.resolve(), places.get(given.parent.resolve()))


def refuse_other_expert(setting: str, path: str | Path, family: Family) -> None:
    """Raises UserError for weights that are known to be of the other expert than the family is."""
    if family.expert is not None and (found := whose(path, family)) not in (None, family.expert):
        raise UserError("recipe", _told(setting, path, found, family.expert))


def refuse_adapters(adapters: Mapping[str, Adapter], family: Family) -> None:
    """Of a path each. Raises UserError for those that say that they are of the other expert."""
    if family.expert is not None:
        said = {path: _said(adapter.about) for path, adapter in adapters.items()}
        wrong = [
            _told("an adapter", path, one, family.expert) for path, one in said.items() if one == OTHER[family.expert]
        ]
        refuse("adapters", wrong)


def _said(about: Mapping[str, Any]) -> Any:
    """Of an adapter as it was trained, or as `reeltune export` wrote it for another tool."""
    if "expert" in about:
        return about["expert"]
    try:
        trained = json_value(str(about.get("reeltune.trained", "null")).encode())
    except ValueError:
        return None
    return trained.get("expert") if isinstance(trained, dict) else None


def check_experts(family: Family, model: Model) -> None:
    """Raises UserError for weights of the wrong expert, and for those of another where there is one network."""
    other = model.other_expert_path
    if family.expert is None:
        if other is not None:
            raise UserError(
                "recipe",
                f"other_expert_path is {other!r}, but a checkpoint of {family.name} has one network for all noise "
                "levels; leave it out",
            )
        return
    given = {"transformer_path": (model.transformer_path, family.expert)}
    given["other_expert_path"] = other, OTHER[family.expert]
    problems = []
    for setting, (path, meant) in given.items():
        found = None if path is None else whose(path, family)
        if found not in (None, meant):
            problems.append(_told(setting, path, found, meant))
    refuse("recipe", problems)


def _told(setting: str, path: str | Path | None, found: Any, meant: str) -> str:
    return f"{setting} is {str(path)!r}, whose weights are those of expert {found}, and {meant} is meant; give its own"
