"""What each file of a checkpoint was when it was written, so that a changed bit is noticed before a step is taken.

digests.json   path in the checkpoint -> [bytes, SHA-256], of every file; of itself, those of the other entries as it
               has them  (no torch)
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError
from reeltune.core.reading import brief

NAME = "digests.json"
SHA256 = re.compile("[0-9a-f]{64}")
REMEDY = "take an earlier checkpoint, or delete this file, without which a changed bit in the others is not noticed"
Digests = dict[str, tuple[int, str]]


def files_of(checkpoint: Path) -> list[Path]:
    """All of its files, in one order everywhere, without their digests' own."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path != checkpoint / NAME)


def digest(checkpoint: Path, files: Iterable[Path]) -> Digests:
    """Reads the files."""
    digests = {}
    for path in files:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        digests[path.relative_to(checkpoint).as_posix()] = path.stat().st_size, sha256
    return digests


def write(checkpoint: Path, digests: Mapping[str, tuple[int, str]]) -> None:
    (checkpoint / NAME).write_text(json.dumps({**digests, NAME: _of_entries(digests)}, indent=1) + "\n")


def read(checkpoint: Path) -> Digests | None:
    """The checkpoint's digests; None if it has none, as versions before 0.2 wrote. Raises UserError if they cannot be
    read, or are not as they were written: the files that they name may be sound then."""
    path = checkpoint / NAME
    if not path.is_file():
        return None
    try:
        digests = {str(name): _entry(entry) for name, entry in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as broken:
        raise UserError(str(path), f"cannot be read ({broken}); {REMEDY}") from broken
    own = digests.pop(NAME, None)  # earlier versions wrote none
    if own is not None and own != _of_entries(digests):
        raise UserError(str(path), f"is not as it was written, so that it tells nothing of other files; {REMEDY}")
    return digests


def _entry(entry: Any) -> tuple[int, str]:
    """Raises ValueError or TypeError for what is none."""
    size_bytes, sha256 = entry
    if type(size_bytes) is not int or size_bytes < 0 or not SHA256.fullmatch(sha256):
        raise ValueError(f"{brief(entry)} is no number of bytes with a SHA-256")
    return size_bytes, sha256


def _of_entries(digests: Mapping[str, tuple[int, str]]) -> tuple[int, str]:
    text = json.dumps(digests, sort_keys=True).encode()
    return len(text), hashlib.sha256(text).hexdigest()


def damages(checkpoint: Path, *, part: int = 0, parts: int = 1, under: tuple[str, ...] = ("",)) -> list[str]:
    """What is not as it was written, a line for each file; nothing for a checkpoint without digests.

    part: of `parts` processes that share the reading, each of every so-manieth file. under: beginnings of the names of
    the files that are looked at.
    """
    written = read(checkpoint)
    if written is None:
        return []
    there = {path.relative_to(checkpoint).as_posix(): path for path in files_of(checkpoint)}
    lines = []
    for name in sorted(name for name in written if name.startswith(under))[part::parts]:
        size_bytes, sha256 = written[name]
        path = there.get(name)
        if path is None:
            lines.append(f"{name} is gone")
        elif path.stat().st_size != size_bytes:
            lines.append(f"{name} has {path.stat().st_size:,} bytes, and was written with {size_bytes:,}")
        elif digest(checkpoint, [path])[name][1] != sha256:
            lines.append(f"{name} has other bytes than were written, of the same number")
    return lines
