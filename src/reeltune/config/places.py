"""Where a recipe's relative paths are looked up, told of those that are not there.  (no torch)"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reeltune.config.parse import flat
from reeltune.config.recipe import Recipe
from reeltune.config.text_rules import PATHS
from reeltune.core.errors import UserError


@contextmanager
def places_told(recipe: Recipe) -> Iterator[None]:
    """Within, the first of an error's lines that names a relative path of the recipe where nothing was at first says,
    once, which place that is."""
    absent = list(_absent(recipe))
    try:
        yield
    except UserError as error:
        where, problems = error.where, list(error.problems)
        for path in absent:
            told = _naming(path, [where, *problems])
            if told is not None and str(path.absolute()) not in str(error):
                line = max(told - 1, 0)  # what is told of `where` stands below it
                problems[line] += f"; {path} is looked up from the working folder, as {path.absolute()}"
        if problems == error.problems:
            raise
        raise UserError(where, problems) from error


def _absent(recipe: Recipe) -> Iterator[Path]:
    values = flat(recipe)
    for name in PATHS:
        for path in values[name] if isinstance(values[name], tuple) else (values[name],):
            if path and not os.path.isabs(path) and not _may_be_absent(name, path, values["output_dir"]):
                yield Path(path)


def _may_be_absent(name: str, path: str, output_dir: str) -> bool:
    """Whether it is there, is made, or is meant in another way."""
    is_name = os.path.basename(path) == path  # of a checkpoint, which is looked for in output_dir too
    is_checkpoint = name == "resume_from_checkpoint" and (is_name or os.path.exists(os.path.join(output_dir, path)))
    return is_checkpoint or name == "output_dir" or path == "latest" or os.path.exists(path)


def _naming(path: Path, lines: list[str]) -> int | None:
    """The first line that names the path, or what is in it. A mere word, as data or cache, is told from one of the
    line's own: it comes first, in quotes or as a setting's value, or something in it is named."""
    escaped = rf"(\./)?{re.escape(str(path))}"
    named = rf"(?<![\w./-]){escaped}(?![\w.-])"
    if len(path.parts) == 1:
        named = rf"(^|['\"]|\b\w+_\w+ is ){escaped}(?![\w.-])|(?<![\w./-]){escaped}/"
    return next((i for i, line in enumerate(lines) if re.search(named, line)), None)
