"""A command line's words as settings of a recipe: --name value, --name=value; a switch alone; a list's several values.

(no torch)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reeltune.config.parse import Setting, settings
from reeltune.core.options import tell_repeated


def flags(argv: Sequence[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """(words that belong to no flag, flags by name with their values as text, problems). Unknown flags are kept."""
    known = settings()
    words: list[str] = []
    given: dict[str, Any] = {}
    problems: list[str] = []
    left = list(argv)
    tell_repeated(left, {f"--{name}" for name in known})
    while left:
        token = left.pop(0)
        if not token.startswith("--"):
            words.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        setting = known.get(name)
        values = [value] if equals else _taken(setting, left)
        if setting is not None and not setting.stands_alone and not values:
            problems.append(f"{name} has no value; write --{name} VALUE")
        elif setting is not None and setting.is_text_or_none and not values[0].strip():
            problems.append(
                f"{name} is empty, as is a variable that the shell has not set; give it, leave it out, or write none"
            )
        elif setting is not None and setting.is_list:
            given[name] = values
        else:
            given[name] = values[0] if values else "true"
    return words, given, problems


def _taken(setting: Setting | None, left: list[str]) -> list[str]:
    """Takes from `left` the words that belong to a flag."""
    count = next((i for i, token in enumerate(left) if token.startswith("--")), len(left))
    if setting is not None and setting.stands_alone:  # what is behind it may be the recipe
        count = int(count > 0 and not left[0].endswith((".yaml", ".yml")))
    elif setting is None or not setting.is_list:
        count = min(count, 1)
    taken, left[:] = left[:count], left[count:]
    return taken
