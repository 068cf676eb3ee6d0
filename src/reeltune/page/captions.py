"""Captions changed in a copy of their list, which lies beside it: the list itself is never written.  (no torch)

The copy is named LIST.edited.json, has the same entries in the same order, and is whole at any moment. What was changed
is remembered in the page's store, so that it can be undone.
"""

from __future__ import annotations

import csv
import io
import json
import threading
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError
from reeltune.core.files import whole_file
from reeltune.core.reading import read_json
from reeltune.data.lists import read_list, rows

EDITED = ".edited"
MOST_LETTERS = 20_000  # of a caption; encoders read some hundred words
_lock = threading.Lock()  # one change at a time


def edited_path(path: Path) -> Path:
    """The copy in which a list's captions are changed: itself, if it is one."""
    return path if path.stem.endswith(EDITED) else path.with_name(f"{path.stem}{EDITED}{path.suffix}")


def edit(path: Path, entry: int, was: str, text: str, undo: Path) -> Path:
    """Puts `text` in the place of the entry's caption `was`. Returns the list that has it.

    undo: where the change is remembered. Raises UserError if the caption there is another by now.
    """
    if len(text) > MOST_LETTERS:
        raise UserError("caption", f"has {len(text):,} letters, and {MOST_LETTERS:,} are allowed; shorten it")
    with _lock:
        copy = _own(edited_path(path))
        source = copy if copy.exists() else path
        _write(copy, source, entry, was, text)
        done = [*_changes(undo), {"entry": entry, "was": was, "text": text}]
        _remember(undo, done)
    return copy


def undo_last(path: Path, undo: Path) -> int:
    """Takes the latest change of the copy back. Returns the entry. Raises UserError where there is none."""
    with _lock:
        done = _changes(undo)
        if not done:
            raise UserError("undo", "no caption was changed here, or all changes are undone")
        last = done.pop()
        copy = _own(edited_path(path))
        _write(copy, copy, last["entry"], last["text"], last["was"])
        _remember(undo, done)
        return last["entry"]


def _own(copy: Path) -> Path:
    """Raises UserError for a link, which may lead anywhere."""
    if copy.is_symlink():
        raise UserError(str(copy), "is a link, where changed captions would go; put the file itself there")
    return copy


def changes(undo: Path) -> int:
    """How many can be undone."""
    return len(_changes(undo))


def _changes(undo: Path) -> list[dict[str, Any]]:
    return read_json(undo, "delete it") if undo.exists() else []


def _remember(undo: Path, done: list[dict[str, Any]]) -> None:
    with whole_file(undo) as file:
        file.write(json.dumps(done))


def _write(to: Path, source: Path, entry: int, was: str, text: str) -> None:
    """`source` with another caption, under the name `to`."""
    writers = {".json": _as_json, ".jsonl": _as_lines, ".csv": _as_csv}
    data = read_list(source)
    changed = writers[source.suffix.lower()](source, data, entry, was, text)
    if changed is None:
        raise UserError(
            str(source), f"entry {entry} has another caption by now, or none; reload the page, and look at it again"
        )
    with whole_file(to) as file:
        file.write(changed)


def _changed(fields: Any, was: str, text: str) -> bool:
    """Whether the row had that caption; it has the new one then."""
    if not isinstance(fields, dict) or fields.get("text", "") != was:
        return False
    fields["text"] = text
    return True


def _as_json(path: Path, data: bytes, entry: int, was: str, text: str) -> str | None:
    entries = list(rows(path, data))
    if entry >= len(entries) or not _changed(entries[entry], was, text):
        return None
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def _as_lines(path: Path, data: bytes, entry: int, was: str, text: str) -> str | None:
    lines = data.decode("utf-8-sig").split("\n")
    places = [place for place, line in enumerate(lines) if line.strip()]
    if entry >= len(places):
        return None
    fields = json.loads(lines[places[entry]])
    if not _changed(fields, was, text):
        return None
    lines[places[entry]] = json.dumps(fields, ensure_ascii=False)
    return "\n".join(lines)


def _as_csv(path: Path, data: bytes, entry: int, was: str, text: str) -> str | None:
    table = [cells for cells in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if cells]
    column = [name.strip() for name in table[0]].index("text")
    if entry + 1 >= len(table) or column >= len(table[entry + 1]) or table[entry + 1][column] != was:
        return None
    table[entry + 1][column] = text
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(table)
    return out.getvalue()
