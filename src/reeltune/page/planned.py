"""What the rules, `check` and `plan` say of a form's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reeltune.config.parse import build
from reeltune.config.places import places_told
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.estimate import page as plan_page
from reeltune.estimate.check import check
from reeltune.estimate.machines import Machines
from reeltune.estimate.main import forecast
from reeltune.page.form import REQUIRED
from reeltune.page.svg import without_styles
from reeltune.run.folder import refuse_overwriting

DEVICE, GPUS = "plan.device", "plan.gpus"  # fields of the form that are of no recipe
LEGEND = plan_page.LEGEND


def sound(tree: Mapping[str, Any]) -> tuple[Recipe | None, list[str]]:
    """(the recipe, None unless it is sound; what is wrong with it)."""
    try:
        recipe = build(tree, where="recipe", required=REQUIRED)
        refuse_overwriting(Path(recipe.output.output_dir), None)
        return recipe, []
    except UserError as error:
        return None, error.problems


def machines_of(form: Mapping[str, str]) -> Machines:
    """Raises UserError for what is no number."""
    gpus = form.get(GPUS, "").strip() or "1"
    if not (gpus.isascii() and gpus.isdecimal() and len(gpus) < 6):
        raise UserError("plan", f"gpus is {gpus}; give a whole number from 1")
    return Machines(int(gpus), form.get(DEVICE, "").strip() or "80GB")


@dataclass(frozen=True)
class Told:
    """What both commands say."""

    check: list[str]
    answer: str
    reason: str
    tone: str
    offered: plan_page.Table
    memory: Markup
    tables: list[plan_page.Table]


def told(recipe: Recipe, machines: Machines, store: Path) -> Told:
    """Raises UserError for what training would refuse. Measurements go into the store."""
    recipe = replace(recipe, output=replace(recipe.output, output_dir=str(store)))
    with places_told(recipe):
        lines = list(check(recipe))
        plan = forecast(recipe, machines)
    answer, reason, tone = plan_page.verdict_lines(plan)
    return Told(
        check=lines,
        answer=answer,
        reason=reason,
        tone=tone,
        offered=plan_page.offer_table(plan),
        memory=without_styles(plan_page.memory_chart(plan)),
        tables=[plan_page.time_table(plan), plan_page.other_memory(plan), plan_page.data_table(plan)],
    )
