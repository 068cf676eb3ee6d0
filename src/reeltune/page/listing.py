"""A data list as it stands in its file: rows, what each names, and those that a filter keeps.  (no torch)"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from reeltune.data.lists import read_list, rows
from reeltune.data.metadata import Folder, Row, check_row

PER_PAGE = 24
KEPT = 4  # lists that are held at a time
OWN_FILTERS = {  # name -> what it keeps, of a row alone
    "all": "all entries",
    "unsound": "left out by their own fields",
    "uncaptioned": "without a caption",
    "uncontrolled": "without control",
    "twice": "of a file that is there twice",
}
MEASURED_FILTERS = {  # name -> what it keeps, once the files are measured; all but the first of a recipe alone
    "left_out": "left out",
    "held_out": "held out",
    "repeated": "drawn more than once in the first epoch",
    "short": "shorter than asked for",
    "cut": "whose caption is cut",
}


def needs_of(fields: Any) -> frozenset[str]:
    """What the row names beside its clip, so that its path is looked at."""
    named = fields.get("control_file_path") if isinstance(fields, dict) else None
    if not isinstance(named, str) or not named.strip():
        return frozenset()
    return frozenset({"camera" if named.lower().endswith(".txt") else "control"})


@dataclass
class Listing:
    """One state of the file. `folder` is what its paths are relative to."""

    path: Path
    folder: Folder
    entries: list[Any]  # whatever value each is

    def row(self, entry: int) -> Row:
        return check_row(self.entries[entry], self.folder, needs_of(self.entries[entry]))

    def text(self, entry: int) -> str:
        """The caption as it stands there; empty where there is none."""
        fields = self.entries[entry]
        text = fields.get("text") if isinstance(fields, dict) else None
        return text if isinstance(text, str) else ""

    @cached_property
    def kept(self) -> dict[str, np.ndarray]:
        """Filter of OWN_FILTERS -> its entries, ascending."""
        count = len(self.entries)
        unsound, uncaptioned, uncontrolled = (np.zeros(count, bool) for _ in range(3))
        files: dict[str, list[int]] = {}
        for entry in range(count):
            row = self.row(entry)
            unsound[entry] = bool(row.problems)
            uncaptioned[entry] = not row.text.strip()
            uncontrolled[entry] = not (row.control or row.camera)
            if row.path:
                files.setdefault(row.path, []).append(entry)
        twice = sorted(entry for entries in files.values() if len(entries) > 1 for entry in entries)
        return {
            "all": np.arange(count),
            "unsound": np.flatnonzero(unsound),
            "uncaptioned": np.flatnonzero(uncaptioned),
            "uncontrolled": np.flatnonzero(uncontrolled),
            "twice": np.array(twice, np.int64),
        }

    def searched(self, entries: Iterable[int], words: str) -> np.ndarray:
        """The entries whose caption or path holds the words, in any case."""
        wanted = words.casefold()

        def holds(fields: Any) -> bool:
            if not isinstance(fields, dict):
                return False
            return any(wanted in str(fields.get(key, "")).casefold() for key in ("text", "file_path"))

        return np.array([entry for entry in entries if holds(self.entries[entry])], np.int64)


def read_listing(path: Path, data_dir: Path) -> Listing:
    """Raises UserError for what is no list."""
    data = read_list(path)
    try:
        value = json.loads(data.decode("utf-8-sig")) if path.suffix.lower() == ".json" else None  # a third of the time
    except (ValueError, RecursionError):  # `rows` says what is wrong
        value = None
    entries = value if isinstance(value, list) and value else list(rows(path, data))
    return Listing(path, Folder(data_dir, allow_outside_paths=False), entries)


class Listings:
    """The lists that were asked for last, each read anew once its file has changed."""

    def __init__(self, read: Callable[[Path, Path], Listing] = read_listing):
        self._read = read
        self._kept: dict[tuple[Path, Path], tuple[tuple[int, int, int], Listing]] = {}
        self._lock = threading.Lock()

    def get(self, path: Path, data_dir: Path) -> Listing:
        with self._lock:
            status = os.stat(path)
            stamp = status.st_ino, status.st_mtime_ns, status.st_size
            key = path, data_dir
            held = self._kept.pop(key, None)
            if held is None or held[0] != stamp:
                held = stamp, self._read(path, data_dir)
            self._kept[key] = held  # last is latest
            while len(self._kept) > KEPT:
                del self._kept[next(iter(self._kept))]
            return held[1]
