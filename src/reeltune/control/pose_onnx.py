"""Poses by the two networks of DWPose, from the user's ONNX files (extra `pose`).  (no torch)

YOLOX (arXiv:2107.08430) finds people in the whole frame, and RTMPose as DWPose distilled it (arXiv:2307.15880) 133
points in each one's box. Each network is given colours in the order of its training: YOLOX blue first, unscaled (mmdet,
configs/yolox), RTMPose red first, normalised (mmpose, configs/wholebody_2d_keypoint/rtmpose). Where nobody is found
there is no pose, while DWPose's own code takes the whole frame for a person.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from reeltune.control.kind import digest_of, require_numbers
from reeltune.control.pose_finder import BOX_SCORE, MEAN, STD, PoseFinder, from_left, padded
from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import as_user_error, refuse_foreign
from reeltune.data.keypoints import LAYOUTS, People

PEOPLE_FILE, POSE_FILE = "yolox_l.onnx", "dw-ll_ucoco_384.onnx"  # as DWPose's users have them
VERSION = 1  # raise it when the same networks find otherwise
LAYOUT = "coco_wholebody"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}  # torch's device -> onnxruntime's name

PEOPLE_SIDE_PX = 640  # of YOLOX's square input
GREY = 114  # of what of it the frame does not cover (YOLOX, yolox/data/data_augment.py)
STRIDES_PX = (8, 16, 32)  # of its three grids
CLASSES = 80  # of COCO; a person is the first
PERSON = 0
MOST_OVERLAP = 0.45  # of two boxes, over their union, beyond which the lower score is dropped (dwpose/cv_ox_det.py)

POSE_HEIGHT_PX, POSE_WIDTH_PX = 384, 288
BINS_A_PIXEL = 2  # of the pose network's columns and rows (SimCC, arXiv:2107.03332; RTMPose's split ratio)

_CELLS = sum((PEOPLE_SIDE_PX // stride) ** 2 for stride in STRIDES_PX)
_FORMS: dict[str, list[list[int | None]]] = {  # of each file: its input, then its outputs; None is any number
    PEOPLE_FILE: [[None, 3, PEOPLE_SIDE_PX, PEOPLE_SIDE_PX], [None, _CELLS, 5 + CLASSES]],
    POSE_FILE: [
        [None, 3, POSE_HEIGHT_PX, POSE_WIDTH_PX],
        [None, LAYOUTS[LAYOUT], POSE_WIDTH_PX * BINS_A_PIXEL],
        [None, LAYOUTS[LAYOUT], POSE_HEIGHT_PX * BINS_A_PIXEL],
    ],
}


def open_onnx(folder: Path, device: str = "cpu") -> PoseFinder:
    """DWPose's two networks. device: by torch's name. Raises UserError without onnxruntime, or one for that device, and
    for files that are missing, damaged or other networks."""
    people_net, pose_net = _session(folder / PEOPLE_FILE, device), _session(folder / POSE_FILE, device)

    def find(frame_HW3: np.ndarray) -> People:
        boxes_N4, box_scores_N = find_boxes(people_net, frame_HW3)
        require_numbers(folder / PEOPLE_FILE, boxes_N4, box_scores_N)
        if not len(boxes_N4):
            return People.nobody(LAYOUT)
        found = [find_points(pose_net, frame_HW3, box_4) for box_4 in boxes_N4]
        points_NP2, scores_NP = (np.stack(parts) for parts in zip(*found, strict=True))
        require_numbers(folder / POSE_FILE, scores_NP)
        return People(points_NP2, scores_NP, boxes_N4, box_scores_N)

    files = [folder / PEOPLE_FILE, folder / POSE_FILE]
    return PoseFinder(find, LAYOUT, digest_of("pose_onnx", [VERSION, BOX_SCORE, MOST_OVERLAP], files))


def _session(path: Path, device: str) -> Any:
    """An onnxruntime session, of which one thread computes: the bits are then the same on any number of processes."""
    try:
        import onnxruntime
    except ImportError:
        rule = "poses by ONNX files need onnxruntime, which is not installed; pip install 'reeltune[pose]'"
        raise UserError("detector", rule) from None
    refuse_foreign(path, "an ONNX network of DWPose")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong is raised too
    wanted, _, number = device.partition(":")
    provider = PROVIDERS.get(wanted, "")
    if provider not in onnxruntime.get_available_providers():
        raise UserError("device", f"this onnxruntime cannot compute on {device}; install onnxruntime-gpu, or give cpu")
    placed = [(provider, {"device_id": number} if number else {})]
    with as_user_error(path, "is no ONNX network that onnxruntime reads"):
        session = onnxruntime.InferenceSession(str(path), options, providers=placed)
    expected = _FORMS[path.name]
    found = [list(one.shape) for one in (*session.get_inputs(), *session.get_outputs())]
    fits = len(found) == len(expected) and all(map(_fits, found, expected))
    refuse(
        str(path), [] if fits else [f"takes and gives {found}, not {expected}: it is another network than {path.name}"]
    )
    return session


def _fits(found: list[Any], expected: list[int | None]) -> bool:
    """Whether sizes are those; a name stands for any."""
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(n == m or m is None or not isinstance(n, int) for n, m in pairs)


def _run(session: Any, picture_HW3: np.ndarray) -> list[np.ndarray]:
    batch_BCHW = np.ascontiguousarray(picture_HW3.transpose(2, 0, 1)[None], np.float32)
    return session.run(None, {session.get_inputs()[0].name: batch_BCHW})


# ---- people


def find_boxes(people_net: Any, frame_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N 4 left, top, right, bottom in the frame's pixels; N scores), from the left."""
    picture_HW3, scale = letterbox(frame_HW3[..., ::-1])
    boxes_N4, scores_N = decode_boxes(_run(people_net, picture_HW3)[0][0].astype(np.float64))
    boxes_N4 /= scale
    kept = without_overlaps(boxes_N4, scores_N)
    boxes_N4, scores_N = boxes_N4[kept], scores_N[kept]
    order = from_left(boxes_N4)
    return boxes_N4[order], scores_N[order]


