"""Two runs over each other, paired clip by clip where they were measured alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reeltune.core.reading import NUMBER, TEXT, WHOLE, as_user_error, read_table, require_fields
from reeltune.page.runs import Run, grid
from reeltune.page.svg import without_styles
from reeltune.reporting import charts, report
from reeltune.reporting.metrics import Metrics
from reeltune.sampling.paired import band95

START = "validation/start.json"
OF_START = {"clips": TEXT.many(), "levels": NUMBER.many(), "step": WHOLE}
OF_LATER_RUNS = {"contents": NUMBER.many(), "sizes": WHOLE.many(3).many()}
OF_A_CLIP = {"clips": "other held-out clips", "contents": "other files of one name", "sizes": "other sizes"}


@dataclass(frozen=True)
class Paired:
    """Held-out losses of two runs at one step, over the clips that they share."""

    step: int
    of_a: float
    of_b: float
    band95: list[float] | None  # of b - a; None for one clip, for losses that are not finite, and where a run has kept
    # none of single clips

    @property
    def difference(self) -> float:
        return self.of_b - self.of_a


def compared(a: Run, b: Run) -> dict[str, Any]:
    """What the screen shows of both. Raises UserError for files that no run has written."""
    pairs = [(run, run.tail.read()) for run in (a, b)]
    colours = ("now", "start")
    losses = [
        (colour, [row["step"] for row in metrics.validations], [row["loss"] for row in metrics.validations], True)
        for colour, (_, metrics) in zip(colours, pairs, strict=True)
        if metrics.validations
    ]
    with as_user_error(a.folder, f"metrics.jsonl of it or of {b.folder} is not as a run writes it", report.RESTORE):
        trained = [
            (colour, metrics.steps["step"], metrics.steps["loss"], False)
            for colour, (_, metrics) in zip(colours, pairs, strict=True)
            if metrics.steps
        ]
    shared, why = shared_clips(a.folder, b.folder)
    rows = differences(pairs[0][1], pairs[1][1], shared)
    return {
        "held_out": without_styles(charts.beside(losses, "held-out loss of both runs by step")) if losses else None,
        "training": without_styles(charts.beside(trained, "training loss of both runs by step")) if trained else None,
        "shared": len(shared),
        "why": why,
        "rows": rows,
        "answer": answer(rows, len(shared), met(*(metrics for _, metrics in pairs))) if shared else None,
        "recipe": recipe_differences(a.folder, b.folder),
        "grids": [grid(run) for run in (a, b)],
    }


def shared_clips(a: Path, b: Path) -> tuple[list[int], str]:
    """(places of the held-out clips that both were measured on at the same noise, which comes from the place; why
    there are none, or not all)."""
    files = [run / START for run in (a, b)]
    if not all(file.is_file() for file in files):
        return [], "one of them has no held-out loss"
    tables = [read_table(file, report.RESTORE) for file in files]
    for file, table in zip(files, tables, strict=True):
        later = {name: kind for name, kind in OF_LATER_RUNS.items() if name in table}
        require_fields(table, OF_START | later, file, report.RESTORE)
    families = [str(report.table_of(run / "run.json").get("family", "")).partition("/")[0] for run in (a, b)]
    if families[0] != families[1]:
        return [], "they are of two model families"
    one, other = tables
    if one["levels"] != other["levels"]:
        return [], "they were measured at other noise levels"
    places = list(range(min(len(one["clips"]), len(other["clips"]))))
    why = "" if len(one["clips"]) == len(other["clips"]) else "one of them has more"
    for name, told in OF_A_CLIP.items():
        if name in one and name in other:  # runs begun earlier have not all of them
            same = [i for i in places if one[name][i : i + 1] == other[name][i : i + 1]]
            why = why if same == places else f"others are of {told}"
            if not same:
                return [], f"they were measured on {told}"
            places = same
    return places, why


def differences(a: Metrics, b: Metrics, clips: list[int]) -> list[Paired]:
    """The held-out losses of two runs at each step at which both were measured: on the same clips and noise, so that
    clips that are hard do not count for either. clips: places of those that both have; of rows without losses of single
    clips the mean over all is taken, which is right only where all are shared."""
    of_a, of_b = ({row["step"]: row for row in metrics.validations} for metrics in (a, b))
    found = []
    for step in sorted(of_a.keys() & of_b.keys()) if clips else ():
        rows = of_a[step], of_b[step]
        if all(row["per_clip"] is not None and len(row["per_clip"]) == row["n"] > clips[-1] for row in rows):
            one, other = (np.array(row["per_clip"])[clips] for row in rows)
            finite = np.isfinite(one).all() and np.isfinite(other).all()
            band = band95(other - one) if finite else None
            found.append(Paired(step, float(one.mean()), float(other.mean()), band))
        elif all(row["n"] == len(clips) for row in rows):
            found.append(Paired(step, rows[0]["loss"], rows[1]["loss"], None))
    return found


def met(a: Metrics, b: Metrics) -> bool:
    """Whether both were measured at any one step."""
    steps = [{row["step"] for row in metrics.validations} for metrics in (a, b)]
    return not steps[0].isdisjoint(steps[1])


def answer(rows: list[Paired], clips: int, measured: bool) -> str:
    """Which of them is better at the last step at which both were measured. measured: whether there is any."""
    if not rows and measured:
        return "One of them has kept no losses of single clips, so those that both were measured on are not told apart."
    if not rows:
        return "No step is there yet at which both were measured."
    last = rows[-1]
    lost = [name for name, loss in (("a", last.of_a), ("b", last.of_b)) if not math.isfinite(loss)]
    if lost:
        return f"At step {last.step:,} the loss of {' and of '.join(lost)} is not finite; there is nothing to compare."
    if last.difference == 0:
        return f"At step {last.step:,} both have the same loss."
    side = "lower" if last.difference < 0 else "higher"
    told = f"At step {last.step:,} the loss of b is {abs(last.difference):.4f} {side}"
    if last.band95 is None:
        return f"{told}; how much of that is chance is not known, as " + (
            "it is one clip alone." if clips == 1 else "one of them has kept no losses of single clips."
        )
    low, high = last.band95
    if low <= 0 <= high:
        return f"{told}, and the 95 % band of that holds zero: it may be chance."
    return f"{told}, and the 95 % band of that leaves zero out: {'b' if high < 0 else 'a'} is better on these clips."


def recipe_differences(a: Path, b: Path) -> list[tuple[str, str, str]]:
    """(setting, in a, in b) where they differ."""
    tables = [
        dict(pair for rows in report.recipe_rows(run / "recipe.yaml").values() for pair in rows) for run in (a, b)
    ]
    return [
        (name, tables[0].get(name, ""), tables[1].get(name, ""))
        for name in dict.fromkeys([*tables[0], *tables[1]])
        if tables[0].get(name) != tables[1].get(name)
    ]
