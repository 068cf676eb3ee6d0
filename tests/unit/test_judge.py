"""A detector's finds on a clip, against the control as files have it."""

import numpy as np
import pytest

from reeltune.control.judge import MEASURES, Asked, Judge
from reeltune.core.types import Crop, Draw, Record, Shape
from reeltune.data.findings import MediaError
from reeltune.data.keypoints import Keypoints, People, write_keypoints

SHAPE, CROP = Shape(3, 64, 96), Crop(64, 128, 0, 16)  # of 8 frames of 128 x 256: every second, halved, sides cut off
FRAMES = (1, 3, 5)


def asked(control=None, **record) -> Asked:
    draw = Draw(0, SHAPE, CROP, FRAMES, 0, 0)
    return Asked(draw, Record(0, "a.mp4", "", "video", 8, 8.0, 128, 256, **record), control)


def judge(kind: str, *found) -> Judge:
    """Which finds that on every clip."""
    return Judge(kind, "digest", MEASURES[kind], lambda source, put: [put(one) for one in found])


CLIP = np.zeros((*SHAPE, 3), np.uint8)


def of_people(points_FP2: np.ndarray, height: int, width: int) -> Keypoints:
    """One person a frame."""
    frames = [
        People(points_P2[None], np.ones((1, len(points_P2))), np.array([[0, 0, width, height]]), np.ones(1))
        for points_P2 in points_FP2
    ]
    times_s = np.arange(len(frames)) / 8
    return Keypoints.of(frames, times_s, layout="coco", height=height, width=width, detector="d")


def walking() -> np.ndarray:
    """8 frames of 17 points in 128 x 256."""
    points = np.stack([np.linspace(90, 110, 17), np.linspace(20, 110, 17)], axis=1)
    return points + np.stack([4.0 * np.arange(8), np.zeros(8)], axis=1)[:, None]


def test_poses_are_compared_where_the_clip_shows_them(tmp_path):
    path = tmp_path / "a.npz"
    write_keypoints(path, of_people(walking(), 128, 256))
    there = walking()[list(FRAMES)] / 2 - [16, 0]
    found = judge("pose", of_people(there, 64, 96)).scores(asked(control_path=str(path)), CLIP, 4.0)
    assert found == pytest.approx({"oks": 1.0, "pck": 1.0}, abs=1e-3)
    for wrong in (walking()[list(FRAMES)] / 2, walking()[[0, 2, 4]] / 2 - [16, 0]):
        scores = judge("pose", of_people(wrong, 64, 96)).scores(asked(control_path=str(path)), CLIP, 4.0)
        assert scores["oks"] < 0.95
    assert judge("pose", of_people(there, 64, 96)).scores(asked(control_path="drawn.mp4"), CLIP, 4.0) is None


def rows(shifts) -> np.ndarray:
    """A camera that moves along x: F,19."""
    return np.array([[i, 0.5, 0.9, 0.5, 0.5, 0, 0, 1, 0, 0, -x, 0, 1, 0, 0, 0, 0, 1, 0] for i, x in enumerate(shifts)])


def test_camera_paths_are_compared_at_the_clips_frames(tmp_path):
    path = tmp_path / "a.txt"
    given = rows([0, 1, 0, 2, 0, 3, 0, 0])  # only every second frame is asked for
    path.write_text("\n" + "\n".join(" ".join(map(str, row)) for row in given) + "\n")
    scores = judge("camera", rows([10, 20, 30])).scores(asked(camera_path=str(path)), CLIP, 4.0)
    assert scores == pytest.approx({"rotation_deg": 0, "translation": 0}, abs=1e-6)
    aside = judge("camera", rows([10, 20, 20])).scores(asked(camera_path=str(path)), CLIP, 4.0)
    assert aside["translation"] > 0.1
    assert judge("camera", rows([10, 20, 30])).scores(asked(), CLIP, 4.0) is None


def test_depth_and_lines_are_compared_with_the_control_as_the_network_saw_it():
    ramp = np.broadcast_to(np.linspace(0, 255, 96).astype(np.uint8)[:, None], CLIP.shape)
    assert judge("depth", ramp[:2], ramp[2:]).scores(asked(ramp), CLIP, 4.0)["correlation"] == pytest.approx(1)
    assert judge("depth", 255 - ramp).scores(asked(ramp), CLIP, 4.0)["correlation"] == pytest.approx(-1)
    lines = CLIP.copy()
    lines[:, 20:22] = 200
    assert judge("canny", lines[:1], lines[1:]).scores(asked(lines), CLIP, 4.0) == {
        "f1": 1,
        "precision": 1,
        "recall": 1,
    }
    for kind in ("depth", "canny"):
        assert judge(kind, lines).scores(asked(CLIP), CLIP, 4.0) is None  # it asks for nothing
        assert judge(kind, lines).scores(asked(), CLIP, 4.0) is None


def test_clips_that_a_detector_makes_nothing_of():
    assert judge("canny").scores(asked(CLIP), CLIP, 4.0) is None

    def breaks(source, put):
        raise MediaError("shows no camera path")

    assert Judge("camera", "digest", MEASURES["camera"], breaks).scores(asked(), CLIP, 4.0) is None
