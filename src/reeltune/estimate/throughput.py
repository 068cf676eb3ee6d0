"""How much arithmetic a run is, and how long it takes at a given or measured throughput.  (no torch)"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.polynomial import Polynomial

from reeltune.core.errors import UserError
from reeltune.core.reading import read_table
from reeltune.reporting.metrics import read_metrics

# Share of a device's peak that is reached, by whether blocks are compiled; what is recomputed is counted. The first is
# the least and the best of large training runs, table 3 in https://arxiv.org/abs/2204.02311 (GPT-3 21 %, Gopher 33 %,
# Megatron-Turing 30 %, PaLM 46 %). On an H100 at 33,000 tokens: Wan2.1 1.3B 40 to 41 %, compiled 47 to 48 %; 14B's
# width 43 to 44 %, compiled 52 to 54 % (measured, 2026-11-27).
REACHED = {False: (0.21, 0.46), True: (0.21, 0.54)}
WARM_UP = 2  # steps of a measured run left out: its first ones choose kernels and fill memory
CONFIDENCE = 1.96  # standard errors to a side of a 95 % band


def curve(tokens: Iterable[int], values: Sequence[float]) -> Polynomial:
    """A quantity of a micro-step by its tokens: the polynomial through what was found at up to three sizes.

    Exact where it was found; between, as exact as the quantity is a sum of what grows with the tokens and, in
    attention, with their square.
    """
    return Polynomial.fit([*tokens], np.array(values, dtype=np.float64), len(values) - 1)


@dataclass(frozen=True)
class Throughput:
    """FLOP/s of one device, as low and as high as it may be, and where that is from."""

    low: float
    high: float
    source: str


def of_peak(peak_flops: float, device: str, *, compiled: bool) -> Throughput:
    least, most = REACHED[compiled]
    source = f"{least:.0%} to {most:.0%} of {device}'s peak; not measured"
    return Throughput(least * peak_flops, most * peak_flops, source)


@dataclass(frozen=True)
class Timed:
    """Steps of an earlier run, their encoding and waiting included."""

    run: Path
    processes: int
    steps: list[tuple[float, int, int]]  # (seconds, samples, tokens), over all processes


def timed_steps(run: Path) -> Timed:
    """The steps that a run has timed in its metrics.jsonl. Raises UserError if they are too few."""
    file, about = run / "metrics.jsonl", run / "run.json"
    if not file.is_file() or not about.is_file():
        raise UserError("measured", f"{str(run)!r} has no metrics.jsonl and run.json; give the output_dir of a run")
    columns = [read_metrics(file).steps.get(name, []) for name in ("step_s", "samples", "tokens")]
    steps = [row for row in zip(*columns, strict=True) if row[0]][WARM_UP:]
    if len(steps) < 2:
        raise UserError("measured", f"{run} has {len(steps)} timed steps after the first {WARM_UP}; let it make 4")
    processes = read_table(about, "give another run").get("processes")
    if type(processes) is not int or processes < 1:
        raise UserError("measured", f"{about} does not tell how many processes there were; give another run")
    return Timed(run, processes, steps)


def measured(timed: Timed, batch_flops: Callable[[float], float], batch_size: int) -> Throughput:
    """What an earlier run's steps reached. batch_flops: FLOPs of a micro-step of `batch_size` samples by the tokens of
    one."""
    taken_s = np.array([step_s for step_s, _, _ in timed.steps])
    flops = [samples / batch_size * batch_flops(tokens / samples) for _, samples, tokens in timed.steps]
    flops = np.array(flops) / timed.processes
    rate = flops.sum() / taken_s.sum()
    error = CONFIDENCE * (taken_s - flops / rate).std(ddof=1) / math.sqrt(len(taken_s)) / taken_s.mean()
    source = f"measured in {len(taken_s)} steps of {timed.run}, within {error:.0%} (95 % band)"
    return Throughput(rate * max(1 - error, 0.01), rate * (1 + error), source)


def seconds(run_flops: float, throughput: Throughput, gpus: int) -> tuple[float, float]:
    """(at least, at most)"""
    return run_flops / throughput.high / gpus, run_flops / throughput.low / gpus
