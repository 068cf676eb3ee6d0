"""DWPose's two networks: pre- and post-processing as rtmlib has them, in closed form, and files that are none."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from reeltune.control import pose_onnx
from reeltune.control.pose_onnx import (
    BOX_SCORE,
    PEOPLE_FILE,
    POSE_FILE,
    decode_boxes,
    decode_simcc,
    find_boxes,
    find_points,
    letterbox,
    open_onnx,
    without_overlaps,
)
from reeltune.core.errors import UserError
from tests.unit.tiny_onnx import write_people_net, write_pose_net

pytest.importorskip("onnxruntime")
FRAMES = ((240, 416), (500, 300), (97, 131))  # height, width


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dwpose")
    write_people_net(folder / PEOPLE_FILE)
    write_pose_net(folder / POSE_FILE)
    return folder


def frame(height: int, width: int, seed: int) -> np.ndarray:
    small_HW3 = np.random.RandomState(seed).randint(0, 256, (6, 9, 3)).astype(np.uint8)
    return cv2.resize(small_HW3, (width, height), interpolation=cv2.INTER_CUBIC)


def test_people_and_points_are_those_of_rtmlib(folder):
    """By rtmlib 0.0.16 on the same networks and frames (recorded 2026-11-26): boxes above 0.3 of the first class, and
    points of the first eight from the left."""
    with np.load(Path(__file__).with_name("rtmlib_poses.npz")) as held:
        theirs = dict(held)
    people_net, pose_net = (pose_onnx._session(folder / name, "cpu") for name in (PEOPLE_FILE, POSE_FILE))
    for number, (height, width) in enumerate(FRAMES):
        picture_HW3 = frame(height, width, number)
        boxes_N4, scores_N = find_boxes(people_net, picture_HW3)
        assert len(boxes_N4) == theirs[f"count{number}"] > 3 and (scores_N > BOX_SCORE).all()
        boxes_M4 = theirs[f"boxes{number}"]
        assert np.abs(boxes_N4[: len(boxes_M4)] - boxes_M4).max() < 0.01
        points_MP2 = np.stack([find_points(pose_net, picture_HW3, box_4)[0] for box_4 in boxes_M4])
        apart_MP = np.abs(points_MP2 - 0.5 - theirs[f"points{number}"]).max(axis=-1)
        found_MP = theirs[f"scores{number}"] > 0  # where it is not, rtmlib moves the point
        assert (apart_MP[found_MP] < 0.5).all() and found_MP.mean() > 0.98


# ---- in closed form


def cells(**of: tuple[float, ...]) -> np.ndarray:
    """8400 85, nothing anywhere but in those cells: (across, down, log width, log height, sure, of a person)."""
    cells_NC = np.zeros((8400, 85))
    for name, values in of.items():
        cells_NC[int(name[1:]), :6] = values
    return cells_NC


def test_a_cell_tells_its_box_in_strides():
    # 80 cells a row of the first grid: 163 is column 3 of row 2; 40 of the second: 6400 + 41 is column 1 of row 1
    boxes_N4, scores_N = decode_boxes(
        cells(
            c163=(0.5, 0.25, np.log(2), np.log(4), 0.9, 0.8), c6441=(0, 0, 0, 0, 1, 0.4), c8000=(0, 0, 9, 9, 0.9, 0.3)
        )
    )
    assert np.allclose(boxes_N4, [[28 - 8, 18 - 16, 28 + 8, 18 + 16], [16 - 8, 16 - 8, 16 + 8, 16 + 8]])
    assert np.allclose(scores_N, [0.72, 0.4])


def test_other_things_are_no_people():
    cells_NC = cells(c0=(0, 0, 0, 0, 1, 0.1))
    cells_NC[0, 6:] = 1  # anything but a person
    assert len(decode_boxes(cells_NC)[0]) == 0


def test_of_boxes_that_overlap_the_surest_stays():
    boxes_N4 = np.array([[0, 0, 99, 99], [0, 0, 99, 59], [0, 0, 99, 44], [50, 0, 149, 99]], float)
    # over the union with the first: 0.6; 0.45, which is not beyond; a third
    assert without_overlaps(boxes_N4, np.array([0.9, 0.8, 0.7, 0.6])) == [0, 2, 3]
    assert without_overlaps(boxes_N4, np.array([0.5, 0.8, 0.4, 0.3])) == [1, 3]
    assert without_overlaps(np.zeros((0, 4)), np.zeros(0)) == []


def test_the_frame_lies_at_the_upper_left_on_grey():
    picture_HW3, scale = letterbox(np.full((100, 200, 3), 7, np.uint8))
    assert scale == 3.2 and picture_HW3.shape == (640, 640, 3)
    assert (picture_HW3[:320] == 7).all() and (picture_HW3[320:] == 114).all()
    assert letterbox(np.zeros((700, 1, 3), np.uint8))[0].shape == (640, 640, 3)


def test_a_point_is_where_its_column_and_its_row_are_likeliest():
    columns_PX, rows_PY = np.zeros((2, 576)), np.zeros((2, 768))
    columns_PX[0, 101], rows_PY[0, 300], columns_PX[1, 575], rows_PY[1, 3] = 0.9, 0.7, 0.2, 0.6
    at_P2, scores_P = decode_simcc(columns_PX, rows_PY)
    assert at_P2.tolist() == [[50.5, 150], [287.5, 1.5]] and scores_P.tolist() == [0.7, 0.2]


class Bright:
    """In place of the pose network: every point is where the crop is brightest."""

    def get_inputs(self):
        return [type("Input", (), {"name": "input"})]

    def run(self, _, given):
        bright_HW = given["input"][0].sum(axis=0)
        columns, rows = np.repeat(bright_HW.max(axis=0), 2), np.repeat(bright_HW.max(axis=1), 2)
        return [np.tile(columns, (1, 133, 1)), np.tile(rows, (1, 133, 1))]


@pytest.mark.parametrize("box_4", [(30, 10, 130, 90), (100, 40, 180, 119), (0, 0, 319, 100)])
def test_a_point_comes_back_to_where_it_is_in_the_frame(box_4):
    frame_HW3 = np.zeros((120, 320, 3), np.uint8)
    frame_HW3[60:65, 110:115] = 255  # about the middle of pixel (112, 62)
    points_P2, _ = find_points(Bright(), frame_HW3, np.array(box_4, float))
    pixels_a_step = max((box_4[2] - box_4[0]) / 288, (box_4[3] - box_4[1]) / 384) * 1.25
    assert np.abs(points_P2 - [112.5, 62.5]).max() <= 2.5 + pixels_a_step and len(points_P2) == 133


# ---- the user's files


def test_the_same_frame_gives_the_same_bits_and_only_people_in_boxes(folder):
    finder, picture_HW3 = open_onnx(folder), frame(*FRAMES[0], 0)
    first, second = finder.find(picture_HW3), open_onnx(folder).find(picture_HW3)
    assert len(first.points_NP2) == 42 and first.points_NP2.shape[1:] == (133, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert (np.diff(first.boxes_N4[:, 0]) >= 0).all()
    black = finder.find(np.zeros((64, 64, 3), np.uint8))
    assert black.points_NP2.shape == (0, 133, 2) and black.boxes_N4.shape == (0, 4)


def test_the_digest_tells_networks_apart(folder, tmp_path, monkeypatch):
    write_people_net(tmp_path / PEOPLE_FILE, seed=1)
    write_pose_net(tmp_path / POSE_FILE)
    digests = {open_onnx(folder).digest, open_onnx(folder).digest, open_onnx(tmp_path).digest}
    monkeypatch.setattr(pose_onnx, "VERSION", 2)
    assert len(digests) == 2 and open_onnx(folder).digest not in digests


def missing(folder):
    (folder / POSE_FILE).unlink()


def a_web_page(folder):
    (folder / PEOPLE_FILE).write_text("<!DOCTYPE html>")


def exchanged(folder):
    write_pose_net(folder / PEOPLE_FILE)


def of_fewer_points(folder):
    write_pose_net(folder / POSE_FILE, points=17)


def of_other_sides(folder):
    write_people_net(folder / PEOPLE_FILE, sides=(416, 416))


def cut_short(folder):
    (folder / POSE_FILE).write_bytes((folder / POSE_FILE).read_bytes()[:20_000])


def noise(folder):
    (folder / POSE_FILE).write_bytes(np.random.RandomState(0).bytes(5000))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (missing, r"dw-ll_ucoco_384\.onnx: 1 problem\n.*is missing"),
        (a_web_page, "is a saved web page; expected an ONNX network of DWPose"),
        (exchanged, r"yolox_l\.onnx: .*\n.*takes and gives .*it is another network than yolox_l\.onnx"),
        (of_fewer_points, r"\[1, 17, 576\].*it is another network than dw-ll_ucoco_384\.onnx"),
        (of_other_sides, r"\[1, 3, 416, 416\].*it is another network"),
        (cut_short, "is no ONNX network that onnxruntime reads"),
        (noise, "is no ONNX network that onnxruntime reads"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_files_that_are_not_these_networks_are_refused_in_words(tmp_path, spoil, words):
    write_people_net(tmp_path / PEOPLE_FILE)
    write_pose_net(tmp_path / POSE_FILE)
    spoil(tmp_path)
    with pytest.raises(UserError, match=words):
        open_onnx(tmp_path)


def test_a_network_that_gives_no_numbers_is_refused(folder, monkeypatch):
    def run(session, picture_HW3, real=pose_onnx._run):
        given = real(session, picture_HW3)
        return given if len(given) == 1 else [part * np.nan for part in given]

    monkeypatch.setattr(pose_onnx, "_run", run)
    with pytest.raises(UserError, match="what are no numbers"):
        open_onnx(folder).find(frame(*FRAMES[0], 0))


def test_a_device_that_onnxruntime_does_not_have_is_refused(folder):
    with pytest.raises(UserError, match="cannot compute on mps; install onnxruntime-gpu, or give cpu"):
        open_onnx(folder, "mps")


def test_without_onnxruntime_it_is_said_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'reeltune\[pose\]'"):
        open_onnx(folder)
