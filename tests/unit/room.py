"""A room with patterned walls, seen by a camera that is known: a clip of which the true path can be told."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np

HALF = np.array([3.0, 2.0, 6.0])  # of the room, about its middle
SIDE = 1024  # pixels of a wall's pattern


@cache
def _patterns() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    made = []
    for _ in range(6):
        layers = [cv2.resize(rng.random((n, n, 3)).astype(np.float32), (SIDE, SIDE)) for n in (8, 32, 96)]
        spots = np.zeros((SIDE, SIDE, 3), np.float32)
        for x, y, size in rng.integers(4, SIDE - 4, (400, 3)):
            cv2.circle(spots, (int(x), int(y)), int(size) % 18 + 3, rng.random(3).tolist(), -1)
        made.append(np.clip(0.25 * sum(layers) + 0.5 * spots, 0, 1))
    return made


def view(centre_3: np.ndarray, to_camera_33: np.ndarray, focal_px: float, height: int, width: int) -> np.ndarray:
    """uint8 H W 3 of a pinhole camera."""
    y, x = np.mgrid[:height, :width]
    seen = np.stack([(x + 0.5 - width / 2) / focal_px, (y + 0.5 - height / 2) / focal_px, np.ones_like(x, float)], -1)
    way = seen @ to_camera_33
    with np.errstate(divide="ignore"):
        reach = np.where(way > 0, (HALF - centre_3) / way, (-HALF - centre_3) / way)
    axis = reach.argmin(-1)
    hit = centre_3 + way * reach.min(-1)[..., None]
    out = np.zeros((height, width, 3), np.float32)
    for wall, pattern in enumerate(_patterns()):
        flat, upper = wall // 2, wall % 2
        here = (axis == flat) & ((np.take(way, flat, -1) > 0) == bool(upper))
        u, v = [(np.delete(hit / HALF, flat, -1)[..., n] + 1) / 2 * (SIDE - 1) for n in (0, 1)]
        drawn = cv2.remap(pattern, u.astype(np.float32), v.astype(np.float32), cv2.INTER_LINEAR)
        out[here] = drawn[here]
    return (out * 255 + 0.5).astype(np.uint8)


def walk(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(centres F 3, world-to-camera rotations F 3 3): forward and to the right, turning to the left."""
    part = np.linspace(0, 1, frames)
    centres = np.stack([-0.8 + 1.6 * part, 0.2 * np.sin(3 * part), -3 + 2.0 * part], 1)
    turns = [cv2.Rodrigues(np.array([0.05 * np.sin(4 * p), 0.25 * p, 0.0]))[0] for p in part]
    return centres, np.stack(turns)
