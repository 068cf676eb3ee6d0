"""People for tests of poses: figures that stand, all 133 points in their places."""

import zipfile

import numpy as np

from reeltune.data.keypoints import Keypoints, People
from scripts.pose_picture import figure


def people(*figures: np.ndarray, score: float = 1.0) -> People:
    """Each with all points seen, and a box about them."""
    points_NP2 = np.stack(figures)
    boxes_N4 = np.concatenate([points_NP2.min(axis=1), points_NP2.max(axis=1)], axis=1)
    return People(points_NP2, np.full(points_NP2.shape[:2], score), boxes_N4, np.full(len(figures), score))


def walk(frames: int, height: int, width: int, *, fps: float = 8.0, count: int = 1, times_s=None) -> Keypoints:
    """Figures that go to the right, a hundredth of the width a frame."""
    found = [
        people(*(figure(width * (0.3 + 0.3 * who + 0.01 * frame), height * 0.5, height * 0.8) for who in range(count)))
        for frame in range(frames)
    ]
    times_s = np.arange(frames) / fps if times_s is None else times_s
    return Keypoints.of(found, times_s, layout="coco_wholebody", height=height, width=width, detector="by hand")


def rewritten(file, changed: dict[str, bytes], compression=zipfile.ZIP_STORED) -> None:
    """A file of key points with other parts."""
    with zipfile.ZipFile(file) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in {**parts, **changed}.items():
            archive.writestr(name, data)
