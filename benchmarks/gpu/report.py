"""What was found, on the screen as it comes and in a file after each row; and how long there is for more."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]
UNSAID = "error", "kernels"  # of a row on the screen: long, and in the file


class Report:
    """`parts` has all rows. A row that fails, or a part, is in it with its traceback, and the others go on."""

    def __init__(self, file: Path, about: Row, *, budget_s: float, clock: Callable[[], float] = time.monotonic):
        self.file, self.about, self.budget_s, self._clock = file, about, budget_s, clock
        self.parts: dict[str, Row] = {}
        self._begun, self._until = clock(), 0.0
        self.flush()

    @property
    def failures(self) -> list[str]:
        parts = [name for name, part in self.parts.items() if "error" in part]
        rows = [f"{name}: {row['row']}" for name, part in self.parts.items() for row in part["rows"] if "error" in row]
        return parts + rows

    @contextmanager
    def part(self, name: str, share: float) -> Iterator[Part]:
        """share: of the budget; what earlier parts left is this one's too."""
        self._until += share * self.budget_s
        found: Row = {"rows": [], "not_run": []}
        self.parts[name] = found
        say(f"\n## {name}")
        begun = self._clock()
        try:
            yield Part(name, found, self)
        except Exception:  # noqa: BLE001 - told, and the exit status
            found["error"] = traceback.format_exc()
            say(found["error"])
        found["seconds"] = round(self._clock() - begun, 1)
        self.flush()

    def left_s(self) -> float:
        """Of this part."""
        return self._begun + self._until - self._clock()

    def flush(self) -> None:
        whole = {"about": self.about, "failures": self.failures, "parts": self.parts}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".partial")
        beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.file)


class Part:
    def __init__(self, name: str, found: Row, report: Report):
        self.name, self.found, self._report = name, found, report
        self.left_s = report.left_s

    @property
    def rows(self) -> list[Row]:
        return self.found["rows"]

    def row(self, name: str, **values: Any) -> None:
        self.rows.append({"row": name, **values})
        told = "  ".join(f"{key} {shown(value)}" for key, value in values.items() if key not in UNSAID)
        say(f"{name:<44}  {told}")
        self._report.flush()

    def not_run(self, name: str, why: str) -> None:
        self.found["not_run"].append({"row": name, "why": why})
        say(f"{name:<44}  NOT RUN: {why}")
        self._report.flush()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """What fails within is a row of that name, and the part goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - told, and the exit status
            self.row(name, failed=f"{type(error).__name__}: {error}".splitlines()[0], error=traceback.format_exc())
            say(self.rows[-1]["error"])


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def say(text: str) -> None:
    print(text, flush=True)
