"""What an epoch is made of, from the measurements alone: sizes, tokens, what is cut off or left out.

Counted over whole arrays, so that a million clips take seconds.  (no torch)
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

import numpy as np

from reeltune.core.types import Shape
from reeltune.data.plan import Measures, Plan
from reeltune.data.shapes import ROUNDING, SizeRules, sampled_step

CUT = 0.01  # share of a picture that may go by rounding to whole patches without its being called cropped


@dataclass(frozen=True)
class Bucket:
    """All samples of one shape."""

    shape: Shape
    samples: int
    micro_steps: int
    tokens: int  # of one sample
    footage_s: tuple[float, float]  # that a sample covers, at least and at most; stills have none

    @property
    def aspect(self) -> str:
        """Width to height, in small whole numbers near it."""
        near = Fraction(self.shape.width, self.shape.height).limit_denominator(16)
        return f"{near.numerator}:{near.denominator}"

    @property
    def side(self) -> int:
        """Pixels of the square of the same area."""
        return isqrt(self.shape.height * self.shape.width)


@dataclass(frozen=True)
class DataForecast:
    """The first epoch. Shares are of its samples."""

    buckets: list[Bucket]  # most tokens first
    samples: int
    micro_steps: int
    step_tokens: tuple[float, float, float]
    """Tokens of an optimizer step over all processes: mean, 95th percentile, most."""
    cropped: float
    picture_lost: float  # mean share of the picture that cropping takes
    footage_s: float


def forecast_data(plan: Plan, records: Measures, rules: SizeRules, *, accumulate: int = 1) -> DataForecast:
    """Counts over all micro-steps of `plan`, which is of these records."""
    shapes, which, record = plan.outline()
    group = record.shape[1]
    tokens = np.array([rules.geometry.tokens(shape) for shape in shapes])
    micro_steps = np.bincount(which, minlength=len(shapes))
    shape_S13 = np.array(shapes)[which][:, None]
    covered_s, lost = footage_s(records, rules, shape_S13, record), picture_lost(records, rules, shape_S13, record)

    def bucket(i: int) -> Bucket:
        seconds, count = covered_s[which == i], int(micro_steps[i])
        return Bucket(shapes[i], count * group, count, int(tokens[i]), (float(seconds.min()), float(seconds.max())))

    per_micro = tokens[which] * group
    whole = len(per_micro) - len(per_micro) % accumulate or len(per_micro)
    per_step = np.add.reduceat(per_micro[:whole], np.arange(0, whole, accumulate))
    return DataForecast(
        buckets=sorted(map(bucket, np.flatnonzero(micro_steps).tolist()), key=lambda bucket: -bucket.tokens),
        samples=record.size,
        micro_steps=len(which),
        step_tokens=(float(per_step.mean()), float(np.percentile(per_step, 95)), float(per_step.max())),
        cropped=float((lost > CUT).mean()),
        picture_lost=float(lost.mean()),
        footage_s=float(covered_s.sum()),
    )


def picture_lost(records: Measures, rules: SizeRules, shape_S13: np.ndarray, record_SG: np.ndarray) -> np.ndarray:
    """float_SG: share of the picture of each sample of each step that is cut off; fix_sample_size stretches instead."""
    if rules.fix_sample_size is not None:
        return np.zeros(record_SG.shape)
    wanted = shape_S13[..., 2] / shape_S13[..., 1]
    ratio = np.divide(records.width, records.height)[record_SG] / wanted
    return 1 - np.minimum(ratio, 1 / ratio)


def footage_s(records: Measures, rules: SizeRules, shape_S13: np.ndarray, record_SG: np.ndarray) -> np.ndarray:
    """float_SG: seconds of each sample of each step from the first frame taken to the end of the last."""
    fps = np.asarray(records.fps, dtype=np.float64)[record_SG]
    span = np.floor((shape_S13[..., 0] - 1) * sampled_step(rules, fps) + ROUNDING) + 1
    moving = np.asarray(records.kind_video)[record_SG] & (fps > 0)
    return np.divide(span, fps, out=np.zeros(span.shape), where=moving)
