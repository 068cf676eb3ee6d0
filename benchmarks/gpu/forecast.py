"""What `reeltune plan` says of the steps, in a process of its own meanwhile: its memory and time beside the measured.

`python -m benchmarks.gpu.forecast full|tiny FOLDER N` writes a line of JSON for each of the first N ways, on the CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import torch

from benchmarks.gpu import step
from benchmarks.gpu.report import Part, Row, shown
from benchmarks.gpu.sizes import FULL, PHASES, TINY, Scale
from benchmarks.gpu.steps import WAYS
from reeltune.distributed.engine import peak_flops
from reeltune.estimate import throughput
from reeltune.estimate.estimator import Estimator

NEAR = 0.05
CAPTION = "a red kite"


class Forecast:
    """Under way from the beginning; `compare` waits for what is not there yet."""

    def __init__(self, scale: Scale, checkpoints: Path, folder: Path, count: int | None = None):
        self.scale, self.file = scale, folder / "forecast.jsonl"
        self.errors = (folder / "forecast.err").open("w+", encoding="utf-8")
        words = [sys.executable, "-m", "benchmarks.gpu.forecast", "tiny" if scale.is_rehearsal else "full"]
        with self.file.open("w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [*words, str(checkpoints), str(len(WAYS) if count is None else count)],
                stdout=out,
                stderr=self.errors,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()

    def rows(self, part: Part) -> dict[str, Row]:
        """By the way's name; those that came in time."""
        while self.process.poll() is None and part.left_s() > 0:
            time.sleep(0.2)
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        found = {row["row"]: row for row in (json.loads(line) for line in lines if line.endswith("\n"))}
        if self.process.poll():
            raise RuntimeError(f"the forecast ended with {self.process.returncode}:\n{_end_of(self.errors)}")
        return found


def compare(part: Part, forecast: Forecast, measured: list[Row], device: torch.device) -> None:
    """measured: rows of steps.measure."""
    foretold, sheet = forecast.rows(part), peak_flops(device, torch.bfloat16)
    reached: dict[str, float] = {}  # by each network's first row, FLOP/s with what is recomputed
    for row in measured:
        name = row["row"]
        if "step_s" not in row:
            continue
        if name not in foretold:
            part.not_run(name, "not foretold in time")
            continue
        with part.attempt(name):
            told = foretold[name]
            rate = told["flops"] / row["step_s"]
            by_first = told["flops"] / reached.setdefault(row["network"], rate)
            part.row(name, **_memory(told, row), **_by_phase(told, row), **_time(told, row, sheet, by_first))


def _memory(told: Row, row: Row) -> Row:
    real = row["peak_gb"]
    if isinstance(real, str):
        return {"plan_gb": told["peak_gb"], "measured_gb": real, "memory_ratio": "unknown"}
    ratio = told["peak_gb"] / real
    flag = "yes" if abs(ratio - 1) <= NEAR else "NO"
    return {"plan_gb": told["peak_gb"], "measured_gb": real, "memory_ratio": ratio, "within_5_percent": flag}


def _by_phase(told: Row, row: Row) -> Row:
    """The peaks of each phase in GB: the plan's, and the measured."""
    return {phase: f"{shown(told['peaks_gb'][phase])} / {shown(row['peaks_gb'][phase])}" for phase in PHASES}


def _time(told: Row, row: Row, sheet: float | None, by_first_s: float) -> Row:
    """By the peak as plan has it without a measured run; and as it has it with one, here the network's first row."""
    found: Row = {"measured_s": row["step_s"], "plan_by_first_row_s": by_first_s}
    if sheet is None:
        return {**found, "plan_s": "unknown", "hfu": "unknown"}
    least_s, most_s = throughput.seconds(
        told["flops"], throughput.of_peak(sheet, "it", compiled=row["changes"].get("compile") == "blocks"), 1
    )
    within = "yes" if least_s <= row["step_s"] <= most_s else "NO"
    hfu = told["flops"] / row["step_s"] / sheet  # of the hardware: recomputation counts
    return {**found, "plan_s": f"{least_s:.3g} to {most_s:.3g}", "plan_holds": within, "hfu": hfu}


def _end_of(file: IO[str]) -> str:
    file.seek(0)
    return file.read()[-2000:]


# ---- in the process of its own


def foretell(scale: Scale, checkpoints: Path, count: int) -> None:
    estimators: dict[tuple, Estimator] = {}
    for way in WAYS[:count]:
        recipe = step.recipe_of(checkpoints / way.network, **way.changes)
        key = way.network, recipe.adapter.rank
        estimator = estimators.setdefault(key, Estimator(recipe))
        found = estimator.step(recipe, [step.draw_of(scale.clip)], [CAPTION], preview=False)
        peaks_gb = {phase: sum(found.peaks[phase].values()) / 1e9 for phase in PHASES}
        flops = sum(found.flops.get(phase, 0) for phase in PHASES)
        row = {"row": way.name, "peak_gb": max(peaks_gb.values()), "peaks_gb": peaks_gb, "flops": flops}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    foretell({"full": FULL, "tiny": TINY}[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]))
