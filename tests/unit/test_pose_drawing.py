"""The drawing of poses: each width, colour and position of DWPose's, at any size, where a clip's pixels would be."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from reeltune.core.types import Crop, Shape
from reeltune.data.findings import MediaError
from reeltune.data.keypoints import Keypoints, People, write_keypoints
from reeltune.data.media import read_frames, write_clip
from reeltune.data.pose_drawing import FACE, HANDS, draw_frames, draw_people
from tests.unit.people import figure, people, walk

NOSE, LEFT_SHOULDER, RIGHT_SHOULDER, LEFT_ELBOW = 0, 5, 6, 7
BLACK = (0, 0, 0)


def drawn(seen: dict[int, tuple[float, float]], height=64, width=96, score=1.0, points=133) -> np.ndarray:
    """H W 3: one person, of whom these points alone are seen."""
    points_NP2, scores_NP = np.zeros((1, points, 2)), np.zeros((1, points))
    for point, place in seen.items():
        points_NP2[0, point], scores_NP[0, point] = place, score
    return draw_people(People(points_NP2, scores_NP, np.zeros((1, 4)), np.ones(1)), height, width)


def colours(picture_HW3: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(map(int, pixel)) for pixel in np.unique(picture_HW3.reshape(-1, 3), axis=0)}


def extent(mask_HW: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(mask_HW)
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def test_it_is_the_drawing_of_the_released_tool_pixel_for_pixel():
    """The picture is by the drawing of controlnet-aux 0.0.10, of the same random points (recorded 2026-11-26)."""
    with np.load(Path(__file__).with_name("drawn_pose.npz")) as held:
        points_NP2, scores_NP = held["points"].astype(np.float64), held["scores"].astype(np.float64)
        theirs_HW3 = cv2.imdecode(held["png"], cv2.IMREAD_COLOR)[..., ::-1]
    ours_HW3 = draw_people(People(points_NP2, scores_NP, np.zeros((2, 4)), np.ones(2)), *theirs_HW3.shape[:2])
    assert theirs_HW3.any(axis=-1).sum() > 10_000 and np.array_equal(ours_HW3, theirs_HW3)


def test_a_joint_is_a_disc_of_radius_4_in_its_colour_where_its_point_lies():
    picture_HW3 = drawn({NOSE: (40.9, 20.1)})
    assert colours(picture_HW3) == {BLACK, (255, 0, 0)}
    assert extent(picture_HW3[..., 0] > 0) == (16, 24, 36, 44)
    assert colours(drawn({LEFT_ELBOW: (40, 20)})) == {BLACK, (0, 255, 0)}
    assert colours(drawn({16: (40, 20)})) == {BLACK, (0, 170, 255)}  # the right ankle is OpenPose's tenth joint


def test_a_limb_is_an_ellipse_of_half_width_4_at_six_tenths_of_its_colour():
    picture_HW3 = drawn({LEFT_SHOULDER: (20, 30), LEFT_ELBOW: (80, 30)})
    limb = (102, 153, 0)  # 0.6 of (170, 255, 0)
    assert colours(picture_HW3) == {BLACK, limb, (85, 255, 0), (0, 255, 0)}
    assert [tuple(pixel) for pixel in picture_HW3[25:36, 50]] == [BLACK, *[limb] * 9, BLACK]
    assert [tuple(pixel) for pixel in picture_HW3[27:34, 35]] == [limb] * 7  # it narrows to its ends


def test_the_neck_is_between_the_shoulders_and_seen_with_both():
    both = drawn({LEFT_SHOULDER: (70, 30), RIGHT_SHOULDER: (30, 34)})
    assert tuple(both[32, 50]) == (255, 85, 0)
    assert tuple(both[33, 41]) == (153, 0, 0) and tuple(both[31, 60]) == (153, 51, 0)  # right, left
    one = drawn({LEFT_SHOULDER: (70, 30), NOSE: (50, 10)})
    assert colours(one) == {BLACK, (255, 0, 0), (85, 255, 0)}  # two joints, no limb, no neck


def test_points_below_the_score_are_not_drawn_nor_lines_that_end_in_them():
    assert not drawn({NOSE: (40, 20)}, score=0.299).any() and drawn({NOSE: (40, 20)}, score=0.3).any()
    points_NP2, scores_NP = np.zeros((1, 17, 2)), np.zeros((1, 17))
    points_NP2[0, [LEFT_SHOULDER, LEFT_ELBOW]] = (20, 30), (80, 30)
    scores_NP[0, [LEFT_SHOULDER, LEFT_ELBOW]] = 1, 0.29
    picture_HW3 = draw_people(People(points_NP2, scores_NP, np.zeros((1, 4)), np.ones(1)), 64, 96)
    assert colours(picture_HW3) == {BLACK, (85, 255, 0)} and extent(picture_HW3.any(axis=-1)) == (26, 34, 16, 24)


def test_hands_have_lines_of_2_pixels_in_hues_and_blue_points():
    for hand in HANDS:
        wrist, thumb = hand.start, hand.start + 1
        picture_HW3 = drawn({wrist: (20, 30), thumb: (80, 30)})
        assert colours(picture_HW3) == {BLACK, (255, 0, 0), (0, 0, 255)}
        assert 2 <= (picture_HW3[:, 50, 0] == 255).sum() <= 3  # OpenCV's line of thickness 2
        assert extent(picture_HW3[..., 2] == 255) == (26, 34, 16, 84)
    middle = drawn({91 + 9: (20, 30), 91 + 10: (80, 30)})  # line 9 of 20: hue 162 degrees
    assert (0, 255, 179) in colours(middle)


def test_the_face_is_white_points_of_radius_3():
    picture_HW3 = drawn({FACE.start: (40, 20), FACE.stop - 1: (60, 40)})
    assert colours(picture_HW3) == {BLACK, (255, 255, 255)}
    assert extent(picture_HW3[:30, :, 0] > 0) == (17, 23, 37, 43)
    assert not drawn({20: (40, 20)}).any()  # feet are not drawn


def test_faces_lie_over_hands_and_these_over_bodies():
    place = (40, 20)
    assert tuple(drawn({NOSE: place, 91: place})[20, 40]) == (0, 0, 255)
    assert tuple(drawn({NOSE: place, 91: place, 30: place})[20, 40]) == (255, 255, 255)


def test_widths_do_not_grow_with_the_picture():
    seen = {LEFT_SHOULDER: (20, 32), LEFT_ELBOW: (80, 32)}
    small = drawn(seen)
    large = drawn({point: (4 * x, 4 * y) for point, (x, y) in seen.items()}, height=256, width=384)
    assert small[:, 50].any(axis=-1).sum() == large[:, 200].any(axis=-1).sum() == 9
    assert extent(large[:, :100].any(axis=-1))[0] == 128 - 4


def test_bodies_alone_are_drawn_of_17_points():
    seen = {LEFT_SHOULDER: (20, 30), LEFT_ELBOW: (80, 30), NOSE: (60, 10)}
    assert np.array_equal(drawn(seen, points=17), drawn(seen))


def test_a_cut_is_the_drawing_cut_and_frames_may_repeat():
    keypoints = walk(4, 90, 160, count=2)
    whole_FCHW = draw_frames(keypoints, [0, 1, 2, 3], Crop(60, 106, 0, 0), Shape(4, 60, 106))
    cut_FCHW = draw_frames(keypoints, [3, 1, 3], Crop(60, 106, 7, 30), Shape(3, 48, 64))
    assert np.array_equal(cut_FCHW, whole_FCHW[[3, 1, 3], :, 7:55, 30:94])
    assert not np.array_equal(whole_FCHW[1], whole_FCHW[3])
    with pytest.raises(MediaError, match="has 4 frames, so no frame 4"):
        draw_frames(keypoints, [4], Crop(60, 106, 0, 0), Shape(1, 48, 64))


def test_points_land_where_the_resized_and_cut_clip_has_them(tmp_path):
    """A bright square about the nose: its centre in the read pixels is the disc's centre in the drawn control."""
    size, crop, shape = (90, 160), Crop(53, 96, 5, 22), Shape(1, 48, 64)
    for place in ((60.0, 30.0), (111.0, 61.0)):  # between pixels, so that the square is even about it
        picture_FHWC = np.zeros((1, *size, 3), np.uint8)
        x, y = map(int, place)
        picture_FHWC[0, y - 8 : y + 8, x - 8 : x + 8] = 255
        write_clip(tmp_path / "clip.mp4", picture_FHWC, 8.0)
        nose = People(np.zeros((1, 17, 2)), np.zeros((1, 17)), np.zeros((1, 4)), np.ones(1))
        nose.points_NP2[0, 0], nose.scores_NP[0, 0] = place, 1
        made = Keypoints.of([nose], [0], layout="coco", height=size[0], width=size[1], detector="d")
        write_keypoints(tmp_path / "clip.npz", made)
        centres = []
        for file in ("clip.mp4", "clip.npz"):
            light_HW = read_frames(tmp_path / file, [0], crop, shape)[0, 0].astype(float)
            rows, columns = np.mgrid[:48, :64] + 0.5
            centres.append([(light_HW * at).sum() / light_HW.sum() for at in (columns, rows)])
        by_hand = np.array(place) * [96 / 160, 53 / 90] - [22, 5]
        assert np.abs(centres[0] - by_hand).max() < 0.2
        assert np.abs(centres[1] - by_hand).max() <= 0.5 + 1e-9  # the middle of the pixel in which it lies


def test_nobody_is_black():
    assert not draw_people(People.nobody("coco"), 32, 32).any()
    assert draw_people(people(figure(16, 16, 30)), 32, 32).any()
