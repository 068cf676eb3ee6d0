"""Measures of obedience, by what they must be in closed form."""

import math

import numpy as np
import pytest

from reeltune.control.obedience import (
    PCK_REACH,
    Edges,
    camera_agreement,
    drawing_agreement,
    edge_agreement,
    lines_of,
    pose_agreement,
    rank_correlation,
    reach_px,
)
from reeltune.data.pose_drawing import COLOURS


def column(at: int, frames: int = 2, height: int = 30, width: int = 40) -> np.ndarray:
    lines = np.zeros((frames, height, width), bool)
    lines[:, :, at] = True
    return lines


def test_edges_that_are_the_lines():
    assert edge_agreement(column(9), column(9)) == Edges(1.0, 1.0, 1.0)


@pytest.mark.parametrize(("by", "f1"), [(1, 1.0), (2, 1.0), (3, 0.0), (4, 0.0)])
def test_edges_shifted_meet_their_lines_up_to_the_reach(by, f1):
    found = edge_agreement(column(9), column(9 + by), reach=2.0)
    assert found is not None and found.f1 == f1
    diagonal = np.zeros((1, 20, 20), bool)
    diagonal[0, 5, 5] = True
    apart = np.roll(diagonal, (1, 1), axis=(1, 2))  # by the square root of 2
    assert edge_agreement(diagonal, apart, 1.42).f1 == 1.0 and edge_agreement(diagonal, apart, 1.41).f1 == 0.0


def test_reach_is_the_berkeley_benchmarks_share_of_the_diagonal():
    assert reach_px(480, 640) == pytest.approx(6.0)
    assert reach_px(80, 80) == 1.5
    lines = np.zeros((1, 480, 640), bool)
    lines[0, :, 100] = True
    for by, f1 in ((6, 1.0), (7, 0.0)):
        assert edge_agreement(lines, np.roll(lines, by, axis=2)).f1 == f1


def test_precision_and_recall_are_counted_over_all_frames():
    """Of two frames of 30 pixels each: one right; beside the other, 60 pixels of no line."""
    found = column(9)
    found[1] = False
    found[1, :, [30, 35]] = True
    agreed = edge_agreement(column(9), found)
    assert (agreed.precision, agreed.recall) == (30 / 90, 30 / 60)
    assert agreed.f1 == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))


def test_edges_of_nothing():
    nothing = np.zeros((2, 30, 40), bool)
    assert edge_agreement(nothing, column(3)) is None
    assert edge_agreement(column(3), nothing) == Edges(0.0, 0.0, 0.0)
    one_frame = column(3)
    one_frame[1] = False
    assert edge_agreement(one_frame, one_frame) == Edges(1.0, 1.0, 1.0)


def test_lines_are_half_as_bright_as_the_brightest():
    clip = np.zeros((1, 4, 4, 3), np.uint8)
    clip[0, 0] = (0, 90, 0)
    clip[0, 1], clip[0, 2] = 46, 44
    assert lines_of(clip)[0].any(1).tolist() == [True, True, False, False]
    assert not lines_of(np.zeros((1, 4, 4, 3), np.uint8)).any()


def test_drawings_are_compared_colour_by_colour():
    """Of two bars, red and blue: swapped, each lies where the other should."""
    drawing = np.zeros((2, 60, 80, 3), np.uint8)
    drawing[:, 10:20, 10:70], drawing[:, 40:50, 10:70] = (255, 0, 0), (0, 0, 153)
    assert drawing_agreement(drawing, drawing) == Edges(1, 1, 1)
    assert drawing_agreement(drawing, drawing[:, ::-1]).f1 == 0
    assert edge_agreement(lines_of(drawing), lines_of(drawing[:, ::-1])).f1 == 1
    one = drawing.copy()
    one[:, 40:50] = 0
    assert drawing_agreement(drawing, one) == Edges(1, 0.5, 2 / 3)
    faint = np.where(drawing == 0, np.uint8(60), drawing)  # grey ground, as a codec leaves some
    assert drawing_agreement(drawing, faint).f1 > 0.99
    assert drawing_agreement(np.zeros_like(drawing), drawing) is None
    assert drawing_agreement(drawing, np.zeros_like(drawing)) == Edges(0, 0, 0)


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_of_a_pose_keeps_its_class(colour):
    """At a limb's brightness, and with the hue that an mp4 may turn by a few degrees."""
    full, less = (np.full((1, 8, 8, 3), [round(share * part) for part in colour], np.uint8) for share in (1, 0.6))
    beside = full.astype(int)
    beside[..., np.argsort(colour)[1]] += 20 * (1 if sorted(colour)[1] < 128 else -1)
    full[0, 0, 0] = less[0, 0, 0] = 255
    for other in (less, np.clip(beside, 0, 255).astype(np.uint8)):
        assert drawing_agreement(full, other).f1 > 0.95
    assert drawing_agreement(full, np.roll(full, 1, axis=-1)).f1 < 0.1  # 120 degrees on


