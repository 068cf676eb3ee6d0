"""A detector's finds on a clip, against the control as files have it."""

from dataclasses import replace
from typing import get_args

import cv2
import numpy as np
import pytest

from reeltune.config.recipe import ControlKind
from reeltune.control.judge import DRAWN, MEASURES, Asked, Judge, judge_by, unlike
from reeltune.control.kind import Detector, Source
from reeltune.control.kinds import KINDS, open_for_previews
from reeltune.control.pose_onnx import PEOPLE_FILE, POSE_FILE
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Draw, Record, Shape
from reeltune.data.findings import MediaError
from reeltune.data.keypoints import Keypoints, People, write_keypoints
from reeltune.data.pose_drawing import draw_people
from tests.unit import room, tiny_onnx
from tests.unit.people import walk

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
    assert judge("pose", of_people(there, 64, 96)).scores(asked(control_path="drawn.mp4"), CLIP, 4.0) is None  # beside
    assert judge("pose").scores(asked(control_path=str(path)), CLIP, 4.0) == {"oks": 0, "pck": 0}  # nobody is found


def test_a_drawn_pose_is_compared_by_its_drawing():
    """Drawn at twice the size, so that its lines have half the width of those that are found."""
    there = walk(3, 256, 320)
    large = [draw_people(there.frame(f, 512, 640), 512, 640) for f in range(3)]
    given = np.stack([cv2.resize(one, (320, 256), interpolation=cv2.INTER_AREA) for one in large])
    draw = Draw(0, Shape(3, 256, 320), Crop(256, 320, 0, 0), (0, 1, 2), 0, 0)
    by = judge_by("pose", Detector("digest", lambda source, put: put(there)), ["a.mp4", "b.png"])
    assert by.measure == DRAWN["pose"]
    same = by.scores(Asked(draw, None, given), given, 4.0)
    assert list(same) == ["f1", "precision", "recall"] and same["f1"] > 0.97
    assert by.scores(Asked(draw, None, np.roll(given, 10, axis=2)), given, 4.0)["f1"] < 0.4
    nobody = replace(by, detect=lambda source, put: None)
    assert nobody.scores(Asked(draw, None, given), given, 4.0) == {"f1": 0, "precision": 0, "recall": 0}
    assert by.scores(Asked(draw, None, np.zeros_like(given)), given, 4.0) is None  # it asks for nothing
    assert by.scores(Asked(draw, None, None), given, 4.0) is None


def test_a_measure_fits_all_controls_or_it_is_said():
    def measure(*controls):
        return judge_by("pose", Detector("digest", lambda source, put: None), controls).measure, unlike(
            "pose", controls
        )

    assert measure("a.npz", "b.npz") == measure() == measure(None) == (MEASURES["pose"], "")
    assert measure("a.mp4", "b.png") == (DRAWN["pose"], "")
    mixed, told = measure("a.mp4", "b.npz", "c.npz")
    assert mixed == MEASURES["pose"] and "1 of 3 previews have a drawing as control" in told
    assert unlike("canny", ["a.mp4", "b.npz"]) == ""


def test_soft_edges_are_edges_from_half_on():
    soft = CLIP.copy()
    soft[:, 20:24], soft[:, 40:44] = 200, 120  # the second is rather none
    found = CLIP.copy()
    found[:, 21:23] = 130
    assert judge("hed", found).scores(asked(soft), CLIP, 4.0) == {"f1": 1, "precision": 1, "recall": 1}
    found[:, 21:23] = 126
    assert judge("hed", found).scores(asked(soft), CLIP, 4.0)["f1"] == 0
    assert judge("hed", found).scores(asked(CLIP + np.uint8(127)), CLIP, 4.0) is None


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
    for kind in ("depth", "canny", "mlsd", "hed"):
        assert judge(kind, lines).scores(asked(CLIP), CLIP, 4.0) is None  # it asks for nothing
        assert judge(kind, lines).scores(asked(), CLIP, 4.0) is None


def test_files_for_a_kind_that_needs_none_are_refused():
    with pytest.raises(UserError, match="control_detector is 'models/x', and control_kind canny needs no files"):
        open_for_previews("canny", "models/x", "cpu")


def test_a_kind_that_needs_files_says_which():
    for kind in ("depth", "pose", "hed", "mlsd"):
        with pytest.raises(UserError, match=f"control_kind is {kind} and control_detector is left out; it needs"):
            open_for_previews(kind, None, "cpu")


def test_kinds_that_are_made_are_kinds_that_are_measured():
    assert set(MEASURES) == set(KINDS) == set(get_args(ControlKind))


def test_a_pose_is_found_again_where_its_detector_found_it(tmp_path):
    pytest.importorskip("onnxruntime")
    tiny_onnx.write_people_net(tmp_path / PEOPLE_FILE)
    tiny_onnx.write_pose_net(tmp_path / POSE_FILE)
    frames_FHWC = np.random.RandomState(0).randint(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    asks = judge_by("pose", open_for_previews("pose", str(tmp_path), "cpu"))
    put = []
    asks.detect(Source.of(frames_FHWC, 8.0), put.append)
    write_keypoints(tmp_path / "a.npz", put[0])
    draw = Draw(0, Shape(2, 64, 96), Crop(64, 96, 0, 0), (0, 1), 0, 0)
    record = Record(0, "a.mp4", "", "video", 2, 8.0, 64, 96, control_path=str(tmp_path / "a.npz"))
    assert asks.scores(Asked(draw, record, None), frames_FHWC, 8.0)["oks"] == pytest.approx(1, abs=1e-3)
    assert asks.scores(Asked(draw, record, None), frames_FHWC[:, ::-1], 8.0)["oks"] < 0.9


@pytest.mark.slow
def test_a_walk_through_a_room_obeys_its_path_and_not_another(tmp_path):
    pytest.importorskip("pycolmap")
    centres, turns = room.walk(8)
    frames_FHWC = np.stack([room.view(c, R, 200.0, 144, 192) for c, R in zip(centres, turns, strict=True)])
    asks, scores = judge_by("camera", open_for_previews("camera", None, "cpu")), []
    for name, way in (("own", 1), ("other", -1)):
        matrices = np.concatenate([turns, -turns @ (way * centres[..., None])], axis=-1)
        turned = matrices if way > 0 else np.concatenate([turns[::-1], matrices[..., 3:]], axis=-1)
        numbers = [[i, 0.5, 0.9, 0.5, 0.5, 0, 0, *matrix.ravel()] for i, matrix in enumerate(turned)]
        path = tmp_path / f"{name}.txt"
        path.write_text("\n" + "\n".join(" ".join(map(str, row)) for row in numbers) + "\n")
        draw = Draw(0, Shape(8, 144, 192), Crop(144, 192, 0, 0), tuple(range(8)), 0, 0)
        record = Record(0, "a.mp4", "", "video", 8, 8.0, 144, 192, camera_path=str(path))
        scores.append(asks.scores(Asked(draw, record, None), frames_FHWC, 8.0))
    own, other = scores
    assert own["rotation_deg"] < 1 and own["translation"] < 0.05
    assert other["rotation_deg"] > 5 and other["translation"] > 0.2


def test_clips_that_a_detector_makes_nothing_of():
    assert judge("canny").scores(asked(CLIP), CLIP, 4.0) is None

    def breaks(source, put):
        raise MediaError("shows no camera path")

    assert Judge("camera", "digest", MEASURES["camera"], breaks).scores(asked(), CLIP, 4.0) is None
