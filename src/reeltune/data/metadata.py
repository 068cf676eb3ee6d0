"""One row of a metadata file, checked as far as it can be without opening what it names.  (no torch)

Keys (others are ignored):
    file_path                clip or picture, relative to the data folder
    text                     its caption
    type                     "video" or "image"; left out: told by the file's ending
    control_file_path        a control clip or picture, key points that are drawn as one (.npz), or a camera path
                             (.txt); null is the same as left out
    object_file_path         subject pictures: one path or a list
    width, height            pixels; compared with the file, whose own size counts
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from reeltune.core.files import is_utf8
from reeltune.core.types import Kind
from reeltune.data.lists import OUR_KEYS, Misshapen, Twice, kind_of, renames
from reeltune.data.records import Records

__all__ = ["Folder", "LeftOut", "Problem", "Records", "Row", "check_row", "shown"]

IMAGE_ENDINGS = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VIDEO_ENDINGS = frozenset({".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts",
                           ".webm", ".wmv"})  # fmt: skip
EMPTY_WORDS = frozenset({"nan", "none", "null", "n/a", "<na>", "undefined"})  # what tables write for nothing
FILE_NAME = re.compile(r"\S+\.(txt|caption|json|jsonl|csv|md)|[^\n]*[/\\][^\n]*\.(txt|caption|json|jsonl|csv|md)", re.I)
SHOWN = 120  # characters of a value in a message
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.I)  # of another machine's file (RFC 3986, 3.1)


class Problem(NamedTuple):
    reason: str
    remedy: str


@dataclass(frozen=True)
class LeftOut:
    """A row that cannot be trained on."""

    entry: int  # 0-based place in the metadata file
    path: str  # as the list names it; empty if it names none
    reason: str
    remedy: str

    def __str__(self) -> str:
        path = f", {shown(self.path)}" if self.path else ""
        return f"entry {self.entry}{path}: {self.reason}. {self.remedy}"


@dataclass(slots=True)
class Row:
    """The fields of a row; paths are absolute. Where there are problems, the rest may be unset."""

    named: str = ""
    path: str = ""
    kind: Kind = "video"
    text: str = ""
    control: str | None = None
    camera: str | None = None
    subjects: list[str] = field(default_factory=list)
    stated: tuple[int | None, int | None] = (None, None)  # height, width
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


class Folder:
    """The data folder, and which paths lie in it. Links inside it may point anywhere: who made them meant them."""

    def __init__(self, data_dir: Path, allow_outside_paths: bool):
        self.path = os.path.abspath(data_dir)
        self.real_path = os.path.realpath(data_dir)
        self.allow_outside_paths = allow_outside_paths
        self._beginnings = tuple(path.rstrip(os.sep) + os.sep for path in (self.path, self.real_path))  # of / too

    def join(self, named: str) -> str | None:
        """The absolute path, or None where it leaves the folder."""
        named = os.sep + named.lstrip(os.sep) if os.path.isabs(named) else named  # a second one counts as the first
        path = os.path.normpath(os.path.join(self.path, named))
        if self.allow_outside_paths or path.startswith(self._beginnings):
            return path
        return None


def shown(value: Any) -> str:
    """A value in a message: one line, escaped, cut to SHOWN characters."""
    text = value if isinstance(value, str) and value.strip() and value.isprintable() else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def check_row(fields: Any, folder: Folder, needs: frozenset[str]) -> Row:
    """The row, with every problem that its own fields show. `needs`: "control", "camera", or both."""
    row = Row()
    if isinstance(fields, Misshapen):
        row.problems.append(Problem(str(fields), "Give the row every column; put quotes around cells with commas"))
        return row
    if not isinstance(fields, dict):
        row.problems.append(Problem(f"is {kind_of(fields)}, not an object", 'Write {"file_path": ..., "text": ...}'))
        return row
    if isinstance(fields, Twice):
        names = ", ".join(map(shown, fields.names))
        row.problems.append(Problem(f"gives {names} more than once", "Leave all but one out"))
    named = fields.get("file_path")
    row.named = named if isinstance(named, str) else ""
    if named is None:
        row.problems.append(_missing(fields, "file_path", "Name its clip or picture"))
    else:
        row.path = _path(row, folder, "file_path", named) or ""
    _check_text(row, fields)
    _check_type(row, fields)
    _check_control(row, fields, folder, needs)
    _check_subjects(row, fields, folder)
    row.stated = (_pixels(row, fields, "height"), _pixels(row, fields, "width"))
    return row


def _missing(fields: dict[str, Any], key: str, remedy: str) -> Problem:
    """Says what is there under another name, if anything is."""
    names = ", ".join(given for given, ours in renames(fields) if ours == key)
    if names:
        return Problem(f"has no {key}, but {names}", f"Rename {names} to {key}")
    others = ", ".join(shown(given) for given in list(fields)[:8] if given not in OUR_KEYS)
    return Problem(f"has no {key}" + (f"; its other keys are {others}" if others else ""), remedy)


def _path(row: Row, folder: Folder, key: str, named: Any) -> str | None:
    if not isinstance(named, str):
        row.problems.append(Problem(f"{key} is {kind_of(named)}, not a string", "Give one path as a string"))
    elif not named.strip():
        row.problems.append(Problem(f"{key} is empty", "Give a path"))
    elif "\0" in named or not is_utf8(named):
        row.problems.append(Problem(f"{key} {shown(named)} cannot be a file's name", "Correct the path"))
    elif ADDRESS.match(named):
        remedy = "Give the path of the file in the data folder, downloaded there if need be"
        row.problems.append(Problem(f"{key} {shown(named)} is an address, not a path", remedy))
    elif (path := folder.join(named)) is None:
        reason = f"{key} {shown(named)} leaves the data folder"
        row.problems.append(Problem(reason, "Move the file into it, or set allow_outside_paths"))
    else:
        return path
    return None


def _check_text(row: Row, fields: dict[str, Any]) -> None:
    text = fields.get("text")
    if "text" not in fields:
        row.problems.append(_missing(fields, "text", 'Give a caption; "" trains without one'))
    elif not isinstance(text, str):
        row.problems.append(Problem(f"text is {kind_of(text)}, not a string", 'Give a caption; "" trains without one'))
    elif not is_utf8(text):
        row.problems.append(Problem("text is no valid Unicode: it holds half of a character", "Correct the caption"))
    else:
        row.text = text
        if not text.strip():
            row.notices.append("the caption is empty, and the sample is trained without text")
        elif (word := text.strip().lower()) in EMPTY_WORDS:
            row.notices.append(f"the caption is the word {word}, perhaps of an empty cell; the model learns that word")
        elif len(text) < 1024 and FILE_NAME.fullmatch(text.strip()):
            row.notices.append("the caption is a file's name, and the model learns that; put in what the file says")


def _check_type(row: Row, fields: dict[str, Any]) -> None:
    stated = fields.get("type")
    ending = os.path.splitext(row.named.strip())[1].lower()
    if stated is None:
        if ending in VIDEO_ENDINGS | IMAGE_ENDINGS:
            row.kind = "video" if ending in VIDEO_ENDINGS else "image"
            row.notices.append("there is no type, and the file's ending tells it")
        elif row.path:
            reason = f"has no type, and the ending of {shown(row.named)} does not tell it"
            row.problems.append(Problem(reason, 'Give type "video" or "image"'))
    elif stated in ("video", "image"):
        row.kind = stated
    elif isinstance(stated, str) and stated.strip().lower() in ("video", "image"):
        row.kind = "video" if stated.strip().lower() == "video" else "image"
        row.notices.append(f"type {shown(stated)} is taken as {row.kind!r}")
    else:
        row.problems.append(Problem(f"type is {shown(stated)}", 'Give type "video" or "image"'))


def _check_control(row: Row, fields: dict[str, Any], folder: Folder, needs: frozenset[str]) -> None:
    key = "control_file_path"
    named = fields.get(key)
    if named is not None:
        path = _path(row, folder, key, named)
        if path is None:
            return
        if path.lower().endswith(".txt"):
            row.camera = path if "camera" in needs else None
        else:
            row.control = path if "control" in needs else None
    given = "null" if key in fields and named is None else "missing" if named is None else shown(named)
    if given == "missing" and (names := [name for name, ours in renames(fields) if ours == key]):
        given = f"missing, but there is {', '.join(names)}: perhaps rename it"
    if "control" in needs and row.control is None:
        rule = "this mode needs a control clip or picture, or key points (.npz)"
        row.problems.append(Problem(f"{key} is {given}; {rule}", f"Give one as {key}"))
    if "camera" in needs and row.camera is None:
        row.problems.append(Problem(f"{key} is {given}; this mode needs a camera path (.txt)", f"Give one as {key}"))


def _check_subjects(row: Row, fields: dict[str, Any], folder: Folder) -> None:
    named = fields.get("object_file_path")
    if named is None:
        return
    for one in named if isinstance(named, list) else [named]:
        path = _path(row, folder, "object_file_path", one)
        if path is not None:
            row.subjects.append(path)


def _pixels(row: Row, fields: dict[str, Any], key: str) -> int | None:
    stated = fields.get(key)
    if stated is None:
        return None
    try:
        pixels = math.nan if isinstance(stated, bool | list | dict) else float(stated)
    except (ValueError, OverflowError):
        pixels = math.nan
    if pixels >= 1 and pixels.is_integer():
        return int(pixels)
    reason = f"{key} is {shown(stated)}, not a positive whole number"
    row.problems.append(Problem(reason, "Correct it, or leave width and height out"))
    return None
