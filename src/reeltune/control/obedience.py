"""How well a clip obeys its control: what a detector finds on the clip, measured against what was asked for.

Pure functions of arrays. Letters: F frames, H W pixels, N people, K key points.  (no torch)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from reeltune.data.pose_drawing import SEEN_SCORE

# ---- edges

EDGE_REACH = 0.0075  # of the diagonal: how far an edge may lie from its line (Berkeley benchmark, as below)
LEAST_REACH_PX = 1.5  # a line one pixel wide may come to lie on any of the eight pixels around it when it is resized


@dataclass(frozen=True)
class Edges:
    precision: float  # share of the edges found that lie near a line asked for
    recall: float  # share of the lines asked for that lie near an edge found
    f1: float


def reach_px(height: int, width: int) -> float:
    """How far an edge may lie from its line, in pixels of a picture of that size."""
    return max(EDGE_REACH * float(np.hypot(height, width)), LEAST_REACH_PX)


def edge_agreement(given_FHW: np.ndarray, found_FHW: np.ndarray, reach: float | None = None) -> Edges | None:
    """Precision, recall and F1 of bool edge maps, counted over all frames; None where no line is asked for.

    Martin, Fowlkes and Malik 2004 (https://doi.org/10.1109/TPAMI.2004.1273918), where edges match within 0.75 % of the
    diagonal; here each pixel looks for its nearest one, by an exact distance transform, and need not share it with
    none, so that lines of different widths may agree. reach: pixels, in place of that share.
    """
    return _agreement(
        zip(given_FHW, found_FHW, strict=True), reach_px(*given_FHW.shape[1:]) if reach is None else reach
    )


def _agreement(pairs: Iterable[tuple[np.ndarray, np.ndarray]], reach: float) -> Edges | None:
    """How well bool maps found agree with those asked for; None where nothing is asked for. reach: in pixels."""
    asked, found, hits, covered = 0, 0, 0, 0
    for given_HW, found_HW in pairs:
        asked += int(given_HW.sum())
        found += int(found_HW.sum())
        hits += int((_distance(given_HW)[found_HW] <= reach).sum())
        covered += int((_distance(found_HW)[given_HW] <= reach).sum())
    if not asked:
        return None
    if not hits:
        return Edges(0.0, 0.0, 0.0)
    precision, recall = hits / found, covered / asked
    return Edges(precision, recall, 2 * precision * recall / (precision + recall))


def lines_of(clip_FHWC: np.ndarray) -> np.ndarray:
    """bool_FHW: where a uint8 drawing of bright lines on black has one: at least half as bright as the brightest pixel
    of the clip, because a thin line grows fainter when it is made smaller."""
    brightness_FHW = clip_FHWC.max(-1)
    return brightness_FHW >= max(int(brightness_FHW.max()) / 2, 1)


def _distance(edges_HW: np.ndarray) -> np.ndarray:
    """float32_HW: pixels to the nearest edge; infinite where there is none."""
    if not edges_HW.any():
        return np.full(edges_HW.shape, np.inf, np.float32)
    return cv2.distanceTransform((~edges_HW).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


# ---- drawings of poses

LIT = 0.3  # of the brightest pixel: half of a limb's brightness, which is 0.6 of a joint's
HUES = 6  # classes of 60 degrees, about 0, 60 and so on: their ends lie between the drawing's hues, which are 20 apart
GREY, FAINT = HUES, HUES + 1  # classes of what has no hue, as points of a face, and of what is not lit
LEAST_SATURATION = 128  # of 255, of a hue


def drawing_agreement(given_FHWC: np.ndarray, found_FHWC: np.ndarray) -> Edges | None:
    """`edge_agreement` of two drawings of poses, uint8 in RGB, where a pixel is held against those of its own colour
    alone: an arm does not lie well upon a leg, nor a left one upon a right one. None where nothing is asked for."""
    pairs = (
        (given_HW == colour, found_HW == colour)
        for given_HW, found_HW in zip(_coloured(given_FHWC), _coloured(found_FHWC), strict=True)
        for colour in range(FAINT)
    )
    return _agreement(pairs, reach_px(*given_FHWC.shape[1:3]))


def _coloured(drawing_FHWC: np.ndarray) -> Iterable[np.ndarray]:
    """uint8 H W of each frame: the class of each pixel's colour."""
    least = max(LIT * int(drawing_FHWC.max()), 1)
    for rgb_HWC in drawing_FHWC:
        hue_HW, saturation_HW, value_HW = cv2.split(cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2HSV))  # hue: 0 to 179
        class_HW = (hue_HW.astype(np.int16) + 90 // HUES) // (180 // HUES) % HUES
        class_HW[saturation_HW < LEAST_SATURATION] = GREY
        class_HW[value_HW < least] = FAINT
        yield class_HW


# ---- depth


def rank_correlation(given_FHW: np.ndarray, found_FHW: np.ndarray) -> float | None:
    """Spearman's correlation of two uint8 clips, over all pixels of all frames; None where the first is all of one
    value, 0 where the second is.

    By ranks, because networks tell depth but for scale and shift (https://arxiv.org/abs/1907.01341), and files of it
    for a curve too: any rising one leaves this number as it is. Over the clip and not by frame, so that depth which
    flickers counts. Equal values share the mean of their ranks, and the number is Pearson's of the ranks.
    """
    if given_FHW.shape != found_FHW.shape:
        raise ValueError(f"{given_FHW.shape} and {found_FHW.shape} are not of one shape")
    # counts of each pair of values: all that ranks, means and products need
    joint = np.zeros(256 * 256)
    for given_HW, found_HW in zip(given_FHW, found_FHW, strict=True):
        joint += np.bincount(given_HW.ravel().astype(np.intp) * 256 + found_HW.ravel(), minlength=256 * 256)
    joint = joint.reshape(256, 256)
    a, b = (_centred_ranks(joint.sum(axis)) for axis in (1, 0))
    spread_a, spread_b = joint.sum(1) @ a**2, joint.sum(0) @ b**2
    if spread_a == 0:
        return None
    return float(a @ joint @ b / np.sqrt(spread_a * spread_b)) if spread_b else 0.0


def _centred_ranks(counts: np.ndarray) -> np.ndarray:
    """Each value's rank, the mean of those that have that value, less the mean of all. counts: how many have it."""
    return np.cumsum(counts) - (counts - 1) / 2 - (counts.sum() + 1) / 2


# ---- poses

# Of COCO's 17 key points, nose to ankles: how far annotators differ, as a share of a person's size
# (https://cocodataset.org/#keypoints-eval; pycocotools, Params.kpt_oks_sigmas).
SIGMAS_17 = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000
BODY = len(SIGMAS_17)  # the first key points of COCO-WholeBody's 133 too
AREA_OF_BOX = 0.53  # a person's area as a share of the box, where no outline is known (xtcocotools, cocoeval.py)
PCK_REACH = 0.1  # of the longer side of a person's box (Yang and Ramanan 2013, https://doi.org/10.1109/TPAMI.2012.261)


@dataclass(frozen=True)
class Poses:
    oks: float  # object keypoint similarity, 0 to 1
    pck: float  # share of key points within a tenth of the person's longer side


def pose_agreement(given: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Poses | None:
    """OKS and PCK of people found, against those given; None where no person is asked for. given, found: for each frame
    N,K,3 of (x, y in pixels, score), COCO's 17 body points first.

    People are paired by their OKS, best first, as COCO's evaluation does. The mean is over the people of a frame, asked
    for or found, whichever are more, so that a missing person and one too many both count 0; then over the frames with
    people. A key point whose score is too low to be drawn is not asked for, or not found.
    """
    frames = [
        _people(given_NK3[:, :BODY], found_NK3[:, :BODY]) for given_NK3, found_NK3 in zip(given, found, strict=True)
    ]
    scored = [frame for frame in frames if frame is not None]
    if not scored:
        return None
    oks, pck = np.mean(scored, axis=0)
    return Poses(float(oks), float(pck))


def _people(given_NK3: np.ndarray, found_NK3: np.ndarray) -> tuple[float, float] | None:
    """(OKS, PCK) of one frame."""
    asked = [person for person in given_NK3 if (person[:, 2] >= SEEN_SCORE).any()]
    there = [person for person in found_NK3 if (person[:, 2] >= SEEN_SCORE).any()]
    if not asked:
        return None
    pairs = sorted(
        ((*_person(one, other), i, j) for i, one in enumerate(asked) for j, other in enumerate(there)),
        key=lambda pair: (-pair[0], *pair[2:]),
    )
    sums, taken, used = np.zeros(2), set(), set()
    for oks, pck, i, j in pairs:
        if i not in taken and j not in used:
            taken.add(i)
            used.add(j)
            sums += oks, pck
    oks, pck = sums / max(len(asked), len(there))
    return float(oks), float(pck)


def _person(given_K3: np.ndarray, found_K3: np.ndarray) -> tuple[float, float]:
    """(OKS, PCK) over the key points asked for."""
    asked = given_K3[:, 2] >= SEEN_SCORE
    given, found, sigmas = given_K3[asked], found_K3[asked], SIGMAS_17[asked]
    there = found[:, 2] >= SEEN_SCORE
    sides = np.maximum(np.ptp(given[:, :2], axis=0), 1)  # a pixel at least, so that one key point has a size
    apart = np.hypot(*(given[:, :2] - found[:, :2]).T)
    similar = np.exp(-(apart**2) / (2 * AREA_OF_BOX * sides.prod() * (2 * sigmas) ** 2))
    return float((similar * there).mean()), float(((apart <= PCK_REACH * sides.max()) & there).mean())


# ---- camera paths


@dataclass(frozen=True)
class CameraPath:
    rotation_deg: float  # mean angle between the views of a frame
    translation: float | None  # root mean square distance of camera centres, of the length of the path asked for; None
    # where that does not move


def camera_agreement(given_F34: np.ndarray, found_F34: np.ndarray) -> CameraPath:
    """World-to-camera matrices of the same frames, after the similarity that brings the second's world to the first's.

    Its rotation is the chordal mean of the views' own (Hartley et al. 2013, https://doi.org/10.1007/s11263-012-0601-0)
    and not that of the centres alone: by these a camera that moves left would do for one that moves right. Scale and
    shift are then Umeyama's (1991, https://doi.org/10.1109/34.88573), the scale not below 0.
    """
    given_R, found_R = given_F34[:, :, :3], found_F34[:, :, :3]
    turn = _nearest_rotation(np.einsum("fji,fjk->ik", given_R, found_R))  # found's world -> given's
    between = np.einsum("fij,fkj->fik", given_R @ turn, found_R)
    cosine = np.clip((np.trace(between, axis1=1, axis2=2) - 1) / 2, -1, 1)
    rotation_deg = float(np.degrees(np.arccos(cosine)).mean())

    given, found = (-np.einsum("fji,fj->fi", poses[:, :, :3], poses[:, :, 3]) for poses in (given_F34, found_F34))
    length = float(np.linalg.norm(np.diff(given, axis=0), axis=1).sum())
    if length < 1e-9:
        return CameraPath(rotation_deg, None)
    a, b = given - given.mean(0), (found - found.mean(0)) @ turn.T
    spread = float((b**2).sum())
    scale = max(float((a * b).sum()) / spread, 0.0) if spread > 1e-18 else 0.0
    return CameraPath(rotation_deg, float(np.sqrt(((a - scale * b) ** 2).sum(1).mean())) / length)


def _nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """The rotation nearest to it in the sum of squares."""
    left, _, right = np.linalg.svd(matrix)
    return left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right
