"""A run that is killed and resumed, beside one that nothing disturbed: real launches of `reeltune train`, tiny.

With the kernels that torch chooses, and with those alone that give the same bits each time: what differs with the
first, between two runs that nothing disturbed too, is the kernels' doing and not the resume's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.report import Part
from reeltune.demo.checkpoint import write_checkpoint
from reeltune.demo.clips import write_data_set
from tests.runs.same_run import assert_same_checkpoint, rows

STEPS, SAVED = 10, 4  # the run is killed once the checkpoint of step 4 is there
LOOK_SECONDS = 0.002
ARGUMENTS = {
    "train_mode": "control_ref",
    "control_ref_image": "random",
    "video_sample_n_frames": 9,
    "video_sample_stride": 1,
    "video_sample_size": 64,
    "image_sample_size": 64,
    "train_batch_size": 2,
    "max_train_steps": STEPS,
    "checkpointing_steps": SAVED,
    "logging_steps": 1,
    "preview_count": 0,
    "held_out_share": 0.0,
    "report_to": "none",
    "dataloader_num_workers": 1,
    "learning_rate": 1e-3,
    "gradient_checkpointing": "true",
}
BF16 = {"mixed_precision": "bf16", "trained_weights": "bf16_stochastic"}
RECIPES = {
    "bf16": BF16,
    "bf16, compiled": {**BF16, "compile": "blocks"},
    "fp32": {"mixed_precision": "no"},
}
KERNELS = {True: "deterministic kernels", False: "kernels as torch chooses"}
LEAST_SECONDS = 60  # for launches that have begun


def measure(part: Part, folder: Path) -> None:
    longest_s = 0.0
    model = write_checkpoint(folder / "model")
    meta, _ = write_data_set(folder / "data", clips=8, stills=0, held_out=1)
    for recipe in RECIPES:
        names = {deterministic: f"{recipe}, {told}" for deterministic, told in KERNELS.items()}
        if part.left_s() <= longest_s:
            for name in names.values():
                part.not_run(name, "no time is left")
            continue
        begun, timeout_s = time.monotonic(), max(part.left_s(), LEAST_SECONDS)
        with ThreadPoolExecutor(len(KERNELS)) as pool:  # they wait for processes, and the device has room for all
            runs = {deterministic: Runs(model, meta, folder, recipe, deterministic) for deterministic in KERNELS}
            found = {which: pool.submit(one.compared, timeout_s=timeout_s) for which, one in runs.items()}
        longest_s = time.monotonic() - begun
        for deterministic, name in names.items():
            with part.attempt(name):
                part.row(name, **found[deterministic].result())


@dataclass(frozen=True)
class Runs:
    """Three runs of one recipe: two that nothing disturbs, side by side with one that is killed and goes on."""

    model: Path
    meta: Path
    folder: Path
    recipe: str
    deterministic: bool

    @property
    def place(self) -> Path:
        return self.folder / f"{self.recipe}-{'deterministic' if self.deterministic else 'chosen'}"

    def compared(self, *, timeout_s: float) -> dict[str, str | int | float]:
        """Raises RuntimeError for a run that fails, and for one that was over before it could be killed."""
        until = time.monotonic() + timeout_s
        self.place.mkdir(parents=True)
        launched = {name: self._launch(name) for name in ("first", "second", "killed")}
        try:
            killed_at = self._kill(launched.pop("killed"), until)
            launched["killed"] = self._launch("killed", "--resume_from_checkpoint", "latest")
            for name, process in launched.items():
                self._end(name, process, until)
        finally:
            for process in launched.values():
                process.kill()
                process.wait()
        return {
            "killed_after_step": killed_at,
            "repeat_equal": self._told("first", "second"),
            "resume_equal": self._told("first", "killed"),
        }

    def _launch(self, name: str, *more: str) -> subprocess.Popen:
        settings = {
            **ARGUMENTS,
            **RECIPES[self.recipe],
            "deterministic": str(self.deterministic).lower(),
            "pretrained_model_name_or_path": self.model,
            "train_data_dir": self.meta.parent,
            "train_data_meta": self.meta,
            "output_dir": self.place / name,
        }
        words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        with (self.place / f"{name}.log").open("a", encoding="utf-8") as log:
            command = [sys.executable, "-m", "reeltune", "train", *words, *more]
            environment = {"OMP_NUM_THREADS": "1", **os.environ}  # six runs share the processor
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _kill(self, process: subprocess.Popen, until: float) -> int:
        """Returns the last step that it told of."""
        while not (self.place / "killed" / f"checkpoint-{SAVED}").is_dir():
            if process.poll() is not None or time.monotonic() > until:
                break
            time.sleep(LOOK_SECONDS)
        over = process.poll() is not None
        if not over:
            os.killpg(process.pid, signal.SIGKILL)  # with its reading processes
        process.wait()
        if over or not (self.place / "killed" / f"checkpoint-{SAVED}").is_dir():
            raise RuntimeError(f"the run to be killed was not at work after step {SAVED}:\n{self._log('killed')}")
        steps = (json.loads(line) for line in (self.place / "killed" / "metrics.jsonl").read_text().splitlines())
        return max(row["step"] for row in steps if row["kind"] == "step")

    def _end(self, name: str, process: subprocess.Popen, until: float) -> None:
        try:
            code = process.wait(max(until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name} did not end in time:\n{self._log(name)}") from None
        if code:
            raise RuntimeError(f"{name} ended with {code}:\n{self._log(name)}")

    def _log(self, name: str) -> str:
        return (self.place / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def _told(self, one: str, other: str) -> str:
        """Whether weights, optimizer state and the steps' numbers are the same bits; else the first step apart."""
        paths = self.place / one, self.place / other
        pairs = list(zip(*(rows(path, ("step",)) for path in paths), strict=True))
        apart = next((ours["step"] for ours, theirs in pairs if ours != theirs), None)
        if apart is not None:
            return f"NO, from step {apart}"
        try:
            assert_same_checkpoint(*(path / f"checkpoint-{STEPS}" for path in paths))
        except AssertionError:
            return "NO, in the last checkpoint"
        return "yes"
