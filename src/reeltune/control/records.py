"""What is known of every control that was made: control/.state/KIND/HASH.json, one for each file.  (no torch)

A record is written before its control, without what the control holds ("begun"), and again after it. So whatever
moment a process is killed or the disk is full at, a control without a whole record is made again, and a file that no
record names was put there by somebody else and is never written over.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import IO

from reeltune.control.entries import FOLDER
from reeltune.core.errors import UserError
from reeltune.core.files import whole_file, writing
from reeltune.core.reading import NUMBER, TEXT, WHOLE, Kind, read_table, require_fields

FORMAT = 1  # raise it when the same clip and detector give another control: all are then made again
STATE = f"{FOLDER}/.state"
REMEDY = "delete it; reeltune control then names the control that it was of, to be moved away and made again"
OFFSETS = 2**60


@dataclass(frozen=True)
class Made:
    """One control, or why there is none."""

    key: str  # `key_of`
    kind: str
    clip: str  # as control, from the data's folder on
    control: str
    detector: str  # digest
    frames: int = 0
    bytes: int = 0  # of the control; 0: begun, or there is none
    blake2b: str = ""
    score: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)
    reason: str = ""  # why there is no control

    @property
    def done(self) -> bool:
        return bool(self.bytes or self.reason)


_KINDS = {
    **dict.fromkeys(("key", "kind", "clip", "control", "detector", "blake2b", "reason"), TEXT),
    **dict.fromkeys(("frames", "bytes"), WHOLE),
    "score": NUMBER,
    "facts": Kind(lambda value: isinstance(value, dict) and all(map(NUMBER.holds, value.values())), "a table"),
}


def key_of(kind: str, detector: str, content: int, control: str) -> str:
    """A digest of all that a control's bytes depend on: detector and settings, the clip's bytes (`content_of`), the
    place."""
    told = json.dumps([FORMAT, kind, detector, content, control])
    return blake2b(told.encode(), digest_size=16).hexdigest()


class Records:
    """The records of one data folder."""

    def __init__(self, data_dir: Path):
        self.data_dir = data_dir

    def path(self, kind: str, control: str) -> Path:
        return self.data_dir / STATE / kind / f"{_hash(control)}.json"

    def get(self, kind: str, control: str) -> Made | None:
        """Raises UserError for a damaged one."""
        path = self.path(kind, control)
        return _read(path) if path.is_file() else None

    def put(self, made: Made) -> None:
        """Raises CannotWriteError."""
        with whole_file(self.path(made.kind, made.control)) as file:
            json.dump(asdict(made), file)

    def all(self, kind: str) -> Iterator[tuple[Path, Made]]:
        for path in sorted((self.data_dir / STATE / kind).glob("*.json")):
            yield path, _read(path)

    def is_whole(self, made: Made, key: str) -> bool:
        """Whether that control need not be made: by key and size; bytes are read by `verify`."""
        if made.key != key or not made.done:
            return False
        return bool(made.reason) or size_of(self.data_dir / made.control) == made.bytes

    def is_as_written(self, made: Made) -> bool:
        """Reads every byte of that control."""
        control = self.data_dir / made.control
        return size_of(control) == made.bytes and hash_of(control) == made.blake2b

    def set_aside(self, control: str) -> str:
        """A control that is not as it was written, so that it is made again. Returns its new name."""
        path = self.data_dir / control
        aside = path.with_name(f"{path.name}.damaged")
        with writing(path, "it stays where it is"):
            path.replace(aside)
        return aside.name

    def may_go(self, control: str, made: Made | None) -> bool:
        """Whether nothing is lost with what lies there: it is what `reeltune control` has written, or nothing."""
        if size_of(self.data_dir / control) < 0:
            return True
        if made is None or made.reason:
            return False
        return not made.bytes or self.is_as_written(made)


def _read(path: Path) -> Made:
    table = read_table(path, REMEDY)
    require_fields(table, _KINDS, path, REMEDY)
    return Made(**{name: table[name] for name in _KINDS})


def made_by(control: str | Path) -> Made | None:
    """What is known of a control by its own path; None of a file that `reeltune control` has not made, or that has
    another size now."""
    place = place_of(control)
    made = None if place is None else place[0].get(*place[1:])
    return made if made is not None and made.bytes == size_of(Path(control)) else None


def data_dir_of(folder: str) -> str | None:
    """The data's folder whose controls lie in this absolute folder; None where none can."""
    above = folder
    while above != os.path.dirname(above):
        above, name = os.path.split(above)
        if name == FOLDER and os.path.isdir(os.path.join(above, STATE)):
            return above
    return None


def place_of(control: str | Path, find: Callable[[str], str | None] = data_dir_of) -> tuple[Records, str, str] | None:
    """(records of its data folder, its kind, itself from that folder on) of a path below a folder of controls.

    find: `data_dir_of`, or one that remembers what it has found, for many.
    """
    folder, name = os.path.split(os.path.abspath(control))
    data_dir = find(folder)
    if data_dir is None:
        return None
    inside = os.path.join(folder, name)[len(os.path.join(data_dir, "")) :]
    return Records(Path(data_dir)), inside.split(os.sep)[1], inside


def size_of(path: Path) -> int:
    """-1 where there is no file."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def _hash(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class Claims:
    """Who makes which control: a byte of one file is locked for each, and let go when its process ends, however it
    does. Works across machines where the file system has locks."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path = file, path

    @contextmanager
    def claimed(self, control: str) -> Iterator[bool]:
        """Whether it is ours now; False: another process has it. Raises UserError where there are no locks."""
        place = int(_hash(control), 16) % OFFSETS
        if not self._lock(1, place):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, place)

    def alone(self) -> bool:
        """Claims everything, if no other process has any of it."""
        return self._lock(0, 0)

    def _lock(self, length: int, start: int) -> bool:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as without:
            raise UserError(
                str(self.path),
                f"cannot be locked ({without.strerror}), so processes would write over each other's controls; put the "
                "data on a file system with locks",
            ) from without
        return True


@contextmanager
def claims(data_dir: Path) -> Iterator[Claims]:
    """Raises CannotWriteError."""
    path = data_dir / STATE / "lock"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        yield Claims(file, path)
