"""Files that are there whole or not at all, whenever a process is killed or the disk is full.  (no torch)"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from reeltune.core.errors import UserError

REFUSED = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,
)
LOST = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN)  # what was mounted there is gone


class CannotWriteError(UserError):
    """The disk is full or refuses."""


class writing:
    """Within, what the disk refuses becomes CannotWriteError: path, reason, the room there, and what stays good.

    Libraries wrap the system's error in one of their own, so its words count too. Other errors pass through.
    """

    def __init__(self, path: Path, stays: str = "what was there before stays as it was"):
        self.path, self.stays = Path(path), stays

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, UserError) and is_disk_error(error):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise CannotWriteError(
                str(self.path),
                f"cannot be written ({reason}{_room(self.path)}); {self.stays}; make room there or give another "
                "folder, and run the same command again",
            ) from error


def is_disk_error(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in REFUSED + LOST:
        return True
    words = str(error)
    return any(os.strerror(number) in words for number in REFUSED + LOST) or "file write failed" in words


def _room(path: Path) -> str:
    there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
    try:
        return "" if there is None else f"; {shutil.disk_usage(there).free / 1e9:,.1f} GB free"
    except OSError:
        return ""


@contextmanager
def whole_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A file to write, text in UTF-8. Closed, it is on the disk, and takes the place of `path`, whose folder is made.

    A reader sees the old file or the new one, never a part. Raises CannotWriteError; the old one then stays.
    """
    encoding, newline = (None, None) if mode == "wb" else ("utf-8", "")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")  # other machines may have this pid
        try:
            with beside.open(mode, encoding=encoding, newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """The names in it are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
