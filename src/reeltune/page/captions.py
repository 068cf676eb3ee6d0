"""Captions changed in a copy of their list, which lies beside it: the list itself is never written.  (no torch)

The copy is named LIST.edited.json, has the same entries in the same order, and is whole at any moment. What was changed
is remembered in the page's store, so that it can be undone.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError
from reeltune.core.files import whole_file
from reeltune.core.reading import as_user_error, read_json
from reeltune.data.lists import read_list, rows
from reeltune.page.alone import alone_in

EDITED = ".edited"
MOST_LETTERS = 20_000  # of a caption; encoders read some hundred words


def edited_path(path: Path) -> Path:
    """The copy in which a list's captions are changed: itself, if it is one."""
    return path if path.stem.endswith(EDITED) else path.with_name(f"{path.stem}{EDITED}{path.suffix}")


@dataclass(frozen=True)
class Change:
    """The change of one entry's caption."""

    entry: int
    was: str
    text: str
    named: Any = None  # its file_path: lists that were one may have other entries at that place by now

    def make(self, fields: Any) -> bool:
        """Puts the new caption into the row. False, and nothing is done, if it is another row, or had another one."""
        if not isinstance(fields, MutableMapping) or fields.get("text", "") != self.was:
            return False
        if self.named is not None and fields.get("file_path") != self.named:
            return False
        fields["text"] = self.text
        return True


def edit(path: Path, change: Change, undo: Path) -> Path:
    """Returns the list that has the change.

    undo: where it is remembered. Raises UserError if that entry is another by now, or has another caption.
    """
    if len(change.text) > MOST_LETTERS:
        raise UserError("caption", f"has {len(change.text):,} letters, and {MOST_LETTERS:,} are allowed; shorten it")
    with alone_in(path.parent):
        copy = _own(edited_path(path))
        _write(copy, copy if copy.exists() else path, change)
        _remember(undo, [*_changes(undo), change])
    return copy


def undo_last(path: Path, undo: Path) -> int:
    """Takes the latest change of the copy back. Returns the entry. Raises UserError where there is none."""
    with alone_in(path.parent):
        done = _changes(undo)
        if not done:
            raise UserError("undo", "no caption was changed here, or all changes are undone")
        last = done.pop()
        copy = _own(edited_path(path))
        _write(copy, copy, replace(last, was=last.text, text=last.was))
        _remember(undo, done)
        return last.entry


def _own(copy: Path) -> Path:
    """Raises UserError for a link, which may lead anywhere."""
    if copy.is_symlink():
        raise UserError(str(copy), "is a link, where changed captions would go; put the file itself there")
    return copy


def changes(undo: Path) -> int:
    """How many can be undone."""
    return len(_changes(undo))


def _changes(undo: Path) -> list[Change]:
    if not undo.exists():
        return []
    with as_user_error(undo, "does not hold changes of captions", "delete it"):
        return [Change(**one) for one in read_json(undo, "delete it")]


def _remember(undo: Path, done: list[Change]) -> None:
    with whole_file(undo) as file:
        file.write(json.dumps([asdict(one) for one in done]))


def _write(to: Path, source: Path, change: Change) -> None:
    """`source` with another caption, under the name `to`."""
    writers = {".json": _as_json, ".jsonl": _as_lines, ".csv": _as_csv}
    data = read_list(source)
    changed = writers[source.suffix.lower()](source, data, change)
    if changed is None:
        raise UserError(
            str(source),
            f"entry {change.entry} is another by now, or has another caption; reload the page, and look at it again. "
            f"Where {to.name} has no longer the entries of its list, rename it, and a new one is begun",
        )
    with whole_file(to) as file:
        file.write(changed)


def _as_json(path: Path, data: bytes, change: Change) -> str | None:
    entries = list(rows(path, data))
    if change.entry >= len(entries) or not change.make(entries[change.entry]):
        return None
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def _as_lines(path: Path, data: bytes, change: Change) -> str | None:
    lines = data.decode("utf-8-sig").split("\n")
    places = [place for place, line in enumerate(lines) if line.strip()]
    if change.entry >= len(places):
        return None
    fields = json.loads(lines[places[change.entry]])
    if not change.make(fields):
        return None
    lines[places[change.entry]] = json.dumps(fields, ensure_ascii=False)
    return "\n".join(lines)


def _as_csv(path: Path, data: bytes, change: Change) -> str | None:
    table = [cells for cells in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")) if cells]
    names = [name.strip() for name in table[0]]
    cells = table[change.entry + 1] if change.entry + 1 < len(table) else []
    fields = dict(zip(names, cells, strict=False))
    if len(cells) != len(names) or not change.make(fields):
        return None
    table[change.entry + 1] = list(fields.values())
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(table)
    return out.getvalue()
