"""The name that was meant.  (no torch)"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from reeltune.core.errors import UserError


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """What to say after an unknown name. otherwise: where none of the known ones is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; the nearest is {close[0]}" if close else otherwise


def refuse_near(command: str, word: str, known: Iterable[str], instead_of: str) -> None:
    """Raises UserError where one of the words that a command of ours knows is near. instead_of: what it took it for."""
    if close := difflib.get_close_matches(word, list(known), 1):
        rule = f"{word} is no {instead_of}; the nearest of what reeltune {command} does is {close[0]}"
        raise UserError(command, rule)
