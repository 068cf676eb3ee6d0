"""Metadata files: bytes to rows. Nothing is checked here but the file's own form.  (no torch)"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError
from reeltune.core.reading import foreign

ENDINGS = (".json", ".jsonl", ".csv")
COLUMNS = ("file_path", "text")  # that a CSV header must name

MOST_DIGITS = sys.get_int_max_str_digits()  # of a whole number, in Python
LARGEST_BYTES = 2**31  # of a list; it is read as a whole, and a million entries take a tenth of it
# Keys of other tools' lists -> ours.
OTHER_KEYS = {
    **dict.fromkeys(("video", "video_path", "image", "image_path", "media", "media_path", "path", "file", "filename",
                     "file_name", "filepath"), "file_path"),
    **dict.fromkeys(("caption", "captions", "prompt", "description", "cap"), "text"),
    **dict.fromkeys(("control", "control_path", "control_video", "control_image", "control_video_path",
                     "conditioning_image", "conditioning_path"), "control_file_path"),
    **dict.fromkeys(("subject", "subject_path", "object", "object_path"), "object_file_path"),
}  # fmt: skip
OUR_KEYS = frozenset(
    {"file_path", "text", "type", "control_file_path", "object_file_path", "width", "height"}
)  # others are ignored

_SPACE = re.compile(r"[ \t\n\r]*")
_FOREIGN_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class Misshapen(str):
    """A row that has no fields, and why."""


class Twice(dict[str, Any]):
    """An object that gives some names more than once; of each the last value is in it."""

    names: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    twice, counts = Twice(fields), Counter(name for name, _ in pairs)
    twice.names = tuple(name for name, count in counts.items() if count > 1)
    return twice


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_list(meta: Path) -> bytes:
    """Raises UserError for what is no file, cannot be read or is too large."""
    try:
        status = meta.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise UserError(str(meta), f"is {what}; name a metadata file ({', '.join(ENDINGS)})")
        if status.st_size > LARGEST_BYTES:
            size, most = (f"{size / 2**30:,.1f} GiB" for size in (status.st_size, LARGEST_BYTES))
            raise UserError(str(meta), f"is {size} large, and a list may have {most}; leave out what is not needed")
        return meta.read_bytes()
    except OSError as error:
        raise UserError(str(meta), f"cannot be read: {error.strerror}{_near(meta)}") from None


def _near(meta: Path) -> str:
    """Lists beside it that may be what is meant."""
    try:
        lists = [path.name for path in meta.parent.iterdir() if path.suffix.lower() in ENDINGS and path != meta]
    except OSError:
        return ""
    close = difflib.get_close_matches(meta.name, lists, n=3)
    return f"; near are {', '.join(close)}" if close else ""


def renames(keys: Iterable[Any]) -> list[tuple[str, str]]:
    """(key, what it should be called) of those that other tools use, or ours in other letters, where ours is not there
    too."""
    keys = [key for key in keys if isinstance(key, str)]
    plain = ((key, key.strip().lower()) for key in keys)
    meant = ((key, name if name in OUR_KEYS else OTHER_KEYS.get(name)) for key, name in plain)
    return [(key, ours) for key, ours in meant if ours is not None and ours not in keys]


def rows(meta: Path, data: bytes) -> Iterator[Any]:
    """The entries of a metadata file with these bytes, in order: whatever JSON value each is, or a Misshapen.

    A JSON file is a list of objects; JSON lines hold one object a line; a CSV file's first row names the columns, and
    an empty cell is an absent field (save in `text`, where it is an empty caption).
    Raises UserError, possibly after some rows, where the file cannot be read as a whole.
    """
    readers = {".json": _json_list, ".jsonl": _json_lines, ".csv": _csv}
    ending = meta.suffix.lower()
    if ending not in readers:
        raise UserError(str(meta), f"a metadata file ends in {', '.join(ENDINGS)}, not in {ending or 'nothing'!r}")
    text = _decoded(meta, data)
    if not text.strip():
        raise UserError(str(meta), "the file is empty; it must list what to train on")
    yield from readers[ending](meta, text)


def _decoded(meta: Path, data: bytes) -> str:
    if known := foreign(data[:512]):
        raise UserError(str(meta), f"the file is {known[0]}; {known[1]}")
    remedy = "save the file as UTF-8"
    for mark, name in _FOREIGN_MARKS.items():
        if data.startswith(mark):
            raise UserError(str(meta), f"the file is {name} (byte 0x{data[0]:02x} at offset 0), not UTF-8; {remedy}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{data[error.start]:02x} at offset {error.start} (line {line}) is not UTF-8; {remedy}"
        raise UserError(str(meta), problem) from None
    if "\0" in text:
        offset = data.index(b"\0")
        raise UserError(str(meta), f"byte 0x00 at offset {offset} is no text; perhaps the file is UTF-16: {remedy}")
    return text


def _refusal(meta: Path, text: str, place: int, problem: str) -> UserError:
    line = text.count("\n", 0, place) + 1
    column = place - (text.rfind("\n", 0, place) + 1) + 1
    return UserError(str(meta), f"line {line}, column {column}: {problem}")


def _value(meta: Path, text: str, place: int) -> tuple[Any, int]:
    """The JSON value at `place`, and where it ends."""
    try:
        return _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg}"
        if text.startswith("...", error.pos):
            problem = "dots are not JSON; where the documents show them, more entries are meant: delete them"
        elif error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
            problem += "; the file seems to be cut short"
        raise _refusal(meta, text, error.pos, problem) from None
    except RecursionError:
        raise _refusal(meta, text, place, "not usable JSON: it is nested too deeply") from None
    except ValueError:
        raise _refusal(meta, text, place, f"not usable JSON: a number has more than {MOST_DIGITS:,} digits") from None


def _json_list(meta: Path, text: str) -> Iterator[Any]:
    """One entry at a time, so that a long list is never held as objects."""

    def skip(place: int) -> int:
        return _SPACE.match(text, place).end()  # type: ignore[union-attr]

    place = skip(0)
    if text[place] != "[":
        value, end = _value(meta, text, place)
        if isinstance(value, dict) and text.startswith("{", skip(end)):
            raise _refusal(meta, text, skip(end), "a second object; JSON lines belong in a file that ends in .jsonl")
        inner = [name for name, held in value.items() if isinstance(held, list)] if isinstance(value, dict) else []
        hint = f"; the list under {inner[0]!r} may be what is meant" if inner else ""
        raise _refusal(meta, text, place, f"expected a list of objects, found {kind_of(value)}{hint}")
    place = skip(place + 1)
    closed = text.startswith("]", place)
    while not closed:
        if text.startswith("]", place):
            raise _refusal(meta, text, place, "not JSON: a comma before the closing bracket; delete it")
        value, place = _value(meta, text, place)
        yield value
        place = skip(place)
        closed = text.startswith("]", place)
        if not closed:
            if not text.startswith(",", place):
                cut = place >= len(text)
                problem = "the list is not closed; the file seems to be cut short" if cut else "expected a comma or ]"
                raise _refusal(meta, text, place, f"not JSON: {problem}")
            place = skip(place + 1)
    if skip(place + 1) < len(text):
        raise _refusal(meta, text, skip(place + 1), "not JSON: more text after the list")


def _json_lines(meta: Path, text: str) -> Iterator[Any]:
    start = 0
    for line in text.split("\n"):
        if line.strip():
            first = start + len(line) - len(line.lstrip())
            value, end = _value(meta, text, first)
            if end < start + len(line.rstrip()):
                problem = "JSON lines hold one object a line; a list belongs in a file that ends in .json"
                raise _refusal(meta, text, min(end, len(text)), problem)
            if end > start + len(line) or isinstance(value, list):
                raise _refusal(meta, text, first, "a line must be one whole object; a list belongs in a .json file")
            yield value
        start += len(line) + 1


def _csv(meta: Path, text: str) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)  # captions may be long
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            problem = f"no column {' and no column '.join(missing)}; the first row must name the columns, and reads "
            problem += ", ".join(name[:40] for name in header[:8])
            if len(header) == 1 and re.search("[;\t]", header[0]):
                problem += "; separate the columns by commas"
            problem += "".join(f"; {key} seems to be {ours}: rename it" for key, ours in renames(header))
            raise UserError(str(meta), problem)
        twice = sorted({name for name in header if name and header.count(name) > 1})  # nameless ones are ignored
        if twice:
            raise UserError(str(meta), f"the header names {', '.join(twice)} more than once")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                yield Misshapen(f"line {reader.line_num} has {len(cells)} columns where the header has {len(header)}")
            else:
                pairs = zip(header, cells, strict=True)
                yield {name: cell for name, cell in pairs if cell or name == "text"}
    except csv.Error as error:
        raise UserError(str(meta), f"line {reader.line_num}: not CSV: {error}") from None


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    names = {bool: "true or false", str: "a string", list: "a list"}
    return names.get(type(value), "a number")
