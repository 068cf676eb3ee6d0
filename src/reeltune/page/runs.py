"""A run as its screen shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from reeltune.core.errors import UserError
from reeltune.core.reading import NUMBER, TEXT, WHOLE, as_user_error, read_table, require_fields
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
    """column: one of GIVEN, or a step's number."""
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


def first_batch(run: Run) -> list[dict[str, Any]]:
    """Per sample: its files by name, and its text."""
    samples: dict[str, dict[str, Any]] = {}
    for path in sorted((run.folder / "first_batch").glob("*_*")):
        number, _, what = path.stem.partition("_")
        if not (number.isdecimal() and run.holds(path)):
            continue
        sample = samples.setdefault(number, {"files": [], "text": ""})
        if path.suffix == ".txt":
            sample["text"] = path.read_text(encoding="utf-8", errors="replace")[:10_000].strip()
        elif path.suffix in MEDIA:
            sample["files"].append({"name": path.name, "what": what, "clip": path.suffix == ".mp4"})
    return [samples[number] for number in sorted(samples, key=int)]


# ---- two runs


def compared(a: Run, b: Run) -> dict[str, Any]:
    """Two runs over each other. Raises UserError for files that no run has written."""
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
    return {
        "held_out": without_styles(charts.beside(losses, "held-out loss of both runs by step")) if losses else None,
        "training": without_styles(charts.beside(trained, "training loss of both runs by step")) if trained else None,
        "shared": shared,
        "why": why,
        "rows": differences(*(metrics for _, metrics in pairs)) if shared else [],
        "recipe": recipe_differences(a.folder, b.folder),
        "grids": [grid(run) for run in (a, b)],
    }


OF_START = {"clips": TEXT.many(), "levels": NUMBER.many(), "step": WHOLE}


def shared_clips(a: Path, b: Path) -> tuple[int, str]:
    """(clips on which both were measured at the same noise, 0 unless all are; why they are not)."""
    files = [run / "validation/start.json" for run in (a, b)]
    if not all(file.is_file() for file in files):
        return 0, "one of them has no held-out loss"
    tables = [read_table(file, report.RESTORE) for file in files]
    for file, table in zip(files, tables, strict=True):
        require_fields(table, OF_START, file, report.RESTORE)
    others = (
        ("clips", "other held-out clips"),
        ("levels", "other noise levels"),
        ("contents", "other files of one name"),
    )
    for name, told in others:
        if all(name in table for table in tables) and tables[0][name] != tables[1][name]:
            return 0, f"they were measured on {told}"
    return len(tables[0]["clips"]), ""


def differences(a: Metrics, b: Metrics) -> list[tuple[int, float, float]]:
    """(step, held-out loss of a, of b) where both were measured: the same clips and noise, so that clips that are hard
    do not count for either."""
    of_a, of_b = ({row["step"]: row["loss"] for row in metrics.validations} for metrics in (a, b))
    return [(step, of_a[step], of_b[step]) for step in sorted(of_a.keys() & of_b.keys())]


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


def about(run: Path) -> dict[str, Any]:
    return report.table_of(run / "run.json", report.OF_RUN)