def test_depth_is_compared_by_ranks():
    ramp = np.arange(240, dtype=np.uint8).reshape(2, 10, 12)
    curved = (255 * (ramp / 255) ** 0.5).round().astype(np.uint8)
    assert rank_correlation(ramp, ramp) == pytest.approx(1, abs=1e-12)
    assert rank_correlation(ramp, 255 - ramp) == pytest.approx(-1, abs=1e-12)
    assert rank_correlation(ramp, ramp // 2 + 7) == pytest.approx(1, abs=1e-4)  # but for ties
    assert rank_correlation(ramp, curved) > 0.999
    assert rank_correlation(ramp, np.full_like(ramp, 9)) == 0.0
    assert rank_correlation(np.full_like(ramp, 9), ramp) is None


def test_depth_by_hand():
    """Of ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4."""
    given, found = (np.array(values, np.uint8).reshape(1, 1, 4) for values in ([3, 8, 8, 200], [0, 70, 60, 255]))
    ranks = np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1]
    assert rank_correlation(given, found) == pytest.approx(ranks, abs=1e-12)


def test_depth_that_flickers_counts():
    ramp = np.tile(np.arange(0, 100, dtype=np.uint8), (4, 8, 1))
    flicker = ramp + np.array([0, 150, 0, 150], np.uint8)[:, None, None]
    assert rank_correlation(ramp, flicker) < 0.6


def person(x: float = 100, y: float = 100, height: float = 170) -> np.ndarray:
    """17 points in two columns, a box of 80 by `height`."""
    points = np.ones((17, 3))
    points[:, 0] = x + 80 * (np.arange(17) % 2)
    points[:, 1] = y + height * np.arange(17) / 16
    return points


def shifted(points: np.ndarray, by: float) -> np.ndarray:
    return points + np.array([by, 0, 0])


def test_a_pose_that_is_the_one_asked_for():
    agreed = pose_agreement([person()[None]], [person()[None]])
    assert (agreed.oks, agreed.pck) == (1.0, 1.0)


# as pycocotools has them
COCO = (0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89)


@pytest.mark.parametrize("by", [3.0, 16.9, 17.1, 60.0])
def test_oks_is_cocos_formula(by):
    agreed = pose_agreement([person()[None]], [shifted(person(), by)[None]])
    area = 0.53 * 80 * 170
    assert agreed.oks == pytest.approx(np.mean([math.exp(-(by**2) / (2 * area * (2 * s / 10) ** 2)) for s in COCO]))
    assert agreed.pck == (1.0 if by < PCK_REACH * 170 else 0.0)


def test_key_points_not_seen_are_not_asked_for_and_not_found():
    given, found = person(), person()
    given[0, 2] = 0.29
    given[0, :2] += 500
    assert pose_agreement([given[None]], [found[None]]).oks == 1.0
    found[1, 2] = 0.29
    agreed = pose_agreement([given[None]], [found[None]])
    assert agreed.oks == pytest.approx(15 / 16) and agreed.pck == pytest.approx(15 / 16)


def test_people_are_paired_whatever_their_order():
    pair = np.stack([person(0), person(400)])
    assert pose_agreement([pair], [pair[::-1]]).oks == 1.0
    for given, found in ((pair, pair[:1]), (pair[:1], pair), (pair, np.stack([person(0), person(0)]))):
        assert pose_agreement([given], [found]).oks == pytest.approx(0.5, abs=1e-3)
    nobody = np.zeros((0, 17, 3))
    assert pose_agreement([nobody], [pair]) is None
    assert pose_agreement([pair], [nobody]).oks == 0.0
    assert pose_agreement([pair, nobody], [pair, pair]).oks == 1.0  # of the frames with people


