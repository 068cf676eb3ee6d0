"""What finds people in a frame, whichever networks it has.  (no torch)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reeltune.data.keypoints import People

BOX_SCORE = 0.3  # of a person's box, above which its pose is looked for (dwpose/cv_ox_det.py)
BOX_PADDING = 1.25  # of a box, each side of its middle, in which a pose is looked for (RTMPose, arXiv:2303.07399)
# Mean and standard deviation of ImageNet's pixels, RGB in 0..255, that pose networks are given.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class PoseFinder:
    """Networks that find people. find: uint8 H W 3 in RGB -> the people there, in its pixels, from the left. digest: of
    networks and settings."""

    find: Callable[[np.ndarray], People]
    layout: str
    digest: str


def padded(box_4: np.ndarray, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """(middle, width and height) of the least box of that width over height about a padded one; in pixels."""
    middle_2 = (box_4[:2] + box_4[2:]) / 2
    width, height = (box_4[2:] - box_4[:2]) * BOX_PADDING
    return middle_2, np.array([max(width, height * aspect), max(height, width / aspect)])


def from_left(boxes_N4: np.ndarray) -> np.ndarray:
    """Places of boxes from left to right: their order by score may differ where two are nearly equal."""
    return np.lexsort((boxes_N4[:, 1], boxes_N4[:, 0]))
