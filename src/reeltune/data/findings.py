"""What is found out about one file, or why it cannot be used.  (no torch)"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from typing import Literal

from reeltune.core.types import Kind

DecodeCheck = Literal["ends", "full", "header"]

COMPARED_BYTES = 64 * 1024  # of each end of a file, to tell whether another holds the same


class MediaError(Exception):
    """Why one file cannot be used. `lasting`: its bytes are the cause, so trying again is of no use. `remedy`: what
    to do about it, where there is more to say than to mend or replace the file."""

    def __init__(self, reason: str, *, lasting: bool = True, remedy: str = ""):
        super().__init__(reason)
        self.lasting = lasting
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Measure:
    """One file as displayed. fps is 0.0 for a picture; `notes` tells what a user may want to know of it."""

    kind: Kind
    frames: int
    fps: float
    height: int
    width: int
    notes: tuple[str, ...] = ()
    content: int = 0  # see content_of


def require_file(path: str) -> None:
    """Raises MediaError for what is not a file with bytes that can be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise MediaError(f"cannot be opened: {error.strerror}", lasting=False) from None
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise MediaError("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
    if not os.access(path, os.R_OK):
        raise MediaError("cannot be opened: Permission denied", lasting=False)
    if status.st_size == 0:
        raise MediaError("is empty (0 bytes)")


def require_same(path: str, content: int) -> None:
    """Raises MediaError for another file than the one that was measured, as far as `content_of` tells; of 0 nothing."""
    require_file(path)
    try:
        is_same = not content or content_of(path) == content
    except OSError as error:
        raise MediaError(f"cannot be read: {error.strerror}", lasting=False) from None
    if not is_same:
        raise MediaError(  # the index, which goes by size and time, would have it measured anew only where these differ
            "is another file than when it was measured: it was written anew since; if with its old size and time, "
            "touch it to have it measured again",
            lasting=False,
        )


def content_of(path: str) -> int:
    """64 bits, signed, of the file's size and both its ends: the same for a copy, under whatever name."""
    size = os.path.getsize(path)
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=8)
    with open(path, "rb") as file:
        digest.update(file.read(COMPARED_BYTES))
        file.seek(max(size - COMPARED_BYTES, 0))
        digest.update(file.read(COMPARED_BYTES))
    return int.from_bytes(digest.digest(), "little", signed=True)
