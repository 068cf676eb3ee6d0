"""The kind `pose`: from frames to key points by whichever networks the folder has."""

import numpy as np
import pytest

from reeltune.control import pose
from reeltune.control.kind import Settings, Source
from reeltune.control.kinds import KINDS
from reeltune.control.pose import open_pose
from reeltune.control.pose_finder import PoseFinder
from reeltune.control.pose_onnx import PEOPLE_FILE, POSE_FILE
from reeltune.core.errors import UserError
from reeltune.data.keypoints import Keypoints, People
from tests.unit import tiny_onnx, tiny_pose_nets
from tests.unit.people import figure, people
from tests.unit.test_pose_onnx import frame

FRAMES_FHW3 = np.stack([frame(64, 96, seed) for seed in range(3)])


@pytest.fixture
def onnx(tmp_path):
    tiny_onnx.write_people_net(tmp_path / PEOPLE_FILE)
    tiny_onnx.write_pose_net(tmp_path / POSE_FILE)
    return tmp_path


def found_in(detector, source: Source) -> tuple[list, object]:
    put: list = []
    return put, detector.detect(source, put.append)


def test_frames_become_key_points_of_the_same_size_and_times(onnx):
    pytest.importorskip("onnxruntime")
    detector = KINDS["pose"].open(onnx, Settings())
    source = Source.of(FRAMES_FHW3, 8.0)
    (first,), quality = found_in(detector, source)
    (second,), _ = found_in(KINDS["pose"].open(onnx, Settings()), source)
    assert isinstance(first, Keypoints) and first.layout == "coco_wholebody" and first.detector == detector.digest
    assert (first.frames, first.height, first.width) == (3, 64, 96) and np.array_equal(first.times_s, source.times_s)
    assert first.people.min() > 3 and quality.score < 0.5  # noise moves as no body does
    for name in ("people", "points", "scores", "boxes", "box_scores"):
        assert np.array_equal(getattr(first, name), getattr(second, name)), name


def test_networks_of_transformers_are_taken_where_they_are(tmp_path):
    tiny_pose_nets.write_people_net(tmp_path / "people")
    tiny_pose_nets.write_pose_net(tmp_path / "pose")
    (found,), _ = found_in(open_pose(tmp_path, Settings()), Source.of(FRAMES_FHW3[:1], 0.0))
    assert found.layout == "coco" and found.people.tolist() == [10] and found.points.shape == (10, 17, 2)


def test_a_clip_without_people_gets_none_and_a_reason(monkeypatch, tmp_path):
    finder = PoseFinder(lambda frame_HW3: People.nobody("coco"), "coco", "d")
    monkeypatch.setattr(pose, "_finder", lambda folder, device: finder)
    put, quality = found_in(open_pose(tmp_path, Settings()), Source.of(FRAMES_FHW3, 8.0))
    assert put == [] and quality.score == 0 and quality.reason == "has nobody in it"


def test_people_who_stand_have_the_full_score(monkeypatch, tmp_path):
    finder = PoseFinder(lambda frame_HW3: people(figure(48, 32, 50)), "coco_wholebody", "d")
    monkeypatch.setattr(pose, "_finder", lambda folder, device: finder)
    (found,), quality = found_in(open_pose(tmp_path, Settings()), Source.of(FRAMES_FHW3, 8.0))
    assert quality.score == 1 and not quality.reason and found.people.tolist() == [1, 1, 1]


def test_folders_without_networks_are_refused_in_words(tmp_path):
    for folder, words in (
        (None, r"need a folder with DWPose's two files, yolox_l\.onnx and dw-ll_ucoco_384\.onnx, or with RT-DETR"),
        (tmp_path / "absent", "absent is not there; poses need"),
        (tmp_path, "has none of the files that poses need"),
    ):
        with pytest.raises(UserError, match=words):
            open_pose(folder, Settings())
    (tmp_path / PEOPLE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match=r"yolox_l\.onnx is a file; poses need"):
        open_pose(tmp_path / PEOPLE_FILE, Settings())
    with pytest.raises(UserError, match="is empty, not an ONNX network of DWPose"):
        open_pose(tmp_path, Settings())
