"""What was found, as tables."""

from __future__ import annotations

from benchmarks.gpu.report import Report, Row, shown
from benchmarks.gpu.sizes import PHASES

STEPS = ("attention", "step_s", "tokens_s", "tflops", "mfu", "of_product", "peak_gb", "first_step_s")
PLAN = (
    "plan_gb",
    "measured_gb",
    "memory_ratio",
    "within_5_percent",
    *PHASES,
    "plan_s",
    "measured_s",
    "plan_holds",
    "hfu",
)


def page(report: Report) -> str:
    parts = {name: part["rows"] for name, part in report.parts.items()}
    tables = []
    for name, rows in parts.items():
        if name == "steps":
            rows = best_first(rows)
        kept = {"steps": STEPS, "plan": PLAN}.get(name)
        if rows:
            tables.append(f"### {name}\n\n{table(rows, kept)}")
        if shares := tuple(dict.fromkeys(key for row in rows for key in row if key.endswith("_share"))):
            tables.append(f"### {name}: where the time goes\n\n{table(rows, shares)}")
    left = [f"- {name}: {row['row']} ({row['why']})" for name in parts for row in report.parts[name]["not_run"]]
    if left:
        tables.append("Not run:\n\n" + "\n".join(left))
    return f"Figures: {report.about['figures']}.\n\n" + "\n\n".join(tables)


def best_first(rows: list[Row]) -> list[Row]:
    """By network; what was not measured last."""
    return sorted(rows, key=lambda row: (str(row.get("network", "~")), row.get("step_s", float("inf"))))


def table(rows: list[Row], columns: tuple[str, ...] | None = None) -> str:
    """columns: those that are shown, where they are there; all if left out."""
    there = dict.fromkeys(key for row in rows for key in row if key not in ("row", "error", "changes", "network"))
    wanted = list(there) if columns is None else [name for name in columns if name in there]
    wanted += [name for name in ("failed", "not_there", "does_not_fit") if name in there and name not in wanted]
    lines = ["| " + " | ".join(["", *wanted]) + " |", "|---|" + "---:|" * len(wanted)]
    lines += [
        "| " + " | ".join([row["row"], *(shown(row[name]) if name in row else "" for name in wanted)]) + " |"
        for row in rows
    ]
    return "\n".join(lines)
