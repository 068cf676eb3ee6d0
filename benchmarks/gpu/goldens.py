"""The original tools' numbers on this device, in float32 without TF32: those of tests/goldens."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from benchmarks import parity_cogvideox, parity_easyanimate, parity_hunyuan, parity_wan
from benchmarks.golden import Row, computed_on
from benchmarks.gpu.report import Part

GOLDENS = Path(__file__).parents[2] / "tests" / "goldens"
FAMILIES = parity_wan, parity_hunyuan, parity_easyanimate, parity_cogvideox
ON_THE_HOST = {"camera"}  # files of numbers that no device computes


def measure(part: Part, device: torch.device, goldens: Path = GOLDENS) -> None:
    for family in FAMILIES:
        for path in family.golden_files(goldens):
            name = f"{family.__name__.rpartition('_')[2]} {path.parent.name}/{path.stem}"
            if path.stem in ON_THE_HOST:
                continue
            if part.left_s() <= 0:
                part.not_run(name, "no time is left")
                continue
            with part.attempt(name):
                worst = worst_of(rows_of(family, path, device))
                part.row(
                    name,
                    worst=worst.tensor,
                    difference=difference(worst),
                    bound=worst.bound,
                    of_bound=over(worst),
                    holds="yes" if worst.ok else "NO",
                )


def rows_of(family, path: Path, device: torch.device) -> list[Row]:
    """family: a module of benchmarks/parity.py."""
    with computed_on(device), exact_products():
        return family.measure(path)


class exact_products:
    """float32 is multiplied and convolved in float32."""

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


def worst_of(rows: list[Row]) -> Row:
    return max(rows, key=over)


def difference(row: Row) -> float:
    return row.absolute if row.kind == "absolute" else row.relative


def over(row: Row) -> float:
    """The difference in bounds."""
    if row.bound:
        return difference(row) / row.bound
    return 0.0 if difference(row) == 0 else math.inf