def letterbox(frame_HW3: np.ndarray) -> tuple[np.ndarray, float]:
    """(uint8 640 640 3: the frame at the upper left, on grey; by how much it was scaled)."""
    height, width = frame_HW3.shape[:2]
    scale = PEOPLE_SIDE_PX / max(height, width)
    small_HW3 = cv2.resize(frame_HW3, (max(int(width * scale), 1), max(int(height * scale), 1)))
    picture_HW3 = np.full((PEOPLE_SIDE_PX, PEOPLE_SIDE_PX, 3), GREY, np.uint8)
    picture_HW3[: small_HW3.shape[0], : small_HW3.shape[1]] = small_HW3
    return picture_HW3, scale


def decode_boxes(cells_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M 4 boxes in pixels of the network's input; M scores) of likely people, who may be there several times.

    A cell gives its box's middle as an offset from the cell's corner and the logarithm of its sides, both in strides,
    then how sure it is of anything, and of each class.
    """
    corners_N2, stride_N1 = (np.concatenate(parts) for parts in zip(*map(_grid, STRIDES_PX), strict=True))
    scores_N = cells_NC[:, 4] * cells_NC[:, 5 + PERSON]
    likely = scores_N > BOX_SCORE
    middle_M2 = (cells_NC[likely, :2] + corners_N2[likely]) * stride_N1[likely]
    half_M2 = np.exp(cells_NC[likely, 2:4]) * stride_N1[likely] / 2
    return np.concatenate([middle_M2 - half_M2, middle_M2 + half_M2], axis=1), scores_N[likely]


def _grid(stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(column and row of each cell, row by row; the stride of each)."""
    cells = PEOPLE_SIDE_PX // stride
    rows, columns = np.divmod(np.arange(cells**2), cells)
    return np.stack([columns, rows], axis=1), np.full((cells**2, 1), stride)


def without_overlaps(boxes_N4: np.ndarray, scores_N: np.ndarray) -> list[int]:
    """Places of the boxes kept: the surest, then each that overlaps none kept before by more than MOST_OVERLAP.

    Sides are counted in whole pixels, both ends included (as in YOLOX's own code).
    """
    sides_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2] + 1
    areas_N = sides_N2[:, 0] * sides_N2[:, 1]
    kept: list[int] = []
    for place in np.argsort(-scores_N, kind="stable").tolist():
        shared_K2 = np.minimum(boxes_N4[kept, 2:], boxes_N4[place, 2:]) - np.maximum(
            boxes_N4[kept, :2], boxes_N4[place, :2]
        )
        shared_K = np.maximum(shared_K2 + 1, 0).prod(axis=1)
        if (shared_K <= MOST_OVERLAP * (areas_N[kept] + areas_N[place] - shared_K)).all():
            kept.append(place)
    return kept


# ---- points


def find_points(pose_net: Any, frame_HW3: np.ndarray, box_4: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(133 2 in the frame's pixels, 133 scores) of the person in a box.

    A pixel's own number is the place of its centre in the network's columns and rows; in ours that is half a pixel on.
    """
    middle_2, size_2 = padded(box_4, POSE_WIDTH_PX / POSE_HEIGHT_PX)
    scale = POSE_WIDTH_PX / size_2[0]
    shift_2 = np.array([POSE_WIDTH_PX, POSE_HEIGHT_PX]) / 2 - scale * middle_2
    to_crop = np.array([[scale, 0, shift_2[0]], [0, scale, shift_2[1]]])
    crop_HW3 = cv2.warpAffine(frame_HW3, to_crop, (POSE_WIDTH_PX, POSE_HEIGHT_PX), flags=cv2.INTER_LINEAR)
    columns, rows = _run(pose_net, (crop_HW3 - np.array(MEAN)) / np.array(STD))
    at_P2, scores_P = decode_simcc(columns[0], rows[0])
    return (at_P2 - shift_2) / scale + 0.5, scores_P


def decode_simcc(columns_PX: np.ndarray, rows_PY: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P 2 in pixels of the crop, P scores): where each point's column and row are likeliest, and the lesser of how
    likely these are (dwpose/cv_ox_pose.py)."""
    at_P2 = np.stack([columns_PX.argmax(axis=1), rows_PY.argmax(axis=1)], axis=1) / BINS_A_PIXEL
    return at_P2, np.minimum(columns_PX.max(axis=1), rows_PY.max(axis=1)).astype(np.float64)
