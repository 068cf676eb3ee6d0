"""A run as its screen shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reeltune.core.errors import UserError
from reeltune.core.reading import as_user_error, read_table
from reeltune.page import live
from reeltune.page.found import METRICS
from reeltune.page.svg import without_styles
from reeltune.reporting import charts, obedience, report, time_verdict
from reeltune.reporting.metrics import PARTS, Metrics

LATEST_STEPS = 100  # of which the verdict on time is told
MEDIA = {".mp4": "video/mp4", ".png": "image/png"}
GIVEN = ("control", "truth")  # folders of previews that are not a step's


@dataclass(frozen=True)
class Summary:
    """A line of the list of runs."""

    id: str
    name: str
    going_on: bool
    facts: list[str]
    answer: str
    tone: str


@dataclass
class Run:
    """A run's folder, and what was read of it."""

    id: str
    name: str
    folder: Path
    holds: Callable[[Path], bool]  # whether a file may be read: it leads out of the served folder by no link
    tail: live.Tail = field(init=False)
    drawn: live.Drawn[dict[str, Any]] = field(init=False)

    def __post_init__(self):
        self.tail = live.Tail(self.folder / METRICS)
        self.drawn = live.Drawn(partial(drawn, self), lambda: live.signature(self.folder)[0])


def summary(run: Run) -> Summary:
    going_on = live.holder(run.folder) is not None
    try:
        metrics = run.tail.read()
        told = report.verdict(metrics)
        steps = metrics.steps.get("step", [0])[-1] if metrics.steps else 0
        facts = [f"{steps:,} steps"]
        if metrics.validations:
            facts.append(f"held-out loss {metrics.validations[-1]['loss']:.4f}")
        return Summary(run.id, run.name, going_on, facts, told["answer"], told["tone"])
    except UserError as error:
        return Summary(run.id, run.name, going_on, error.problems, "It cannot be read.", "bad")


def drawn(run: Run) -> dict[str, Any]:
    """What the live part of the screen shows. Raises UserError for files that no run has written."""
    metrics = run.tail.read()
    folder = run.folder
    with as_user_error(folder, "metrics.jsonl is not as a run writes it", report.RESTORE):
        split = report.time_split(metrics)
        if split:
            split["svg"] = without_styles(split["svg"])
        learning = report.verdict(metrics)
        return {
            "verdict": learning,
            "obeys": obedience.verdict(metrics.obedience, loss_falls=learning["tone"] == "good"),
            "numbers": report.headline(metrics),
            "curves": [{**curve, "svg": without_styles(curve["svg"])} for curve in report.curves(metrics)],
            "split": split,
            "time_verdict": time_told(metrics),
            "memory": memory(metrics),
            "ledger": report.table_of(folder / "ledger.json", report.OF_LEDGER),
            "problem_rows": report.PROBLEM_ROWS,
            "notices": metrics.notices,
            "saves": metrics.saves,
            "going_on": live.holder(folder) is not None,
            "begun": bool(metrics.steps or metrics.validations),
            "step": metrics.steps["step"][-1] if metrics.steps else 0,
        }


def time_told(metrics: Metrics) -> str | None:
    """What the time of the latest steps went into, as the console tells it."""
    steps = metrics.steps
    names = ("step_s", *PARTS)
    if any(len(steps.get(name, ())) < 2 for name in names):
        return None
    columns = zip(*(steps[name][1:][-LATEST_STEPS:] for name in names), strict=True)  # the first pays for the start
    return time_verdict.verdict([dict(zip(names, row, strict=True)) for row in columns])


def memory(metrics: Metrics) -> Markup | None:
    bytes_ = metrics.steps.get("peak_memory_bytes")
    if not bytes_:
        return None
    return without_styles(charts.exact(metrics.steps["step"], [count / 2**30 for count in bytes_], "peak memory, GiB"))


# ---- clips


@dataclass(frozen=True)
class GridRow:
    number: int
    prompt: str
    settings: list[tuple[str, str]]
    there: list[str]  # columns that have a clip


@dataclass(frozen=True)
class Grid:
    steps: list[int]
    given: list[str]
    rows: list[GridRow]


def clip_path(run: Path, column: str, number: int) -> Path:
    """The file of a preview. column: one of GIVEN, or a step's number."""
    return run / "previews" / (column if column in GIVEN else f"step-{int(column)}") / f"{number}.mp4"


def grid(run: Run) -> Grid:
    """checkpoints x prompts. Raises UserError for a file beside a preview that is none of ours."""
    previews = run.folder / "previews"
    steps = sorted(
        int(name) for path in previews.glob("step-*") if (name := path.name.removeprefix("step-")).isdecimal()
    )
    numbers = {
        int(path.stem) for step in steps for path in (previews / f"step-{step}").glob("*.mp4") if path.stem.isdecimal()
    }
    columns = [*GIVEN, *map(str, steps)]
    rows = []
    for number in sorted(numbers):
        clips = {column: clip_path(run.folder, column, number) for column in columns}
        there = [column for column, path in clips.items() if path.is_file() and run.holds(path)]
        told = [path for column in there if (path := clips[column].with_suffix(".json")).is_file() and run.holds(path)]
        table = read_table(told[-1], report.RESTORE) if told else {}
        prompt = str(table.pop("prompt", ""))
        shown = [
            (name.replace("_", " "), report.short(value)) for name, value in table.items() if value not in (None, "")
        ]
        rows.append(GridRow(number, prompt, shown, there))
    given = [column for column in GIVEN if any(column in row.there for row in rows)]
    return Grid(steps, given, rows)


def obeyed(run: Run) -> dict[tuple[str, int], str]:
    """(column, number) of a clip -> how far it follows its control, where that was measured."""
    told = {}
    for row in run.tail.read().obedience:
        for number, scores in enumerate(row["previews"]):
            for column, name in ((str(row["step"]), "score"), ("truth", "truth")):
                if scores[name] is not None:
                    told[column, number] = f"{row['measure']}: {obedience.shown(row, scores[name])}"
    return told


def first_batch(run: Run) -> list[dict[str, Any]]:
    """The files by name and the text of each sample."""
    samples: dict[str, dict[str, Any]] = {}
    for path in sorted((run.folder / "first_batch").glob("*_*")):
        number, _, what = path.stem.partition("_")
        if not (number.isdecimal() and run.holds(path) and path.is_file()):
            continue
        sample = samples.setdefault(number, {"files": [], "text": ""})
        if path.suffix == ".txt":
            sample["text"] = path.read_text(encoding="utf-8", errors="replace")[:10_000].strip()
        elif path.suffix in MEDIA:
            sample["files"].append({"name": path.name, "what": what, "clip": path.suffix == ".mp4"})
    return [samples[number] for number in sorted(samples, key=int)]


def about(run: Path) -> dict[str, Any]:
    return report.table_of(run / "run.json", report.OF_RUN)
