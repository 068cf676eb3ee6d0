"""Hashes of a checkpoint's files, each read once: what was hashed is remembered, and known by path, size, time of
change and inode.  (no torch)"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from reeltune.cache.keys import digest
from reeltune.cache.progress import ProgressBar
from reeltune.core.errors import UserError
from reeltune.core.files import CannotWriteError, whole_file
from reeltune.core.reading import read_json
from reeltune.core.user_folder import user_cache_folder

FOLDER = "fingerprints"  # of one small file for each that was hashed, so that processes do not write over each other's
PIECE_BYTES = 2**24  # read at once
MEGABYTE = 10**6


def fingerprints(files: Mapping[str, Path], cache_folder: Path, *, show_progress: bool = True) -> dict[str, str]:
    """A hash of the bytes of each file or folder, with a progress bar on stderr while any are read.

    Hashes are remembered in the user's cache folder and in `cache_folder`, of which one may be out of reach on another
    machine. What is damaged or missing there is hashed; what cannot be kept is hashed again by the next.
    """
    folders = [folder / FOLDER for folder in (user_cache_folder(), cache_folder) if folder is not None]
    inside = {name: _files_in(path) for name, path in files.items()}
    hashes = {file: _remembered(file, folders) for found in inside.values() for file in found}
    unknown = [file for file, known in hashes.items() if known is None]
    size_bytes = sum(file.stat().st_size for file in unknown)
    shown = show_progress and size_bytes > MEGABYTE
    with ProgressBar(-(-size_bytes // MEGABYTE), shown=shown, title="hash the checkpoint", unit=" MB") as bar:
        for file in unknown:
            stamp = _stamp(file)  # of before, so that a file that changes meanwhile is hashed again
            hashes[file] = hashed(file, lambda size_bytes: bar.advance(size_bytes / MEGABYTE))
            _remember(file, [*stamp, hashes[file]], folders)  # now: whatever ends this loses one
    return {
        name: digest([[str(file.relative_to(files[name])), hashes[file]] for file in found])
        for name, found in inside.items()
    }


def hashed(file: Path, on_read: Callable[[int], None]) -> str:
    """A hash of the file's bytes. on_read: is told of every piece's bytes."""
    hasher = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            hasher.update(piece)
            on_read(len(piece))
    return hasher.hexdigest()


def _files_in(path: Path) -> list[Path]:
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in inside if file.is_file()]


# ---- what is remembered of a file: [its path, bytes, nanoseconds of its last change, inode, hash]


def _stamp(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]


def _remembered(file: Path, folders: Sequence[Path]) -> str | None:
    stamp = _stamp(file)
    for folder in folders:
        memory = folder / _name(stamp)
        try:
            entry = read_json(memory) if memory.is_file() else None
        except UserError:
            continue
        if isinstance(entry, list) and entry[:-1] == stamp and isinstance(entry[-1], str):
            return entry[-1]
    return None


def _remember(file: Path, entry: list[Any], folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(CannotWriteError), whole_file(folder / _name(entry)) as memory:
            json.dump(entry, memory)


def _name(stamp: Sequence[Any]) -> str:
    return f"{digest(stamp[0])}.json"
