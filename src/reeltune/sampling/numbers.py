"""The numbers that clips of one command are named by, beside those of others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reeltune.core.files import writing

NUMBERED = re.compile(r"\.?(\d+)(?:-(\d+))?\.[a-z0-9]+", re.ASCII)  # 3.mp4, 3.json, 3-8.png; .3.taken


@contextmanager
def free_numbers(folder: Path, count: int) -> Iterator[range]:
    """`count` numbers above those of all files there. Until it is left, each is kept from other processes by a hidden
    file; one that a killed process has left costs a number. Raises CannotWriteError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while (numbers := _taken(folder, count)) is None:
            pass  # another process was quicker
    try:
        yield numbers
    finally:
        for number in numbers:
            _mark(folder, number).unlink(missing_ok=True)


def _taken(folder: Path, count: int) -> range | None:
    """The numbers, marked; None, and none is, where another process has marked one of them meanwhile."""
    named = [match for path in folder.iterdir() if (match := NUMBERED.fullmatch(path.name))]
    first = 1 + max((int(number) for match in named for number in match.groups() if number), default=-1)
    for number in range(first, first + count):
        try:
            _mark(folder, number).open("xb").close()
        except FileExistsError:
            for own in range(first, number):
                _mark(folder, own).unlink()
            return None
    return range(first, first + count)


def _mark(folder: Path, number: int) -> Path:
    return folder / f".{number}.taken"
