"""Key points drawn as DWPose draws them, at whatever size is trained: what released pose controls were trained on.

The drawing is OpenPose's body as ControlNet has it (arXiv:2302.05543) with hands and face (DWPose, arXiv:2307.15880;
https://github.com/IDEA-Research/DWPose, dwpose/util.py). Its widths are pixels of the picture that the network sees,
never a share of it: a drawing at 1080p that is made smaller has lines thinner than the network knows.  (no torch)
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np

from reeltune.core.types import Crop, Shape
from reeltune.data.keypoints import Keypoints, People, digest_of

DRAWING_VERSION = 1  # raise it when the same key points are drawn as other pixels: caches then hold another clip

SEEN_SCORE = 0.3  # a point of less is not drawn, nor a line that ends in it (dwpose/__init__.py)
LIMB_HALF_WIDTH_PX = 4  # of a limb's ellipse, across; along, it is half as long as the limb (util.py, stickwidth)
LIMB_BRIGHTNESS = 0.6  # of a limb's colour; joints are drawn after it, at their full colour
JOINT_RADIUS_PX = 4
HAND_WIDTH_PX = 2
HAND_RADIUS_PX = 4
HAND_POINT_COLOUR = (0, 0, 255)
FACE_RADIUS_PX = 3
FACE_POINT_COLOUR = (255, 255, 255)

# OpenPose's 18 joints: nose, neck, then shoulder, elbow, wrist of the right and of the left, hip, knee, ankle of the
# right and of the left, right and left eye, right and left ear. Each is that point of COCO; the neck is none of them.
NECK = 1
SHOULDERS = (5, 6)  # in COCO: left, right; the neck is their mean, and seen if both are
JOINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLOURS = (  # RGB of limb n, and of joint n
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
# Of COCO-WholeBody's 133 points. A hand is its wrist, then four points of each finger from the thumb on.
FACE = slice(23, 91)
HANDS = (slice(91, 112), slice(112, 133))
FINGERS = tuple((0 if step == 0 else 4 * finger + step, 4 * finger + step + 1) for finger in range(5)
                for step in range(4))  # fmt: skip


def _hue(place: int) -> tuple[int, int, int]:
    """Line `place` of a hand: hues evenly round the circle, at full saturation and value."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(place / len(FINGERS), 1.0, 1.0))
    return red, green, blue


FINGER_COLOURS = tuple(map(_hue, range(len(FINGERS))))


def drawing_digest(path: str) -> str:
    """A digest of all that tells how the key points of that file are drawn, but for the size. Raises OSError."""
    return f"{DRAWING_VERSION} {digest_of(path)}"


def draw_frames(keypoints: Keypoints, frames: Sequence[int], crop: Crop, shape: Shape) -> np.ndarray:
    """uint8 F C H W in RGB: those frames, where `read_frames` of a clip would show them.

    The picture is taken as crop.height x crop.width, and `shape` is cut out at (crop.top, crop.left); nothing drawn is
    resized. Raises MediaError for a frame that there is not.
    """
    if len(frames) != shape.frames:
        raise ValueError(f"{len(frames)} frames do not make {shape}")
    out_FCHW = np.empty((shape.frames, 3, shape.height, shape.width), np.uint8)
    drawn: dict[int, int] = {}
    for place, frame in enumerate(frames):
        if (before := drawn.setdefault(int(frame), place)) < place:
            out_FCHW[place] = out_FCHW[before]
            continue
        picture_HW3 = draw_people(keypoints.frame(int(frame), crop.height, crop.width), crop.height, crop.width)
        cut_HW3 = picture_HW3[crop.top : crop.top + shape.height, crop.left : crop.left + shape.width]
        out_FCHW[place] = cut_HW3.transpose(2, 0, 1)
    return out_FCHW


def draw_people(people: People, height: int, width: int) -> np.ndarray:
    """uint8 H W 3 in RGB: people, in pixels of a picture of that size.

    Limbs of everybody first, limb by limb, so that a later limb lies over an earlier one of whomever; then joints, then
    hands, then faces.
    """
    picture_HW3 = np.zeros((height, width, 3), np.uint8)
    bodies = [_joints(*person) for person in zip(people.points_NP2, people.scores_NP, strict=True)]
    for limb, (start, end) in enumerate(LIMBS):
        colour = tuple(int(LIMB_BRIGHTNESS * part) for part in COLOURS[limb])
        for points_J2, seen_J in bodies:
            if seen_J[start] and seen_J[end]:
                _fill_limb(picture_HW3, points_J2[start], points_J2[end], colour)
    for joint, colour in enumerate(COLOURS):
        for points_J2, seen_J in bodies:
            if seen_J[joint]:
                _disc(picture_HW3, points_J2[joint], JOINT_RADIUS_PX, colour)
    if people.points_NP2.shape[1] < HANDS[-1].stop:
        return picture_HW3  # bodies alone
    seen_NP = people.scores_NP >= SEEN_SCORE
    for points_P2, seen_P in zip(people.points_NP2, seen_NP, strict=True):
        for hand in HANDS:
            _draw_hand(picture_HW3, points_P2[hand], seen_P[hand])
    for points_P2, seen_P in zip(people.points_NP2, seen_NP, strict=True):
        for point in points_P2[FACE][seen_P[FACE]]:
            _disc(picture_HW3, point, FACE_RADIUS_PX, FACE_POINT_COLOUR)
    return picture_HW3


def _joints(points_P2: np.ndarray, scores_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float J 2, bool J) of OpenPose's 18 joints, from COCO's points."""
    neck_2 = points_P2[list(SHOULDERS)].mean(axis=0)
    points_J2 = np.stack([neck_2 if point is None else points_P2[point] for point in JOINTS])
    neck_score = scores_P[list(SHOULDERS)].min()
    scores_J = np.array([neck_score if point is None else scores_P[point] for point in JOINTS])
    return points_J2, scores_J >= SEEN_SCORE


def _pixel(point_2: np.ndarray) -> tuple[int, int]:
    """(column, row) of the pixel in which the point lies."""
    return math.floor(point_2[0]), math.floor(point_2[1])


def _fill_limb(picture_HW3: np.ndarray, start_2: np.ndarray, end_2: np.ndarray, colour: Sequence[int]) -> None:
    """A filled ellipse about the middle; half axes and angle are whole numbers, as released."""
    import cv2

    across, down = start_2 - end_2
    half_length, angle = int(math.hypot(across, down) / 2), int(math.degrees(math.atan2(down, across)))
    middle = _pixel((start_2 + end_2) / 2)
    outline = cv2.ellipse2Poly(middle, (half_length, LIMB_HALF_WIDTH_PX), angle, 0, 360, 1)
    cv2.fillConvexPoly(picture_HW3, np.array(outline, np.int32), colour)


def _disc(picture_HW3: np.ndarray, point_2: np.ndarray, radius: int, colour: Sequence[int]) -> None:
    import cv2

    cv2.circle(picture_HW3, _pixel(point_2), radius, colour, thickness=-1)


def _draw_hand(picture_HW3: np.ndarray, points_P2: np.ndarray, seen_P: np.ndarray) -> None:
    import cv2

    for (start, end), colour in zip(FINGERS, FINGER_COLOURS, strict=True):
        if seen_P[start] and seen_P[end]:
            ends = _pixel(points_P2[start]), _pixel(points_P2[end])
            cv2.line(picture_HW3, *ends, colour, thickness=HAND_WIDTH_PX)
    for point in points_P2[seen_P]:
        _disc(picture_HW3, point, HAND_RADIUS_PX, HAND_POINT_COLOUR)
