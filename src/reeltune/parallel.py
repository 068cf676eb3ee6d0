"""Which engine a run has, by its recipe and its launcher."""

from __future__ import annotations

from dataclasses import replace

from reeltune.errors import refuse
from reeltune.launch import Wish, chosen
from reeltune.recipe import Recipe
from reeltune.rules import broken_rules


def engine_of(recipe: Recipe) -> Wish:
    """Raises UserError for a launch that would not train as one run, and for settings that its engine has not."""
    parallel = recipe.parallel
    wish = chosen(parallel.engine, keep_gathered=parallel.keep_gathered, offload=parallel.offload)
    asked = replace(recipe, parallel=replace(parallel, engine=wish.engine))
    refuse("launch", [line for _, line in broken_rules(asked)])
    return wish
