"""How far a long job is, how fast, and how long it will take yet: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY_SECONDS = 30.0  # between lines where there is no terminal


class ProgressBar:
    """On stderr. shown False: says nothing but `say`."""

    def __init__(self, total: int, *, shown: bool):
        self.total, self.shown, self.done = total, shown, 0
        self.console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not (shown and self.console.is_terminal))
        self.task = self.bar.add_task("", total=total, rate="")

    def __enter__(self) -> ProgressBar:
        self.started = self.last_line = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self) -> None:
        self.done += 1
        now = time.monotonic()
        self.bar.update(self.task, advance=1, rate=f"{self.done / (now - self.started):.3g}/s")
        if self.shown and not self.console.is_terminal and now - self.last_line > EVERY_SECONDS:
            self.last_line = now
            self.say(progress_line(self.done, self.total, now - self.started))

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def progress_line(done: int, total: int, seconds: float) -> str:
    """120 of 1,000, 4.1/s, 3 min 35 s to go"""
    minutes, rest = divmod(round((total - done) * seconds / done), 60)
    return f"{done:,} of {total:,}, {done / seconds:.3g}/s, {f'{minutes:,} min ' if minutes else ''}{rest} s to go"
