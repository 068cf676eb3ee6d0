"""Which file a list seems to mean, where it names one that is not there.  (no torch)"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator
from functools import partial

from reeltune.data.metadata import shown


class NearMisses:
    """Files below one folder, whose names are read once."""

    def __init__(self, folder: str):
        self.folder = folder
        self._names: dict[str, list[str]] = {}  # of each folder that was looked into

    def of(self, path: str) -> str | None:
        """In words, the file that is there under nearly this path below the folder, or None."""
        named = os.path.relpath(path, self.folder)
        parts = [part for part in named.replace("\\", "/").split("/") if part.strip() != "."]
        # A path may begin outside the folder, and pass through it.
        own_name = os.path.basename(self.folder)
        for start in [0, *(i + 1 for i, part in enumerate(parts) if part == own_name)]:
            for path_there in self._below(self.folder, parts[start:]):
                there = os.path.relpath(path_there, self.folder)
                if os.path.isfile(path_there) and there != named:
                    return f"there is {shown(there)}{_difference(named, there)}"
        return None

    def _below(self, folder: str, parts: list[str]) -> Iterator[str]:
        """Paths whose names are alike to these."""
        if not parts:
            yield folder
            return
        names = self._names_in(folder)
        alike = [name for name in names if _plain(name) == _plain(parts[0])]
        if not alike and len(parts) == 1:
            stem = _plain(os.path.splitext(parts[0])[0])
            alike = [name for name in names if _plain(os.path.splitext(name)[0]) == stem]
        for name in sorted(alike, key=lambda name: name != parts[0]):
            yield from self._below(os.path.join(folder, name), parts[1:])

    def _names_in(self, folder: str) -> list[str]:
        if folder not in self._names:
            try:
                self._names[folder] = sorted(os.listdir(folder))
            except OSError:  # not a folder, or not to be read: nothing is known to be there
                self._names[folder] = []
        return self._names[folder]


def _no_spaces(path: str) -> str:
    return "/".join(part.strip() for part in path.split("/"))


_ASIDE: dict[str, Callable[[str], str]] = {  # what systems tell apart differently, and the path without it
    "with / and not \\": lambda path: path.replace("\\", "/"),
    "in another Unicode form": partial(unicodedata.normalize, "NFC"),
    "with other spaces at the ends": _no_spaces,
    "in other letter case": str.casefold,
}


def _plain(path: str, but: str = "") -> str:
    for difference, without in _ASIDE.items():
        path = path if difference == but else without(path)
    return path


def _difference(named: str, there: str) -> str:
    """What the eye may miss, in brackets."""
    if _plain(named) != _plain(there):
        return ""
    seen = [difference for difference in _ASIDE if _plain(named, but=difference) != _plain(there, but=difference)]
    return f" ({', '.join(seen)})" if seen else ""
