"""Draws a figure as poses are drawn, at two sizes: python scripts/pose_picture.py docs/pose_drawing.png"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from reeltune.data.keypoints import People
from reeltune.data.pose_drawing import draw_people

SIZES_PX = (720, 360)  # beside each other
BODY = (  # right is the picture's left: (across, down) of COCO's 17 points, in quarters of a body's height
    (0, -1.5), (0.1, -1.6), (-0.1, -1.6), (0.25, -1.55), (-0.25, -1.55), (0.5, -1), (-0.5, -1), (0.7, -0.4),
    (-0.75, -0.45), (0.6, 0.15), (-0.55, 0.1), (0.3, 0.25), (-0.3, 0.25), (0.35, 1), (-0.35, 1), (0.35, 1.75),
    (-0.4, 1.75),
)  # fmt: skip


def figure(across: float, down: float, height: float) -> np.ndarray:
    """float 133 2: about a middle, in pixels."""
    points_P2 = np.zeros((133, 2))
    points_P2[:17] = BODY
    points_P2[17:23] = points_P2[15] + [[0.1 * i, 0.1] for i in range(6)]
    angle = np.linspace(0, 2 * np.pi, 68, endpoint=False)
    points_P2[23:91] = np.stack([0.22 * np.cos(angle), -1.5 + 0.28 * np.sin(angle)], axis=1)
    for start, wrist in ((91, 9), (112, 10)):
        points_P2[start] = points_P2[wrist]
        for finger in range(5):
            for step in range(1, 5):
                points_P2[start + 4 * finger + step] = points_P2[wrist] + [0.08 * (finger - 2) * step / 2, 0.08 * step]
    return points_P2 * height / 4 + (across, down)


def draw(file: Path) -> None:
    pictures = []
    for side in SIZES_PX:
        points_NP2 = figure(side * 0.3, side * 0.47, side * 0.98)[None]
        found = People(points_NP2, np.ones(points_NP2.shape[:2]), np.zeros((1, 4)), np.ones(1))
        picture_HW3 = draw_people(found, side, round(side * 0.6))
        pictures.append(np.pad(picture_HW3, ((0, SIZES_PX[0] - side), (0, 0), (0, 0)), constant_values=255))
    Image.fromarray(np.concatenate(pictures, axis=1)).save(file, optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
