"""The rows of a list, each with its clip and where its control belongs.  (no torch)"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reeltune.control.kind import Kind
from reeltune.control.writing import ending_of
from reeltune.core.errors import UserError
from reeltune.core.types import Kind as MediaKind
from reeltune.data.lists import read_list, rows
from reeltune.data.metadata import Folder, check_row

FOLDER = "control"  # below the data's


@dataclass(frozen=True)
class Entry:
    number: int  # place in the list, from 0
    named: str  # its file, as the list names it
    media: MediaKind
    inside: str  # the same from the data's folder on; empty where the row is left out
    fields: dict[str, Any]
    reason: str = ""  # why it is left out

    def control(self, kind: Kind) -> str:
        """Where this entry's control belongs, from the data's folder on."""
        ending = ending_of(kind.form, self.media)
        name = self.inside if self.inside.lower().endswith(ending) else self.inside + ending
        return f"{FOLDER}/{kind.name}/{name}"


def entries_of(meta: Path, data_dir: Path) -> list[Entry]:
    """Every row. Raises UserError for a list that cannot be read, is empty, or in which no row is sound, and where the
    data's folder is none."""
    if not data_dir.is_dir():
        raise UserError("train_data_dir", f"{str(data_dir)!r} is no folder; give that in which the list's paths begin")
    folder, found = Folder(data_dir, allow_outside_paths=False), []
    for number, fields in enumerate(rows(meta, read_list(meta))):
        row = check_row(fields, folder, frozenset())
        reason = "; ".join(problem.reason for problem in row.problems)
        inside = "" if reason else os.path.relpath(row.path, folder.path)
        if inside.startswith(os.pardir + os.sep):  # by the folder's real path, where that is a link
            inside = os.path.relpath(row.path, folder.real_path)
        if inside.split(os.sep)[0] == FOLDER:
            reason, inside = f"lies in {FOLDER}/, where controls are: name the clip that it was made from", ""
        found.append(Entry(number, row.named, row.kind, inside, fields if isinstance(fields, dict) else {}, reason))
    if not any(entry.inside for entry in found):
        told = [f"entry {entry.number}: {entry.reason}" for entry in found[:8]]
        head = f"none of its {len(found)} entries can be given a control" if found else "the list is empty"
        raise UserError(str(meta), [head, *told])
    return found


def require_apart(entries: Sequence[Entry], kind: Kind, meta: Path) -> None:
    """Raises UserError where two files would have one control: a.mov and a.mov.mp4."""
    first: dict[str, str] = {}
    for entry in entries:
        if entry.inside and first.setdefault(entry.control(kind), entry.inside) != entry.inside:
            other = first[entry.control(kind)]
            raise UserError(
                str(meta), f"{other} and {entry.inside} would both have {entry.control(kind)}; rename one of the two"
            )
