"""People for tests of poses: figures that stand, all 133 points in their places."""

import zipfile

import numpy as np

from reeltune.data.keypoints import Keypoints, People

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
                points_P2[start + 4 * finger + step] = points_P2[wrist] + [0.05 * (finger - 2) * step / 2, 0.06 * step]
    return points_P2 * height / 4 + (across, down)


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
