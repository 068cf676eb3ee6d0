"""A camera's path from above.  (no torch)"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from reeltune.data.camera import read_poses

GROUND, PATH, VIEW, START = (251, 250, 247), (29, 28, 26), (23, 120, 106), (192, 127, 44)  # of reporting/style.html
MARGIN = 0.12  # of the side, free about the path
VIEWS = 12  # of directions that are drawn, evenly over the path
LENGTH = 0.08  # of such a line, of the side


def path_picture(path: Path, side: int) -> np.ndarray:
    """uint8 side side 3: x to the right, depth upward, the first camera's direction up; an orange disc at the start."""
    matrices_F34 = read_poses(path)[:, 7:].reshape(-1, 3, 4)
    rotations_F33 = matrices_F34[:, :, :3]
    centres_F3 = -np.einsum("fji,fj->fi", rotations_F33, matrices_F34[:, :, 3])
    first_33 = rotations_F33[0]
    seen_F2 = ((centres_F3 - centres_F3[0]) @ first_33.T)[:, [0, 2]]
    ahead_F2 = (rotations_F33[:, 2] @ first_33.T)[:, [0, 2]]
    middle_2 = (seen_F2.max(0) + seen_F2.min(0)) / 2
    reach = max(float(np.abs(seen_F2 - middle_2).max()), 1e-6)
    scale = side * (0.5 - MARGIN) / reach
    pixels_F2 = side / 2 + (seen_F2 - middle_2) * (scale, -scale)
    picture_HW3 = np.full((side, side, 3), GROUND, np.uint8)
    for frame in np.linspace(0, len(pixels_F2) - 1, min(len(pixels_F2), VIEWS)).round().astype(int):
        end_2 = pixels_F2[frame] + ahead_F2[frame] * (LENGTH * side, -LENGTH * side)
        cv2.line(picture_HW3, _pixel(pixels_F2[frame]), _pixel(end_2), VIEW, 1, cv2.LINE_AA)
    cv2.polylines(picture_HW3, [pixels_F2.round().astype(np.int32)], False, PATH, 2, cv2.LINE_AA)
    cv2.circle(picture_HW3, _pixel(pixels_F2[0]), 4, START, cv2.FILLED, cv2.LINE_AA)
    return picture_HW3


def _pixel(place_2: np.ndarray) -> tuple[int, int]:
    return round(float(place_2[0])), round(float(place_2[1]))
