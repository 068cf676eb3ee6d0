"""Files that are there whole or not at all, whenever a process is killed or the disk is full.  (no torch)"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
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
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
UNTOLD = (
    "file write failed",
    "iostream error",
    "unexpected pos",
)  # torch's writers, which do not pass the system's words on
MOST_LETTERS = 50  # of a name, in that of the file beside it: names have 255 bytes at most, and letters up to 4
MOST_SHOWN = 300  # letters of a path
SHELL_WORD = re.compile(r"^~[^/]*(?=/|$)|(?:^|/)\$(?:\w+|\{\w+\})(?=/|$)")
NO_NAMES = ("", "..")  # of `/` and `.`, and of a folder's own folder
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF)
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
            raise CannotWriteError(
                str(self.path),
                f"cannot be written ({_reason(error)}{room(self.path)}); {self.stays}; make room there or give another "
                "folder, and run the same command again",
            ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, FileExistsError) and error.filename is not None:  # where a folder was to be made
        there = Path(os.fsdecode(error.filename))
        lost = there.is_symlink() and not there.exists()
        return f"{there} is a link that leads nowhere" if lost else f"{there} is a file"
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]


def is_disk_error(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in REFUSED + LOST:
        return True
    words = str(error)
    return any(told in words for told in (*map(os.strerror, REFUSED + LOST), *UNTOLD))


def shell_word(path: str) -> str | None:
    """What of a path only a shell replaces, and would else be a folder of that name: ~ or $HOME. It does so in none of
    YAML, quotes and, of ~, --name=~/folder."""
    found = SHELL_WORD.search(path)
    return found[0].strip("/") if found else None


def is_utf8(text: str, *, any_bytes: bool = False) -> bool:
    """Whether UTF-8 can write a text. any_bytes: as Python holds those of a file's name; else none may be half of a
    surrogate pair."""
    try:
        text.encode(errors="surrogateescape" if any_bytes else "strict")
    except UnicodeEncodeError:
        return False
    return True


def refusal(error: OSError) -> UserError:
    """What the system refused (one of REFUSED), of the path that it names; without one it was what is printed."""
    if error.filename is None:
        return UserError("reeltune", f"what it prints cannot be written ({error.strerror}); make room there")
    path = os.fsdecode(error.filename)
    where = path if len(path) <= MOST_SHOWN else f"{path[:MOST_SHOWN]}…"
    return UserError(
        where, f"is refused by the system ({error.strerror}); look at the path, at its rights and its disk"
    )


def room(path: Path) -> str:
    """The free space of its disk, as the end of a parenthesis; empty where that is not known."""
    there = next((folder for folder in (path, *path.parents) if os.path.exists(folder)), None)
    try:
        return "" if there is None else f"; {shutil.disk_usage(there).free / 1e9:,.1f} GB free"
    except OSError:
        return ""


@contextmanager
def whole_file(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A file to write, text in UTF-8. Closed, it is on the disk, and takes the place of `path`, whose folder is made.

    Half of a surrogate pair, which UTF-8 has not, is written as JSON's escape of it.
    A reader sees the old file or the new one, never a part. Raises CannotWriteError; the old one then stays.
    """
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with whole_path(path) as beside, beside.open(mode, **({} if mode == "wb" else text)) as file:
        yield file


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Where a library that opens its file itself is to write it: what `whole_file` does, for a path."""
    with writing(path):
        if path.name in NO_NAMES:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        chance = os.urandom(4).hex()  # not the pid, which a process on another machine may have
        beside = path.with_name(f".{path.name[:MOST_LETTERS]}.{chance}.partial")
        try:
            yield beside
            flush_file(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        flush_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Where to write what is to be in a folder: what `whole_file` does, for all of it. `path` is not there, or empty.

    Raises CannotWriteError, and nothing is left of it then; UserError while another process writes the same.
    """
    beside = path.with_name(f".{path.name}.partial")
    with writing(path, "nothing is left of it"), _held(beside):
        try:
            yield beside
            flush_tree(beside)
            if path.exists():
                path.rmdir()
            beside.rename(path)
            flush_folder(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A folder that is made, or emptied of what a killed process has left in it, for this process alone. Raises
    UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            place = folder.name.removeprefix(".").removesuffix(".partial")
            raise UserError(
                str(folder.with_name(place)),
                "is being written by another process; wait until it has ended, or give another place",
            ) from None
        except OSError as without:  # some network file systems
            if without.errno not in NO_LOCKS:
                raise
        for left in folder.iterdir():
            remove(left)
        yield
    finally:
        os.close(handle)


def free_path(path: Path) -> Path:
    """The path itself where nothing is, else the first with a number before its ending where nothing is: a.2.txt."""
    others = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(2))
    return next(one for one in chain([path], others) if not os.path.lexists(one))


def renamed(path: Path, to: Path) -> Path:
    """Renames it to where nothing is. A link leads there to what it led to, also by a relative path."""
    if not path.is_symlink() or os.path.isabs(led_to := os.readlink(path)):
        return path.rename(to)
    to.symlink_to(path.absolute().parent / led_to)
    path.unlink()
    return to


def remove(path: Path) -> None:
    """Deletes a folder with all in it, or a file; of a link the link alone. One that is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_file(path: Path) -> None:
    """What is in it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_tree(folder: Path) -> int:
    """Everything below it is on the disk. Returns its size in bytes."""
    size_bytes = 0
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            flush_file(path)
            size_bytes += path.stat().st_size
        else:
            flush_folder(path)
    flush_folder(folder)
    return size_bytes


def flush_folder(folder: Path) -> None:
    """The names in it are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
