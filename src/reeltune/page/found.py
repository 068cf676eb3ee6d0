"""What lies below the served folder: runs, data lists, caches and recipes; and which files may be shown.  (no torch)

Each is known by an id, which is made from its path; no request names a path. A link is followed only to what lies
below the folder too.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reeltune.config.moved import OF_A_RUN
from reeltune.config.parse import read, settings
from reeltune.core.errors import UserError
from reeltune.core.reading import MOST_YAML_BYTES
from reeltune.data.lists import ENDINGS
from reeltune.run import lock

MOST_FOLDERS = 20_000  # looked into
MOST_DEPTH = 8
MOST_LISTS = 64  # files of one folder that are looked into: there may be one .json beside each clip
HEAD_BYTES = 64 * 1024  # of a file, in which a list names its key
UNSEEN = frozenset({"__pycache__", "node_modules", "previews", "first_batch", "index", "tensorboard", "shards"})
METRICS = "metrics.jsonl"
READ_OF_A_RUN = (METRICS, OF_A_RUN, lock.NAME, "ledger.json", "recipe.yaml", "validation/start.json")


@dataclass(frozen=True)
class FoundRecipe:
    """A recipe, and the files that it names, where they lie."""

    path: Path
    settings: dict[str, object]

    def named(self, setting: str) -> Path | None:
        """Relative ones are relative to where the server was started, as they are for `reeltune train`."""
        value = self.settings.get(setting)
        return Path(os.path.abspath(value)) if isinstance(value, str) and value else None


@dataclass
class Found:
    runs: dict[str, Path] = field(default_factory=dict)  # id -> folder
    lists: dict[str, Path] = field(default_factory=dict)  # id -> metadata file
    caches: dict[str, Path] = field(default_factory=dict)  # id -> folder
    recipes: dict[str, FoundRecipe] = field(default_factory=dict)  # id -> a recipe, those of runs too
    whole: bool = True  # False: there are more folders than are looked into


class Shelf:
    """Finds them, again at each `look`, and answers which files lie in the folder."""

    def __init__(self, folder: Path):
        self.folder = Path(os.path.abspath(folder))
        self.real = os.path.realpath(folder)
        self.found = Found()
        self._known: dict[Path, tuple[tuple[int, int], FoundRecipe | bool | None]] = {}  # file -> stamp, what it is
        self._lock = threading.Lock()

    def look(self) -> Found:
        with self._lock:
            found = Found()
            for count, (folder, names) in enumerate(self._folders()):
                if count == MOST_FOLDERS:
                    found.whole = False
                    break
                self._take(found, folder, names)
            self.found = found
            return found

    def id_of(self, path: Path) -> str:
        return hashlib.blake2b(
            os.path.relpath(path, self.folder).encode("utf-8", "surrogateescape"), digest_size=8
        ).hexdigest()

    def name_of(self, path: Path) -> str:
        """A path as it is shown: below the folder."""
        named = os.path.relpath(path, self.folder)
        return self.folder.name if named == "." else named.encode("utf-8", "replace").decode()

    def holds(self, path: str | Path) -> bool:
        """Whether what the path leads to, through all links, lies in the folder, or is it."""
        return os.path.join(os.path.realpath(path), "").startswith(os.path.join(self.real, ""))

    def file(self, path: str | Path) -> Path | None:
        """The regular file that the path leads to, None for none and for one outside."""
        real = Path(os.path.realpath(path))
        return real if self.holds(real) and os.path.isfile(real) else None  # also of a path that cannot be

    def _folders(self) -> Iterator[tuple[Path, list[str]]]:
        """(folder, names of its files) from the top; links to folders are not followed."""
        left = [(self.folder, 0)]
        while left:
            folder, depth = left.pop()
            names = []
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            seen = entry.name not in UNSEEN and not entry.name.startswith((".", "checkpoint-"))
                            if seen and depth < MOST_DEPTH:
                                left.append((Path(entry.path), depth + 1))
                            elif entry.name == "shards":
                                names.append(entry.name)
                        else:
                            names.append(entry.name)
            except OSError:  # not ours to read, or gone
                continue
            yield folder, sorted(names)

    def _take(self, found: Found, folder: Path, names: list[str]) -> None:
        is_run = OF_A_RUN in names or METRICS in names
        if is_run and all(self.holds(folder / name) for name in READ_OF_A_RUN):
            found.runs[self.id_of(folder)] = folder
        if "shards" in names:
            found.caches[self.id_of(folder)] = folder
        looked_into = 0
        for name in names:
            path = folder / name
            if name.endswith((".yaml", ".yml")) and isinstance(recipe := self._what(path), FoundRecipe):
                found.recipes[self.id_of(path)] = recipe
            elif name.lower().endswith(ENDINGS) and looked_into < MOST_LISTS:
                looked_into += 1
                if self._what(path):
                    found.lists[self.id_of(path)] = path

    def _what(self, path: Path) -> FoundRecipe | bool | None:
        """The recipe in it, or whether it is a list; remembered until it changes."""
        real = self.file(path)
        if real is None:
            return None
        try:
            status = real.stat()
            stamp = status.st_mtime_ns, status.st_size
            if self._known.get(path, (None,))[0] != stamp:
                self._known[path] = stamp, _recipe(path) if path.suffix in (".yaml", ".yml") else _is_list(real)
        except OSError:  # gone, or not ours to read
            return None
        return self._known[path][1]


def _recipe(path: Path) -> FoundRecipe | None:
    if path.stat().st_size > MOST_YAML_BYTES:
        return None
    try:
        table = read(path)
    except UserError:  # YAML of something else
        return None
    known = settings()
    return FoundRecipe(path, table) if table and sum(name in known for name in table) * 2 > len(table) else None


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix.lower() == ".csv":
        columns = head.partition(b"\n")[0].replace(b'"', b"").strip().split(b",")
        return b"file_path" in columns and b"status" not in columns  # which a ledger has
    return head[:1] in (b"[", b"{") and b'"file_path"' in head
