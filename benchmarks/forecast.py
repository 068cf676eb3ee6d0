"""What `reeltune plan` takes on many rows; its memory over the allocator's, of a tiny network of each family."""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from pathlib import Path

from benchmarks.cache import checkpoints
from reeltune.core.types import Shape
from reeltune.data.plan import Plan
from reeltune.estimate import memory_tracker
from reeltune.estimate.epoch import forecast_data
from reeltune.estimate.estimator import Estimator
from tests.runs import test_estimate
from tests.runs.small_run import recipe
from tests.unit import test_plan

ROWS = (10**4, 10**6)
SHAPE = Shape(9, 64, 96)


def count_rows(rows: int) -> tuple[float, float]:
    """(seconds, gigabytes at most) of planning and counting an epoch of so many rows, measured before."""
    records = test_plan.mixed(rows)
    tracemalloc.start()
    began = time.perf_counter()
    forecast_data(Plan(records, test_plan.RULES, group=8, seed=0, largest_first=True), records, test_plan.RULES)
    seconds = time.perf_counter() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak / 1e9


def predicted_over_measured(checkpoint: Path, mode: str, folder: Path) -> float:
    """Of weights, gradients, optimizer state and kept activations together, in bf16 without recomputation."""
    run = recipe(checkpoint, folder, folder / "out", train_mode=mode, mixed_precision="bf16")
    estimator = Estimator(run, on_cpu=True)
    found = estimator.step(run, test_estimate.draws(SHAPE), test_estimate.CAPTIONS, preview=False)
    weights = found.peaks["step"]["weights"] + found.peaks["step"].get("still", 0)
    predicted = weights + found.gradient_bytes + found.state_bytes + found.saved_bytes
    real = test_estimate.real_step(test_estimate.Tiny(checkpoint, {}), run, SHAPE)
    return predicted / sum(real.values())


def main() -> dict[str, float]:
    found: dict[str, float] = {}
    for rows in ROWS:
        power = len(str(rows)) - 1
        found[f"plan_rows_1e{power}_s"], found[f"plan_rows_1e{power}_gb"] = count_rows(rows)
        print(f"{rows:,} rows: {found[f'plan_rows_1e{power}_s']:.2f} s, {found[f'plan_rows_1e{power}_gb']:.3f} GB")
    rounded, memory_tracker.ROUND_BYTES = memory_tracker.ROUND_BYTES, 1  # blocks of this allocator
    try:
        with tempfile.TemporaryDirectory() as place:
            for name, checkpoint, mode in checkpoints(Path(place)):
                found[f"plan_memory_{name}"] = predicted_over_measured(checkpoint, mode, Path(place))
                print(f"{name}: {found[f'plan_memory_{name}']:.4f}")
    finally:
        memory_tracker.ROUND_BYTES = rounded
    return found
