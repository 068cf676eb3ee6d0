"""What a run tells while it runs: the console, metrics.jsonl and the trackers.

metrics.jsonl has one JSON object a line, told apart by "kind":
    step        every optimizer step: loss, grad_norm, lr, Prodigy's d, shape, samples, tokens, times, rates, memory
    validation  the held-out loss, paired with that of the starting weights
    obedience   how far previews follow their control, paired alike
    save        a checkpoint written: bytes, seconds until it was whole, and those that training waited for it
    notice      something the user should know
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from reeltune.core.errors import refuse
from reeltune.core.files import free_path, whole_file, writing
from reeltune.core.reading import as_user_error, json_value, refuse_absent
from reeltune.core.terminal import Terminal
from reeltune.reporting.metrics import PARTS
from reeltune.reporting.time_verdict import verdict

VERDICT_EVERY = 5  # console lines
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}  # name -> package


class Log:
    """One per process; every process but the main one stays silent.

    A row is in the file when `step` returns, and a kill after it does not take it. Where its values are tensors on a
    GPU, their copies are begun and the row is written by the next `step`, so that the device is not waited for, or by
    `flush`, which comes before a checkpoint is written.

    `resume_step` is the step of the checkpoint that the run goes on from; lines of later steps are cut. They are all
    another run's, and moved aside, where that is of another folder: without `is_own`.
    Raises UserError for a tracker that is not installed.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        main: bool,
        report_to: Sequence[str] = (),
        project: str = "reeltune",
        logging_steps: int = 10,
        resume_step: int | None = None,
        is_own: bool = True,
        total_steps: int | None = None,
        peak_flops: float | None = None,
        device_bytes: int | None = None,
        sparing: Sequence[str] = (),
        console: Console | None = None,
    ):
        self.main = main
        self.console = console or Terminal(highlight=False, soft_wrap=True)
        self.logging_steps = logging_steps
        self.total_steps = total_steps
        self.peak_flops = peak_flops
        self.judge = partial(verdict, device_bytes=device_bytes, sparing=sparing)
        self.step_now = resume_step or 0
        self.waiting: list[tuple[dict, torch.cuda.Event | None, Callable[[], dict[str, float]] | None]] = []
        self.shown: list[dict] = []  # rows since the last console line
        self.judged: list[dict] = []  # rows since the last verdict
        self.lines = 0
        self.first_step = True
        self.trackers: list[Tracker] = []
        check_trackers(report_to)
        if not main:
            return
        self.path = path = Path(output_dir) / "metrics.jsonl"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            moved = _start_over(path) if resume_step is None or not is_own else _cut_after(path, resume_step)
            self.file = path.open("ab", buffering=0)
        self.trackers = [_open_tracker(name, path.parent, project, resume_step) for name in report_to if name != "none"]
        if moved:
            self.notice(f"the metrics of an earlier run in this folder are kept as {moved}")

    def step(self, row: dict[str, Any], seconds: Callable[[], dict[str, float]] | None = None) -> None:
        """One optimizer step: step, epoch, loss, grad_norm, lr, shape, samples, tokens, peak_memory_bytes.

        samples and tokens count all processes. `seconds` gives the time of each of PARTS when asked (it may wait for
        the device); their sum is the step's time, from which the rates follow. "flops" of the step, over all
        processes, becomes "mfu" where the devices' peak (`peak_flops`, summed alike) is known.
        """
        if not self.main:
            return
        self.step_now = row["step"]
        row, is_there = _copying(row)
        self.waiting.append((row, is_there, seconds))
        self._read_waiting(but=0 if is_there is None else 1)
        if self.step_now % self.logging_steps == 0 or self.step_now == self.total_steps:
            self._read_waiting()
            self._print_line()

    def validation(self, row: dict[str, Any]) -> None:
        """The held-out loss: start_step, loss, loss_start, difference (mean, paired), band95, per_band, per_clip, n
        clips; where two networks learn also that of each, `experts`."""
        if not self.main:
            return
        self._write({"kind": "validation", "step": self.step_now, **row})
        self._track({"held_out/loss": row["loss"], "held_out/difference": row["difference"]})
        told = f"[bold]held-out loss {row['loss']:.4f}[/]{self._changed(row, 4)}"
        self._say(f"{told}, {row['n']} clip{'s' if row['n'] != 1 else ''}", markup=True)
        for one in row.get("experts", ()):
            self._track({f"held_out/loss_{one['expert']}": one["loss"]})
            self._say(f"  expert {one['expert']} {one['loss']:.4f}{self._changed({**row, **one}, 4)}")

    def obedience(self, row: dict[str, Any]) -> None:
        """How far previews follow their control: as a validation's row, `score` in place of `loss`, and its words."""
        if not self.main:
            return
        self._write({"kind": "obedience", "step": self.step_now, **row})
        self._track({"obedience/score": row["score"], "obedience/difference": row["difference"]})
        told = f"[bold]follows its control {row['score']:.3f}{row['unit']}[/] ({escape(row['measure'])})"
        self._say(f"{told}{self._changed(row, 3)}, {row['n']} preview{'s' if row['n'] != 1 else ''}", markup=True)

    def _changed(self, row: dict[str, Any], figures: int) -> str:
        """The change from the start, with its band; empty at the start itself."""
        if self.step_now <= row["start_step"]:
            return ""
        changed = f", {round(row['difference'], figures) + 0:+.{figures}f} from the start"  # + 0: no minus before zero
        if row["band95"]:
            changed += " (95 % band {} to {})".format(*(f"{edge:+.{figures}f}" for edge in row["band95"]))
        return changed

    def save(self, row: dict[str, Any]) -> None:
        """A checkpoint written, perhaps while training went on: step, path, bytes, seconds, blocked_seconds."""
        if not self.main:
            return
        self._write({"kind": "save", **row})
        took = f"in {row['seconds']:.1f} s, of which training waited {row['blocked_seconds']:.1f} s"
        self._say(f"saved {row['path']} ({row['bytes'] / 2**20:,.0f} MiB {took})", "green")

    def notice(self, text: str) -> None:
        """Something the user should know."""
        if self.main:
            self._write({"kind": "notice", "step": self.step_now, "text": text})
            self._say(text, "cyan")

    def warn(self, text: str) -> None:
        """Something the user should act on."""
        if self.main:
            self._write({"kind": "notice", "step": self.step_now, "text": text, "warning": True})
            self._say(text, "yellow")

    def flush(self) -> None:
        """Every row so far is on the disk."""
        if self.main:
            self._read_waiting()
            with writing(self.path):
                os.fsync(self.file.fileno())

    def close(self) -> None:
        if not self.main or self.file.closed:
            return
        self.flush()
        if self.lines < VERDICT_EVERY and self.judged:
            self._print_verdict()  # a short run has one too
        self.file.close()
        for tracker in self.trackers:
            tracker.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_waiting(self, but: int = 0) -> None:
        """but: how many of the last stay."""
        count = len(self.waiting) - but
        waiting, self.waiting = self.waiting[:count], self.waiting[count:]
        for row, is_there, seconds in waiting:
            if is_there is not None:
                is_there.synchronize()
            whole = {"kind": "step", **_floats(row), **self._rates(row, seconds() if seconds else {})}
            whole.pop("flops", None)
            self._line(whole)
            self.shown.append(whole)
            if self.first_step:  # it pays for compilation and worker start-up, once
                self.first_step = False
            else:
                self.judged.append(whole)

    def _rates(self, row: dict[str, Any], parts: dict[str, float]) -> dict[str, float | None]:
        if not parts:
            return {}
        step_s = sum(parts.values())
        known = self.peak_flops and row.get("flops")
        return {
            "step_s": step_s,
            **{name: parts[name] for name in PARTS},
            "samples_per_s": row["samples"] / step_s,
            "tokens_per_s": row["tokens"] / step_s,
            "mfu": row["flops"] / step_s / self.peak_flops if known else None,
        }

    def _write(self, row: dict[str, Any]) -> None:
        """A line of its own, after those of the steps before it."""
        self._read_waiting()
        self._line(_floats(row))

    def _line(self, row: dict[str, Any]) -> None:
        """Which a kill right after it does not take. Of one that does not fit on the disk nothing stays."""
        left = (json.dumps(row) + "\n").encode()
        with writing(self.path):
            size_bytes = os.fstat(self.file.fileno()).st_size
            try:
                while left:
                    left = left[self.file.write(left) :]
            except OSError:
                self.file.truncate(size_bytes)
                raise

    def _print_line(self) -> None:
        rows, self.shown = self.shown, []
        last, means = rows[-1], _means(rows)
        total = f"/{self.total_steps}" if self.total_steps else ""
        F, H, W = last["shape"]
        told = [
            f"[bold]step {last['step']}{total}[/]",
            f"{'loss' if len(rows) == 1 else f'mean of {len(rows)}: loss'} {means['loss']:.4f}",
            f"grad {means['grad_norm']:.3g}",
            f"lr {last['lr']:.2e}" + (f" x d {last['d']:.2e}" if "d" in last else ""),
            f"{F}x{H}x{W}",
        ]
        if "step_s" in means:
            told += [f"{means['step_s']:.3g} s/step", f"{means['tokens_per_s']:,.0f} tokens/s"]
            if share := round(means["encode_s"] / means["step_s"], 2):
                told.append(f"{share:.0%} encoding")
        if "mfu" in means:
            told.append(f"MFU {means['mfu']:.0%}")
        if last.get("peak_memory_bytes"):
            told.append(f"{last['peak_memory_bytes'] / 2**30:.1f} GiB")
        if self.total_steps and "step_s" in means:
            told.append(f"{timedelta(seconds=round(means['step_s'] * (self.total_steps - last['step'])))} left")
        self._say("  ".join(told), markup=True)
        self._track({f"train/{name}": value for name, value in means.items() if name != "step"})
        self.lines += 1
        if self.lines % VERDICT_EVERY == 0 and self.judged:
            self._print_verdict()

    def _print_verdict(self) -> None:
        rows, self.judged = self.judged, []
        if "step_s" in rows[0]:
            self._say(self.judge(rows), "magenta")

    def _track(self, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.write(values, self.step_now)

    def _say(self, text: str, style: str | None = None, *, markup: bool = False) -> None:
        clock = time.strftime("%H:%M:%S")
        self.console.print(f"[dim]{clock}[/] {text if markup else escape(text)}", style=style)


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises UserError naming every tracker that is not installed, and how to install it. Cheap; call it early."""
    missing = [name for name in report_to if name != "none" and importlib.util.find_spec(TRACKERS[name]) is None]
    refuse(
        "recipe",
        [
            f"report_to has {name}, which is not installed; pip install {TRACKERS[name]}, or leave {name} out of it"
            for name in missing
        ],
    )


class Tracker:
    def __init__(self, write: Callable[[dict[str, float], int], None], close: Callable[[], None]):
        self.write, self.close = write, close


def _open_tracker(name: str, output_dir: Path, project: str, resume_step: int | None) -> Tracker:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resume_step is None else resume_step + 1
        writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge)

        def write(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)

        return Tracker(write, writer.close)
    module = importlib.import_module(name)  # wandb and trackio share these three calls
    run = module.init(project=project, name=output_dir.name)
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


def _copying(row: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event | None]:
    """The row with copies of its GPU tensors under way to the host, and the event after which they are there."""
    if not any(isinstance(value, Tensor) and value.is_cuda for value in row.values()):
        return row, None
    copies = {name: v.to("cpu", non_blocking=True) if isinstance(v, Tensor) else v for name, v in row.items()}
    is_there = torch.cuda.Event()
    is_there.record()
    return copies, is_there


def _floats(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in row.items()}


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of every number that the last row has, over the rows that have it."""
    numbers = [key for key, value in rows[-1].items() if isinstance(value, int | float)]
    had = {key: [row[key] for row in rows if row.get(key) is not None] for key in numbers}
    return {key: sum(values) / len(values) for key, values in had.items()}


def _start_over(path: Path) -> str | None:
    """Moves an earlier run's file aside. Returns its new name."""
    if not path.exists():
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    aside = free_path(path.with_name(f"metrics.until-{stamp}.jsonl"))  # two of one second, or of a clock set back
    path.rename(aside)
    return aside.name


def _cut_after(path: Path, step: int) -> None:
    """Drops lines of later steps, and a last line that a kill left half written. Atomic; one line in memory.

    The validation of this very step came after its checkpoint: the resumed run makes it again, and its previews.

    Raises UserError for a broken line elsewhere.
    """
    if not path.exists():
        return
    refuse_absent(path)
    with path.open("rb") as old, whole_file(path, "wb") as new:
        for number, line in enumerate(old, 1):
            if not line.endswith(b"\n"):
                break
            with as_user_error(
                path, f"line {number} is no JSON of a run", "delete that line, or start in another folder"
            ):
                row = json_value(line)
                validates = row["kind"] in ("validation", "obedience")
                before = row["step"] < step or (row["step"] == step and not validates)
            if before:
                new.write(line)
