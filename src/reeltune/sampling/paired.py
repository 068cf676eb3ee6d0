"""Numbers of a run beside those of its start, clip by clip: clips differ far more from each other than a training run
changes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reeltune.core.files import whole_file, writing
from reeltune.core.reading import WHOLE, Kind, read_table, require_fields

REMEDY = "delete it, to compare with the weights of now"


def kept_start(path: Path, kinds: Mapping[str, Kind]) -> dict[str, Any] | None:
    """What was measured of the starting weights, and on what; None if nothing was. kinds: of its fields beside step.

    Raises UserError for a file that holds something else.
    """
    if not path.is_file():
        return None
    kept = read_table(path, REMEDY)
    require_fields(kept, {"step": WHOLE, **kinds}, path, REMEDY)
    return kept


def keep_start(path: Path, start: Mapping[str, Any]) -> None:
    """Raises CannotWriteError."""
    with whole_file(path) as file:
        file.write(json.dumps(start, indent=1) + "\n")


def forget_starts(output_dir: Path) -> None:
    """Deletes what was measured of the weights that a run in this folder began with. Raises CannotWriteError."""
    for path in (output_dir / "validation").glob("start*.json"):
        with writing(path):
            path.unlink()


# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2)
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Z_975 = 1.959964  # and of the normal distribution


def band95(differences: np.ndarray) -> list[float] | None:
    """95 % confidence interval of the mean of independent differences, by Student's t; None for fewer than two."""
    freedom = len(differences) - 1
    if freedom < 1:
        return None
    if freedom <= len(T_975):
        t = T_975[freedom - 1]
    else:  # Abramowitz and Stegun, 26.7.5
        z = Z_975
        t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    mean, half = differences.mean(), t * differences.std(ddof=1) / math.sqrt(len(differences))
    return [float(mean - half), float(mean + half)]
