"""What `reeltune control` has said of controls: their scores, and the entries that have got none.  (no torch)"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from reeltune.control.outcome import LEDGER, ledger_of
from reeltune.control.records import data_dir_of, made_by
from reeltune.core.errors import UserError
from reeltune.core.reading import as_user_error

MOST_ROWS = 1_000_000  # of a ledger that are read


@dataclass(frozen=True)
class LeftOut:
    """Entries that `reeltune control` has left out of the list that it made."""

    ledger: str  # its name
    count: int
    rows: list[tuple[str, ...]]  # (entry of the first list, file, score, reason), the first of them


def about_control(path: str, holds: Callable[[str], bool]) -> str:
    """Kind and score of a control; empty of one that `reeltune control` has not made. holds: whether a path may be
    looked at."""
    data_dir = data_dir_of(str(Path(path).parent))
    if data_dir is None or not holds(data_dir):
        return ""
    try:
        made = made_by(path)
    except UserError as error:  # a damaged record spoils no page
        return f"control: {error.problems[0]}"
    return "" if made is None else f"{made.kind} of score {made.score:.2f}"


def left_out(path: Path, holds: Callable[[str], bool], most: int) -> LeftOut | None:
    """What was left out of a list, by the ledger beside it; None for a list that has none, or one in which nothing is
    left out. Raises UserError for a ledger that is damaged.
    """
    ledger = ledger_of(path)
    if not ledger.is_file() or not holds(str(ledger)):
        return None
    with ledger.open(encoding="utf-8", errors="replace", newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ())[: len(LEDGER)] != LEDGER:
            return None
        with as_user_error(ledger, "is no ledger", "delete it, and run reeltune control again"):
            rows = [row for row in islice(table, MOST_ROWS) if row["status"] == "left out"]
    names = ("entry", "file_path", "score", "reason")
    first = [tuple(row.get(name) or "" for name in names) for row in rows[:most]]
    return LeftOut(ledger.name, len(rows), first) if rows else None
