"""Which frames of a file are taken, at which sizes, with which probability. Nothing is drawn here.  (no torch)

Every choice is a list of (probability, outcome) that can be enumerated; the plan draws from exactly these.
The rules are those of VideoX-Fun's training scripts (https://github.com/aigc-apps/VideoX-Fun), on which the
released models were trained. A "side" L stands for an area of L * L pixels, shaped by an aspect bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from reeltune.core.types import Crop, Geometry, Kind, Shape, SizeLaw

# Aspect buckets: height / width -> pixels at side 512. Nearness is measured to the two-decimal key, as released.
BUCKETS: dict[float, tuple[int, int]] = {
    0.25: (256, 1024), 0.26: (256, 992), 0.27: (256, 960), 0.28: (256, 928), 0.32: (288, 896),
    0.33: (288, 864), 0.35: (288, 832), 0.40: (320, 800), 0.42: (320, 768), 0.48: (352, 736),
    0.50: (352, 704), 0.52: (352, 672), 0.57: (384, 672), 0.60: (384, 640), 0.68: (416, 608),
    0.72: (416, 576), 0.78: (448, 576), 0.82: (448, 544), 0.88: (480, 544), 0.94: (480, 512),
    1.00: (512, 512), 1.07: (512, 480), 1.13: (544, 480), 1.21: (544, 448), 1.29: (576, 448),
    1.38: (576, 416), 1.46: (608, 416), 1.67: (640, 384), 1.75: (672, 384), 2.00: (704, 352),
    2.09: (736, 352), 2.40: (768, 320), 2.50: (800, 320), 2.89: (832, 288), 3.00: (864, 288),
    3.11: (896, 288), 3.62: (928, 256), 3.75: (960, 256), 3.88: (992, 256), 4.00: (1024, 256),
}  # fmt: skip
SQUARE = 1.00
# random_ratio_crop: bucket -> weight
RATIO_CROPS: dict[float, int] = {
    0.42: 1, 0.50: 2, 0.57: 4, 0.68: 4, 0.78: 4, 0.88: 4, 0.94: 8, 1.00: 8,
    1.07: 8, 1.13: 4, 1.29: 4, 1.46: 4, 1.75: 4, 2.00: 2, 2.40: 1,
}  # fmt: skip
# random_hw_adapt: (from this side on, the side is divided by one of these)
DIVISORS = ((1536, (1, 1.25, 1.5, 2, 2.5, 3)), (1024, (1, 1.25, 1.5, 2)), (768, (1, 1.25, 1.5)), (512, (1,)))
RUNG_STEP = 128  # pixels between the sides that a token budget may be spent at
ENLARGE = 1.25  # a rung may be less than this many times the mean side of the smallest clip
FULL_LENGTH = 0.90  # random_frame_crop: probability of the full length
FIRST_FRAME = 0.40  # control_ref_image=random: probability of the first frame
ROUNDING = 1e-6  # frames: times that are whole but for the rounding of a frame rate


@dataclass(frozen=True)
class SizeRules:
    """The recipe's size settings under their own names, with what the family says."""

    video_sample_n_frames: int = 49
    video_sample_stride: int = 2
    video_sample_fps: float | None = None
    video_sample_size: int = 512
    image_sample_size: int = 512
    token_sample_size: int = 512
    enable_bucket: bool = False
    random_hw_adapt: bool = False
    training_with_video_token_length: bool = False
    random_frame_crop: bool = False
    random_ratio_crop: bool = False
    fix_sample_size: tuple[int, int] | None = None
    control_ref_image: Literal["first_frame", "random"] = "first_frame"
    geometry: Geometry = field(default_factory=Geometry)
    law: SizeLaw = field(default_factory=SizeLaw)

    @property
    def ladder(self) -> list[int]:
        """Sides, ascending, that a clip's token budget may be spent at."""
        if self.image_sample_size <= self.video_sample_size:
            return [self.image_sample_size]
        rungs = list(range(self.video_sample_size, self.image_sample_size + 1, RUNG_STEP))
        return rungs if rungs[-1] == self.image_sample_size else [*rungs, self.image_sample_size]

    @property
    def by_budget(self) -> bool:
        """Whether clips are given a side from the ladder, and with it a length."""
        return self.random_hw_adapt and self.training_with_video_token_length and self.fix_sample_size is None


class Source(NamedTuple):
    """What of a file decides its sizes: as displayed, `frames` as taken by `clip_length`."""

    kind: Kind
    height: int
    width: int
    frames: int


class Outcome(NamedTuple):
    p: float
    resize: tuple[tuple[int, int], ...]  # (height, width) each file is resized to
    crop: tuple[int, int]  # (height, width) cut from the centre of each
    frames: int


# Frames


