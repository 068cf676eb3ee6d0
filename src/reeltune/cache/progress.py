"""How far a long job is, how fast, and how long it will take yet: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reeltune.core.terminal import Terminal

EVERY_SECONDS = 30.0  # between lines where there is no terminal


class ProgressBar:
    """A bar on stderr. shown False: says nothing but `say`. title: what is done; unit: of what `total` counts, as "
    MB"."""

    def __init__(self, total: int, *, shown: bool, title: str = "", unit: str = ""):
        self.total, self.shown, self.title, self.unit, self.done = total, shown, title, unit, 0.0
        self.console = Terminal(stderr=True)
        named = [TextColumn("{task.description}")] if title else []
        columns = (*named, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, disable=not (shown and self.console.is_terminal))
        self.task = self.bar.add_task(title, total=total, rate="")

    def __enter__(self) -> ProgressBar:
        self.started = self.last_line = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, count: float = 1) -> None:
        self.done += count
        now = time.monotonic()
        self.bar.update(self.task, advance=count, rate=rate(self.done / (now - self.started), self.unit))
        if self.shown and not self.console.is_terminal and now - self.last_line > EVERY_SECONDS:
            self.last_line = now
            line = progress_line(self.done, self.total, now - self.started, self.unit)
            self.say(f"{self.title}: {line}" if self.title else line)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def progress_line(done: float, total: int, seconds: float, unit: str = "") -> str:
    """120 of 1,000, 4.1/s, 3 min 35 s to go; with a unit 120 of 1,000 MB, 4.1 MB/s, 3 min 35 s to go"""
    minutes, rest = divmod(round((total - done) * seconds / done), 60)
    ahead = f"{f'{minutes:,} min ' if minutes else ''}{rest} s to go"
    return f"{done:,.0f} of {total:,}{unit}, {rate(done / seconds, unit)}, {ahead}"


def rate(per_second: float, unit: str) -> str:
    return f"{per_second:,.0f}{unit}/s" if per_second >= 100 else f"{per_second:.3g}{unit}/s"
