"""What a run has left in metrics.jsonl (`reporting/log.py` writes it), each row checked field by field.  (no torch)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError
from reeltune.core.reading import (
    NUMBER,
    REAL,
    TEXT,
    WHOLE,
    Kind,
    as_user_error,
    json_value,
    refuse_absent,
    require_fields,
)

PARTS = ("data_s", "encode_s", "forward_backward_s", "optimizer_s")  # what a step's time is spent on, in order
REMEDY = "delete that line"
TABLES = Kind(lambda value: isinstance(value, dict), "a table").many()
SECONDS = Kind(lambda value: NUMBER.holds(value) and value >= 0, "seconds, from 0")
STEP = {  # of them a row has `step`, and the others that the first step has
    **dict.fromkeys(("step", "epoch", "samples", "tokens"), WHOLE),
    **dict.fromkeys(("loss", "grad_norm"), REAL),
    **dict.fromkeys(("lr", "d", "samples_per_s", "tokens_per_s"), NUMBER),
    **dict.fromkeys(("step_s", *PARTS), SECONDS),
    **dict.fromkeys(("peak_memory_bytes", "mfu"), NUMBER.or_none()),
    "shape": WHOLE.many(3),
    "expert": TEXT,  # of a run that trains both: whose step it was
}
LOSSES = {"loss": REAL, "loss_start": REAL}
LEVEL = {"level": NUMBER, **LOSSES}
VALIDATION = {
    **dict.fromkeys(("step", "start_step", "n"), WHOLE),
    **LOSSES,
    "difference": REAL,
    "band95": REAL.many(2).or_none(),
    "per_band": TABLES,
    "per_clip": REAL.many().or_none(),  # which runs begun before 2026-11-26 have not
}
OF_EXPERT = {"expert": TEXT, **LOSSES, "difference": REAL, "band95": REAL.many(2).or_none()}  # where both learn
OBEDIENCE = {
    **dict.fromkeys(("step", "start_step", "n"), WHOLE),
    **dict.fromkeys(("measure", "unit"), TEXT),
    "rises": Kind(lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("score", "score_start", "difference"), NUMBER),
    "band95": NUMBER.many(2).or_none(),
    "truth": NUMBER.or_none(),
    "previews": TABLES,
}
PREVIEW = dict.fromkeys(("score", "score_start", "truth"), NUMBER.or_none())
SAVE = {"step": WHOLE, "path": TEXT, "bytes": WHOLE, "seconds": SECONDS, "blocked_seconds": SECONDS}
NOTICE = {"step": WHOLE, "text": TEXT}


@dataclass
class Metrics:
    """The rows by kind; steps as columns of one length."""

    steps: dict[str, list] = field(default_factory=dict)
    validations: list[dict] = field(default_factory=list)
    obedience: list[dict] = field(default_factory=list)
    notices: list[dict] = field(default_factory=list)
    saves: list[dict] = field(default_factory=list)


def read_metrics(path: Path) -> Metrics:
    """Raises UserError that names the line and every field that is missing or of another kind.

    A field that began after the first step, of a run that a newer version goes on with, is left out.
    """
    found = Metrics()
    if not path.exists():
        return found
    refuse_absent(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # a run that was killed, or writes it just now
                break
            take_row(found, line, path, number)
    return found


def take_row(metrics: Metrics, line: bytes, path: Path, number: int) -> None:
    """Adds the line of that number, counted from 1. Raises as read_metrics; a part of it may have been added then."""
    others = {
        "validation": (metrics.validations, VALIDATION, "per_band", LEVEL),
        "obedience": (metrics.obedience, OBEDIENCE, "previews", PREVIEW),
        "notice": (metrics.notices, NOTICE, None, {}),
        "save": (metrics.saves, SAVE, None, {}),
    }
    where = f"{path}: line {number}"
    with as_user_error(path, f"line {number} is no row of a run", REMEDY):
        row = json_value(line)
        kind = row.pop("kind")
        if kind == "validation":
            row.setdefault("per_clip", None)
        rows, kinds, table, inside = others[kind] if kind != "step" else ([], {}, None, {})
    if kind == "step":
        _add_step(metrics.steps, row, where)
        return
    rows.append(row)
    require_fields(row, kinds, where, REMEDY)
    for i, entry in enumerate(row[table] if table else ()):
        require_fields(entry, inside, f"{where}: {table}, entry {i}", REMEDY)
    if kind == "validation" and "experts" in row:
        require_fields(row, {"experts": TABLES}, where, REMEDY)
        for i, entry in enumerate(row["experts"]):
            require_fields(entry, OF_EXPERT, f"{where}: experts, entry {i}", REMEDY)


def _add_step(columns: dict[str, list], row: Mapping[str, Any], where: str) -> None:
    names = columns or row
    kinds = {name: kind for name, kind in STEP.items() if name in names or name == "step"}
    require_fields(row, kinds, where, REMEDY)
    for name in names:
        if name not in row:
            raise UserError(where, f"has no {name}, which the first step has; {REMEDY}")
        columns.setdefault(name, []).append(row[name])