def clip_length(rules: SizeRules, frames: Any, fps: Any) -> Any:
    """How many frames a clip of so many gives; 0 is too short (or has no frame rate to sample by). Takes arrays."""
    step = sampled_step(rules, np.asarray(fps, dtype=np.float64))
    taken = np.floor(np.divide(frames, step, out=np.zeros(np.shape(step)), where=step > 0) + ROUNDING)
    return np.minimum(taken, rules.video_sample_n_frames).astype(np.int64)


def frame_window(rules: SizeRules, frames: int, fps: float) -> tuple[int, int]:
    """(frames taken, latest start): a clip starts at any frame from 0 to the latest start, all equally likely."""
    taken = int(clip_length(rules, frames, fps))
    return taken, frames - frame_indices(rules, fps, 0, taken)[-1] - 1 if taken else 0


def frame_indices(rules: SizeRules, fps: float, start: int, count: int) -> tuple[int, ...]:
    """Frames of the file: every video_sample_stride-th, or the ones on show at video_sample_fps."""
    step = float(sampled_step(rules, np.float64(fps)))
    return tuple(start + int(i * step + ROUNDING) for i in range(count))


def sampled_step(rules: SizeRules, fps: np.ndarray | np.float64) -> np.ndarray | np.float64:
    """Frames of the file from one frame taken to the next. Takes arrays."""
    if rules.video_sample_fps is None:
        return np.full_like(fps, rules.video_sample_stride)
    return fps / rules.video_sample_fps


def reference_frame(rules: SizeRules, frames: int) -> list[float]:
    """Probability of each frame of the clip to be the reference picture."""
    if rules.control_ref_image == "first_frame":
        return [1.0] + [0.0] * (frames - 1)
    return _favour(0, frames, FIRST_FRAME)


# Sizes


