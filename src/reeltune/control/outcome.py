"""What became of every entry of a list: the list with controls, and the ledger.  (no torch)"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reeltune.control.entries import FOLDER, Entry
from reeltune.control.kind import Kind
from reeltune.control.records import Made
from reeltune.control.stage import Job, Maker
from reeltune.core.errors import UserError
from reeltune.core.files import whole_file
from reeltune.core.reading import beginning, read_json
from reeltune.core.shown import cell

KEY = "control_file_path"
LEDGER = ("entry", "file_path", "kind", "status", "score")  # its first columns
HEAD = "have a control</h1>"  # of a contact sheet
HEAD_BYTES = 64 * 1024


@dataclass(frozen=True)
class Outcome:
    """What became of one entry."""

    entry: Entry
    control: str  # from the data's folder on; of an entry that is left out too, where it would be
    made: Made | None
    reason: str  # why it is left out; empty: it is in the new list

    @property
    def score(self) -> float | None:
        return self.made.score if self.made is not None and self.made.bytes else None


def outcomes(entries: Sequence[Entry], kind: Kind, maker: Maker, least_score: float | None) -> list[Outcome]:
    least = kind.least_score if least_score is None else least_score
    return [_outcome(entry, kind, maker, least) for entry in entries]


def _outcome(entry: Entry, kind: Kind, maker: Maker, least: float) -> Outcome:
    if not entry.inside:
        return Outcome(entry, "", None, entry.reason)
    job = Job(kind, entry.inside, entry.media, entry.control(kind))
    if job in maker.unread:
        return Outcome(entry, job.control, None, maker.unread[job])
    made = maker.records.get(kind.name, job.control)
    if made is None or not made.done:  # its process was ended
        return Outcome(entry, job.control, None, "was not finished; run the same command again")
    if made.key != maker.key(job):
        told = "another command has made its control with other settings since; run them one after another"
        return Outcome(entry, job.control, None, told)
    reason = made.reason
    if not reason and made.score < least:
        reason = f"its control has a score of {made.score:.3g}, and {least:g} is the least"
    return Outcome(entry, job.control, made, reason)


def write_list(out: Path, found: Sequence[Outcome]) -> int:
    """The entries that have a control, in their order, as the guides write them; returns how many.

    Raises UserError where there is none, and CannotWriteError.
    """
    rows: list[dict[str, Any]] = [
        {**one.entry.fields, "type": one.entry.media, KEY: one.control} for one in found if not one.reason
    ]
    if not rows:
        told = [f"entry {one.entry.number}, {one.entry.named}: {one.reason}" for one in found[:8]]
        why = f"{out} is not written, as no entry got a control; {page_of(out).name} shows them"
        raise UserError(str(out), [why, *told])
    with whole_file(out) as file:
        json.dump(rows, file, indent=2, ensure_ascii=False)
        file.write("\n")
    return len(rows)


def write_ledger(path: Path, kind: Kind, found: Sequence[Outcome]) -> None:
    """A row for every entry of the list. Raises CannotWriteError."""
    names = sorted({name for one in found if one.made is not None for name in one.made.facts})
    with whole_file(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow([*LEDGER, *names, KEY, "reason"])
        for one in found:
            score = "" if one.score is None else f"{one.score:.6g}"
            facts = one.made.facts if one.made is not None else {}
            told = [f"{facts[name]:.6g}" if name in facts else "" for name in names]
            control = cell(one.control) if one.made is not None and one.made.bytes else ""
            status = "left out" if one.reason else "made"
            named = cell(one.entry.named)
            table.writerow([one.entry.number, named, kind.name, status, score, *told, control, cell(one.reason)])


def require_new(out: Path, meta: Path, kinds: Sequence[str]) -> None:
    """Raises UserError for a list that would be written over another than an earlier one of this command."""
    if out.suffix.lower() != ".json":
        raise UserError(
            "out", f"--out is {str(out)!r}; it must end in .json, as the guides' lists; give {out.stem}.json"
        )
    if out.exists() and (out.is_dir() or _is(out, meta)):
        what = "a folder" if out.is_dir() else "the list itself, which stays as it is"
        raise UserError("out", f"{str(out)!r} is {what}; give the new list a name of its own")
    if out.exists() and not _is_ours(read_json(out, "give the new list another name"), kinds):
        raise UserError(
            "out",
            f"{str(out)!r} is there, and names other controls than this command makes; give another name",
        )
    for beside, mark in ((ledger_of(out), ",".join(LEDGER)), (page_of(out), HEAD)):
        if beside.exists() and (_is(beside, meta) or mark.encode() not in beginning(beside, HEAD_BYTES)):
            raise UserError(
                "out", f"{str(beside)!r}, which is written beside the new list, is another file; give another name"
            )


def _is(path: Path, other: Path) -> bool:
    return other.exists() and path.samefile(other)


def ledger_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}_ledger.csv")


def page_of(out: Path) -> Path:
    return out.with_name(f"{out.stem}.html")


def _is_ours(rows: Any, kinds: Sequence[str]) -> bool:
    ours = tuple(f"{FOLDER}/{kind}/" for kind in kinds)
    return isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get(KEY), str) and row[KEY].startswith(ours) for row in rows
    )
