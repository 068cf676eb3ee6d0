"""Does it obey? What a report says of previews and the control that they were given."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Rows of metrics.jsonl, kind "obedience", as sampling/obedience.py makes them.

UNMEASURED = (
    "Whether they follow it was not measured: set control_kind to what their control is, such as canny, to have it "
    "compared with what the same detector finds on them."
)


def verdict(rows: Sequence[dict], loss_falls: bool) -> dict[str, str] | None:
    """tone, answer, reason and, where there is one, warning; None where obedience was not measured after training
    began.

    Better and worse are said where the 95 % band of the paired change leaves zero out. The warning is given where the
    held-out loss falls, by its own band, and obedience is not shown to be better by this one.
    """
    after = [row for row in rows if row["step"] > row["start_step"]]
    if not after:
        return None
    last = after[-1]
    low, high = (-math.inf, math.inf) if last["band95"] is None else last["band95"]
    if not last["rises"]:
        low, high = -high, -low
    tone, answer = "open", "That it follows its control better is not shown."
    if low > 0:
        tone, answer = "good", "It follows its control better."
    elif high < 0:
        tone, answer = "bad", "It follows its control less."
    told = {"tone": tone, "answer": answer, "reason": _reason(last)}
    if loss_falls and tone != "good":
        told["warning"] = (
            "The held-out loss falls and obedience does not rise: what is learnt may be the look of the clips, and not "
            "their control. Watch the previews; more of them (preview_count) narrow the band."
        )
    return told


def _reason(row: dict) -> str:
    best = "1 is best" if row["rises"] else "0 is best"
    truth = "" if row["truth"] is None else f"; the real clips have {shown(row, row['truth'])}"
    told = (
        f"From step {row['start_step']} to step {row['step']}, with the same noise, the {row['measure']} went from "
        f"{shown(row, row['score_start'])} to {shown(row, row['score'])} ({best}{truth}): "
    )
    change = f"a mean change of {_signed(row, row['difference'])}"
    if row["band95"] is None:
        return told + f"{change}, on one preview alone, which may be chance. Set preview_count higher."
    band = " to ".join(_signed(row, edge) for edge in row["band95"])
    return told + f"{change}, 95 % band {band}, over {row['n']} previews."


def number(row: dict) -> dict[str, str]:
    """One of the few numbers at the top of a report: what it is, now and at the start."""
    truth = "" if row["truth"] is None else f"; real clips: {shown(row, row['truth'])}"
    now, start = shown(row, row["score"]), shown(row, row["score_start"])
    return {"what": "follows its control", "now": now, "start": start, "note": f"{row['measure']}{truth}"}


def of_preview(rows: Sequence[dict], place: int) -> dict[str, str]:
    """Words below a preview's clips, by `before`, `after` and `truth`, where they were measured."""
    if not rows:
        return {}
    row, scores = rows[-1], rows[-1]["previews"][place]
    names = (("before", "score_start"), ("after", "score"), ("truth", "truth"))
    known = {when: scores[name] for when, name in names if scores[name] is not None}
    return {when: f"{row['measure']}: {shown(row, value)}" for when, value in known.items()}


def shown(row: dict, value: float) -> str:
    return f"{value:.1f}°" if row["unit"] == "°" else f"{value:.2f}"


def _signed(row: dict, value: float) -> str:
    """A score's change, with a figure more than the score has alone."""
    figures, unit = (2, "°") if row["unit"] == "°" else (3, "")
    return f"{round(value, figures) + 0:+.{figures}f}{unit}".replace("-", "−")  # + 0: no minus before zero