def loaded_size(rules: SizeRules, kind_video: Any, height: Any, width: Any) -> tuple[np.ndarray, np.ndarray]:
    """The size that sizes are reckoned from: a clip's short side is at most the larger sample size. Takes arrays.

    The original reader shrinks clips to it; here it only decides, and files are resized once.
    """
    side = max(rules.image_sample_size, rules.video_sample_size, *(rules.fix_sample_size or ()))
    short = np.minimum(height, width)
    shrink = np.logical_and(kind_video, short > side)

    def shrunk(length: Any) -> np.ndarray:
        return np.where(shrink, np.int64(side) * length // short, length)

    return shrunk(height), shrunk(width)


def bucket_of(height: Any, width: Any) -> np.ndarray:
    """Index into BUCKETS of the nearest aspect. Takes arrays."""
    ratio = np.divide(height, width)
    best, nearest = np.zeros(np.shape(ratio), dtype=np.int16), np.full(np.shape(ratio), np.inf)
    for i, key in enumerate(BUCKETS):
        distance = np.abs(key - ratio)
        best = np.where(distance < nearest, np.int16(i), best)
        nearest = np.minimum(nearest, distance)
    return best


def rungs_for(rules: SizeRules, mean_side: Any) -> np.ndarray:
    """How many rungs of the ladder are open to clips whose mean of height and width is this. Takes arrays."""
    ladder = rules.ladder
    below = np.searchsorted(ladder, np.multiply(mean_side, ENLARGE), side="left")
    return np.where(below > 0, below, len(ladder))


def shapes_of(rules: SizeRules, kind: Kind, bucket: int, frames: int, rungs: int) -> list[tuple[float, Shape]]:
    """(probability, shape) of a micro-step of files of one aspect bucket, the shortest giving `frames`."""
    found: dict[Shape, float] = {}
    for p_side, base, divisor, longest in _sides(rules, kind, rungs):
        for p_crop, (height, width) in _crops(rules, bucket, base, divisor):
            for p_frames, count in _lengths(rules, min(longest, frames)):
                shape = Shape(count, height, width)
                found[shape] = found.get(shape, 0.0) + p_side * p_crop * p_frames
    return [(p, shape) for shape, p in found.items()]


def outcomes(rules: SizeRules, batch: Sequence[Source]) -> list[Outcome]:
    """All that can become of files that share a micro-step; the first gives kind and aspect. Probabilities add to 1."""
    kind = batch[0].kind
    loaded = [loaded_size(rules, s.kind == "video", s.height, s.width) for s in batch]
    mean_side = min((height + width) / 2 for height, width in loaded)
    shapes = shapes_of(
        rules,
        kind,
        int(bucket_of(*loaded[0])) if rules.enable_bucket else list(BUCKETS).index(SQUARE),
        min(source.frames for source in batch),
        int(rungs_for(rules, mean_side)),
    )
    return [
        Outcome(p, tuple(cover(rules, int(h), int(w), shape) for h, w in loaded), shape[1:], shape.frames)
        for p, shape in shapes
    ]


def cover(rules: SizeRules, height: int, width: int, shape: Shape) -> tuple[int, int]:
    """The (height, width) to resize to so that `shape` is just covered; fix_sample_size stretches instead."""
    if rules.fix_sample_size is not None:
        return shape.height, shape.width
    if shape.height * width > shape.width * height:
        return shape.height, width * shape.height // height
    return height * shape.width // width, shape.width


def centre_crop(resize: tuple[int, int], shape: Shape) -> Crop:
    """The middle of the resized picture; half a pixel goes to the even side, as in torchvision's CenterCrop."""
    height, width = resize
    return Crop(height, width, round((height - shape.height) / 2), round((width - shape.width) / 2))


def _sides(rules: SizeRules, kind: Kind, rungs: int) -> list[tuple[float, int, float, int]]:
    """(probability, sample size, its divisor, longest clip)"""
    n = rules.video_sample_n_frames
    size = rules.image_sample_size if kind == "image" else rules.video_sample_size
    if not rules.random_hw_adapt or rules.fix_sample_size is not None:
        return [(1.0, size, 1, n)]
    if kind == "video" and rules.by_budget:
        return [
            (p, size, size / rung, budget_frames(rules, rung))
            for p, rung in zip(_rung_weights(rules, rungs), rules.ladder[:rungs], strict=True)
        ]
    divisors = next((divisors for least, divisors in DIVISORS if size >= least), None)
    if divisors is None:
        divisors = (1,)
    elif kind == "image":
        divisors = (*divisors, size / rules.video_sample_size)
    weights = _favour(0, len(divisors), rules.law.first_weight)
    return [(p, size, divisor, n) for p, divisor in zip(weights, divisors, strict=True)]


def budget_frames(rules: SizeRules, side: int) -> int:
    """Frames of a clip at this side that cost no more than video_sample_n_frames at token_sample_size."""
    n = rules.video_sample_n_frames
    return rules.geometry.legal_frames(min(n, n * rules.token_sample_size**2 // side**2))


def lone_frames(rules: SizeRules) -> list[str]:
    """A notice of sides at which the token budget leaves one frame of a clip, if there are any."""
    sides = [side for side in rules.ladder if budget_frames(rules, side) == 1] if rules.by_budget else []
    if not sides or rules.geometry.legal_frames(rules.video_sample_n_frames) == 1:
        return []
    named = ", ".join(map(str, sides))
    return [
        f"at side {named} the token budget leaves one frame, so that clips are trained as pictures there; raise "
        "token_sample_size or video_sample_n_frames, or lower image_sample_size"
    ]


def _rung_weights(rules: SizeRules, rungs: int) -> list[float]:
    if rules.law.nearest_rung is None:
        return [1 / rungs] * rungs
    nearest = min(range(rungs), key=lambda i: abs(rules.ladder[i] - rules.token_sample_size))
    return _favour(nearest, rungs, rules.law.nearest_rung)


def _crops(rules: SizeRules, bucket: int, base: int, divisor: float) -> list[tuple[float, tuple[int, int]]]:
    """(probability, height and width) at the side base / divisor."""

    def snapped(height: float, width: float) -> tuple[int, int]:
        multiple = rules.geometry.multiple
        return max(int(height / multiple), 1) * multiple, max(int(width / multiple), 1) * multiple

    def at(key: float) -> tuple[int, int]:
        height, width = BUCKETS[key]
        # As released in the order of operations too: their rounding decides which side of a multiple a size falls.
        return snapped(height / 512 * base / divisor, width / 512 * base / divisor)

    if rules.fix_sample_size is not None:
        return [(1.0, snapped(*rules.fix_sample_size))]
    if rules.random_ratio_crop:
        return [(weight / sum(RATIO_CROPS.values()), at(key)) for key, weight in RATIO_CROPS.items()]
    return [(1.0, at(list(BUCKETS)[bucket]))]


def _lengths(rules: SizeRules, frames: int) -> list[tuple[float, int]]:
    """(probability, frames): with random_frame_crop a clip may end early."""
    legal = rules.geometry.legal_frames
    stride, n = rules.geometry.time_stride, rules.video_sample_n_frames
    counts = range(stride + 1, n + 1, stride)
    if not rules.random_frame_crop or not counts:
        return [(1.0, legal(frames))]
    weights = _favour(len(counts) - 1, len(counts), FULL_LENGTH)
    return [(p, legal(min(count, frames))) for p, count in zip(weights, counts, strict=True)]


def _favour(which: int, count: int, weight: float) -> list[float]:
    """Weights of `count` choices: one has `weight`, the rest share equally what is left."""
    if count == 1:
        return [1.0]
    weights = [(1 - weight) / (count - 1)] * count
    weights[which] = weight
    return weights
