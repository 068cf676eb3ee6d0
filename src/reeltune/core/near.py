"""The name that was meant.  (no torch)"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """What to say after an unknown name. otherwise: where none of the known ones is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; the nearest is {close[0]}" if close else otherwise
