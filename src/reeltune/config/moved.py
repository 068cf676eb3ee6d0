"""A run's own recipe, read where the run's folder lies now.  (no torch)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError

OF_A_RUN = "run.json"  # beside a recipe that a run has written


def recipe_beside(checkpoint: Path) -> Path | None:
    """The recipe that a checkpoint was made by: in it, or in the run's folder."""
    files = (folder / "recipe.yaml" for folder in (checkpoint, checkpoint.parent))
    return next((file for file in files if file.is_file()), None)


def in_its_folder(recipe: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, whose output_dir is the recipe's own folder if a run has written both: it may have been moved, or
    its output_dir be relative to another working directory.

    Raises UserError if output_dir is there too and holds a run: which is meant cannot be told.
    """
    own, asked = recipe.parent, tree.get("output_dir")
    if asked is None or not (own / OF_A_RUN).is_file() or Path(str(asked)).resolve() == own.resolve():
        return dict(tree)
    if (Path(str(asked)) / OF_A_RUN).is_file():
        raise UserError(
            str(recipe),
            f"output_dir is {asked}, where a run lies, and the recipe lies in the folder of another, {own}; say which "
            "is meant with --output_dir",
        )
    return {**tree, "output_dir": str(own)}
