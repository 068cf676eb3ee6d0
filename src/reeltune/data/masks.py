"""Which pixels of a clip an inpainting model has to make, and which it is given.  (no torch)

The kinds are those of VideoX-Fun's training (https://github.com/aigc-apps/VideoX-Fun); a family's MaskLaw has their
probabilities. True is to be made.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reeltune.core.rng import seed_of
from reeltune.core.types import MaskLaw, Shape

MOST_GIVEN = 4  # frames given at an end of the clip


def draw_mask(seed: int, shape: Shape, law: MaskLaw) -> np.ndarray:
    """bool F,H,W; a seed gives the same mask always."""
    rng = np.random.RandomState(seed_of(seed, "mask") % 2**32)
    weights = law.picture if shape.frames == 1 else law.clip
    mask = KINDS[rng.choice(list(weights), p=list(weights.values()))](rng, shape)
    if mask.ndim == 2:  # a spot
        frames = np.arange(shape.frames)[:, None, None]
        mask = mask & ((frames == 0) | law.spots_on_all_frames)
    return np.array(np.broadcast_to(mask, shape))


def _all(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    return np.ones((1, 1, 1), dtype=bool)


def _after_first(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    return _frames(np.arange(shape.frames) > 0)


def _after_start(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    return _frames(np.arange(shape.frames) >= rng.randint(1, MOST_GIVEN + 1))


def _between_ends(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    given, frames = rng.randint(1, MOST_GIVEN + 1), np.arange(shape.frames)
    return _frames((frames >= given) & (frames < shape.frames - given))


def _some_frames(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    return _frames(rng.random_sample(shape.frames) > 0.5)


def _frames(chosen_F: np.ndarray) -> np.ndarray:
    return chosen_F[:, None, None]


def _block(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    y, x = (_near(rng, side) for side in shape[1:])
    return (y[:, None] & x)[None]


def _near(rng: np.random.RandomState, side: int) -> np.ndarray:
    """bool[side]: a quarter to three quarters of the side, about any place and cut off at the edges."""
    centre, half = rng.randint(side), _between(rng, side // 4, side // 4 * 3) // 2
    return _within(side, centre - half, centre + half)


def _block_in_time(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    block, middle = _block(rng, shape), shape.frames // 2
    start = _between(rng, 0, middle)
    return block & _frames(_within(shape.frames, start, _between(rng, middle, shape.frames)))


def _coin(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    return rng.randint(0, 2, shape).astype(bool)


def _boxes(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    count = rng.randint(1, max(shape.frames // 2, 1) + 1)
    for frame in rng.permutation(shape.frames)[:count]:
        height, width = (rng.randint(1, max(side // 4, 1) + 1) for side in shape[1:])
        top, left = rng.randint(shape.height - height + 1), rng.randint(shape.width - width + 1)
        mask[frame, top : top + height, left : left + width] = True
    return mask


def _ellipse(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    return _spot(rng, shape, _radius(rng, shape), _radius(rng, shape))


def _disc(rng: np.random.RandomState, shape: Shape) -> np.ndarray:
    radius = _radius(rng, shape)
    return _spot(rng, shape, radius, radius)


def _radius(rng: np.random.RandomState, shape: Shape) -> int:
    side = min(shape.height, shape.width)
    return max(_between(rng, side // 8, side // 4), 1)


def _spot(rng: np.random.RandomState, shape: Shape, radius_y: int, radius_x: int) -> np.ndarray:
    y, x = (np.arange(side) - rng.randint(side) for side in shape[1:])
    return (y[:, None] / radius_y) ** 2 + (x / radius_x) ** 2 < 1


def _within(length: int, start: int, stop: int) -> np.ndarray:
    place = np.arange(length)
    return (place >= start) & (place < stop)


def _between(rng: np.random.RandomState, low: int, high: int) -> int:
    """A whole number in [low, high), or low where there is none."""
    return int(rng.randint(low, max(high, low + 1)))


KINDS: dict[str, Callable[[np.random.RandomState, Shape], np.ndarray]] = {
    "block": _block,  # a rectangle on all frames
    "all": _all,
    "after_start": _after_start,  # all but the first frames
    "between_ends": _between_ends,  # all but the first and last frames
    "block_in_time": _block_in_time,  # a rectangle on some frames about the middle
    "coin": _coin,  # every other pixel by chance
    "boxes": _boxes,  # a small rectangle on up to half of the frames
    "ellipse": _ellipse,
    "disc": _disc,
    "frames": _some_frames,  # every other frame by chance
    "after_first": _after_first,  # all but the first frame
}