def test_whole_bodies_are_compared_by_their_body():
    whole = np.concatenate([person(), np.full((116, 3), 1.0)])[None]
    other = whole.copy()
    other[:, 17:, :2] = 900
    assert pose_agreement([whole], [other]).oks == 1.0


def turned(axis: int, degrees: float) -> np.ndarray:
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix, angle = np.eye(3), math.radians(degrees)
    matrix[[a, b], [a, b]] = math.cos(angle)
    matrix[a, b], matrix[b, a] = -math.sin(angle), math.sin(angle)
    return matrix


def poses_of(rotations: list[np.ndarray], centres: np.ndarray) -> np.ndarray:
    """World-to-camera matrices of cameras at those centres."""
    return np.stack([np.concatenate([R, (-R @ c)[:, None]], axis=1) for R, c in zip(rotations, centres, strict=True)])


PATH = np.stack([np.linspace(0, 2, 5), np.zeros(5), np.linspace(0, 1, 5) ** 2], axis=1)
VIEWS = [turned(1, 4 * f) @ turned(0, -2 * f) for f in range(5)]


def test_a_camera_path_in_another_world_is_the_same():
    """Another origin, scale and direction of the world, as COLMAP chooses."""
    turn = turned(0, 30) @ turned(2, 100)
    other = poses_of([R @ turn.T for R in VIEWS], 3.7 * PATH @ turn.T + [5, -2, 1])
    agreed = camera_agreement(poses_of(VIEWS, PATH), other)
    assert agreed.rotation_deg == pytest.approx(0, abs=1e-5) and agreed.translation == pytest.approx(0, abs=1e-9)


def test_rotations_that_drift_are_told_in_degrees():
    """By 6 degrees a frame: after the mean turn is taken out, 12, 6, 0, 6, 12."""
    found = poses_of([turned(1, 6 * f) @ R for f, R in enumerate(VIEWS)], PATH)
    given = poses_of(VIEWS, PATH)
    still = camera_agreement(poses_of([np.eye(3)] * 5, PATH), poses_of([turned(1, 6 * f) for f in range(5)], PATH))
    assert still.rotation_deg == pytest.approx((12 + 6 + 0 + 6 + 12) / 5, abs=1e-5)
    assert camera_agreement(given, found).rotation_deg == pytest.approx(7.2, abs=0.5)


def test_a_camera_that_moves_left_does_not_do_for_one_that_moves_right():
    """By the centres alone, half a turn about the vertical would make one the other."""
    right = poses_of([np.eye(3)] * 5, np.linspace([0, 0, 0], [4, 0, 0], 5))
    left = poses_of([np.eye(3)] * 5, np.linspace([0, 0, 0], [-4, 0, 0], 5))
    agreed = camera_agreement(right, left)
    assert agreed.rotation_deg == pytest.approx(0, abs=1e-5)
    assert agreed.translation == pytest.approx(math.sqrt(2) / 4)  # centres at -2 .. 2, found at one point: rms, of 4
    assert camera_agreement(right, right).translation == pytest.approx(0, abs=1e-9)


def test_translation_is_told_as_a_share_of_the_path():
    aside = np.array([[0, 0, 0], [1, 0.3, 0], [2, 0, 0], [3, -0.3, 0], [4, 0, 0]], float)
    straight = aside * [1, 0, 0]
    given, found = (poses_of([np.eye(3)] * 5, centres) for centres in (straight, aside))
    centred = aside - aside.mean(0)
    scale = (straight - straight.mean(0)).ravel() @ centred.ravel() / (centred**2).sum()
    left = straight - straight.mean(0) - scale * centred
    assert camera_agreement(given, found).translation == pytest.approx(np.sqrt((left**2).sum(1).mean()) / 4)
    stands = poses_of(VIEWS, np.zeros((5, 3)))
    assert camera_agreement(stands, found).translation is None
