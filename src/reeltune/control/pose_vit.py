"""Poses by transformers' RT-DETR (arXiv:2304.08069), which finds people, and ViTPose (arXiv:2204.12484), which finds
their points, from the user's folder.

ViTPose's coordinates are those of unbiased data processing (arXiv:1911.07524): a crop of w pixels reaches from the
centre of its first column to that of its last. Its peaks are refined as DARK does (arXiv:1910.06278). transformers' own
pre- and post-processing of ViTPose needs SciPy, which nothing else here does; tests hold ours against it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from reeltune.control.device import one_thread, require_device
from reeltune.control.kind import digest_of, require_numbers
from reeltune.control.pose_finder import BOX_SCORE, MEAN, STD, PoseFinder, from_left, padded
from reeltune.core.errors import UserError
from reeltune.core.reading import read_table
from reeltune.data.keypoints import LAYOUTS, People
from reeltune.families.tensor_files import files_of
from reeltune.families.weights import load_encoder

VERSION = 1  # raise it when the same networks find otherwise
PEOPLE_MODEL, POSE_MODEL = "rt_detr", "vitpose"  # model_type of their config.json
PEOPLE_SIDE_PX = 640  # of RT-DETR's input, whatever the frame's aspect (its preprocessor_config.json)
COCO_EXPERT = 0  # of ViTPose+'s datasets (arXiv:2212.04246)
BLUR_PX, BLUR_SIGMA = 11, 0.8  # of a heat map before its peak is refined (transformers' ViTPose, kernel_size)
HEAT = (0.001, 50.0)  # to which it is limited before its logarithm is taken (the same)


def open_vit(folder: Path, device: str) -> PoseFinder:
    """RT-DETR and ViTPose. folder: with a folder of each network in transformers' form. Raises UserError."""
    from transformers import RTDetrForObjectDetection, VitPoseForPoseEstimation

    where = _folders(folder)
    require_device(device)
    people_net = load_encoder(RTDetrForObjectDetection, where[PEOPLE_MODEL], torch.float32).to(device)
    pose_net = load_encoder(VitPoseForPoseEstimation, where[POSE_MODEL], torch.float32).to(device)
    person = _person(people_net.config, where[PEOPLE_MODEL])
    layout = _layout(pose_net.config, where[POSE_MODEL])

    @one_thread()
    def find(frame_HW3: np.ndarray) -> People:
        boxes_N4, box_scores_N = find_boxes(people_net, frame_HW3, person, device)
        require_numbers(where[PEOPLE_MODEL], boxes_N4, box_scores_N)
        if not len(boxes_N4):
            return People.nobody(layout)
        points_NP2, scores_NP = find_points(pose_net, frame_HW3, boxes_N4, device)
        require_numbers(where[POSE_MODEL], points_NP2, scores_NP)
        return People(points_NP2, scores_NP, boxes_N4, box_scores_N)

    files = [file for path in where.values() for file in (path / "config.json", *files_of(path))]
    return PoseFinder(find, layout, digest_of("pose_vit", [VERSION, BOX_SCORE], files))


def _folders(folder: Path) -> dict[str, Path]:
    """Each network's folder, by the config.json there. Raises UserError."""
    found: dict[str, Path] = {}
    for config in sorted(folder.glob("*/config.json")):
        found.setdefault(str(read_table(config).get("model_type")), config.parent)
    missing = [name for name in (PEOPLE_MODEL, POSE_MODEL) if name not in found]
    if missing:
        there = ", ".join(f"{path.name} ({name})" for name, path in found.items()) or "none"
        raise UserError(
            str(folder),
            f"has no folder with a config.json of model_type {' or '.join(missing)}; those there: {there}. Put "
            "RT-DETR and ViTPose there, a folder each, as they are downloaded",
        )
    return {name: found[name] for name in (PEOPLE_MODEL, POSE_MODEL)}


def _person(config: Any, folder: Path) -> int:
    labels = [number for number, label in config.id2label.items() if label == "person"]
    if not labels:
        raise UserError(
            str(folder), "knows no class `person` (id2label of config.json); give a network trained on COCO"
        )
    return int(labels[0])


def _layout(config: Any, folder: Path) -> str:
    counts = {count: layout for layout, count in LAYOUTS.items()}
    if config.num_labels not in counts:
        rule = " or ".join(f"{count} ({layout})" for count, layout in counts.items())
        raise UserError(str(folder), f"finds {config.num_labels} points a person; expected {rule}")
    return counts[config.num_labels]


# ---- people


def find_boxes(people_net: Any, frame_HW3: np.ndarray, person: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(N 4 left, top, right, bottom in the frame's pixels; N scores), from the left."""
    height, width = frame_HW3.shape[:2]
    square = Image.fromarray(frame_HW3).resize((PEOPLE_SIDE_PX, PEOPLE_SIDE_PX), Image.Resampling.BILINEAR)
    pixels_BCHW = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].to(device) / 255
    with torch.inference_mode():
        found = people_net(pixel_values=pixels_BCHW)
    scores_N = found.logits[0, :, person].sigmoid().double().cpu().numpy()
    middle_and_size_N4 = found.pred_boxes[0].double().cpu().numpy()[scores_N > BOX_SCORE]  # shares of the frame
    scores_N = scores_N[scores_N > BOX_SCORE]
    middle_N2, half_N2 = middle_and_size_N4[:, :2], middle_and_size_N4[:, 2:] / 2
    boxes_N4 = np.concatenate([middle_N2 - half_N2, middle_N2 + half_N2], axis=1) * [width, height, width, height]
    order = from_left(boxes_N4)
    return boxes_N4[order], scores_N[order]


# ---- points


def find_points(
    pose_net: Any, frame_HW3: np.ndarray, boxes_N4: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """(N P 2 in the frame's pixels, N P scores) of the people in boxes. A pixel's number is taken for its centre."""
    height, width = pose_net.config.backbone_config.image_size
    corners_and_sizes = [_window(box_4, width / height) for box_4 in boxes_N4]
    crops = [crop_of(frame_HW3, *window, height, width) for window in corners_and_sizes]
    pixels_NCHW = torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32)).to(device)
    experts = {}
    if getattr(pose_net.config.backbone_config, "num_experts", 1) > 1:
        experts["dataset_index"] = torch.full((len(crops),), COCO_EXPERT, device=device)
    with torch.inference_mode():
        heat_NPhw = pose_net(pixel_values=pixels_NCHW, **experts).heatmaps.float().cpu().numpy()
    at_NP2, scores_NP = decode_heat(heat_NPhw)
    last_2 = np.array(heat_NPhw.shape[:1:-1]) - 1  # number of the last column, and of the last row
    corner_N2, size_N2 = (np.stack(parts) for parts in zip(*corners_and_sizes, strict=True))
    return at_NP2 / last_2 * size_N2[:, None] + corner_N2[:, None] + 0.5, scores_NP


def _window(box_4: np.ndarray, aspect: float) -> tuple[np.ndarray, np.ndarray]:
    """(upper left corner, width and height) of what is looked at of the frame."""
    middle_2, size_2 = padded(box_4, aspect)
    return middle_2 - size_2 / 2, size_2


def crop_of(frame_HW3: np.ndarray, corner_2: np.ndarray, size_2: np.ndarray, height: int, width: int) -> np.ndarray:
    """float H W 3, normalised."""
    across, down = np.array([width - 1, height - 1]) / size_2
    to_crop = np.array([[across, 0, -across * corner_2[0]], [0, down, -down * corner_2[1]]])
    return (cv2.warpAffine(frame_HW3, to_crop, (width, height), flags=cv2.INTER_LINEAR) - np.array(MEAN)) / np.array(
        STD
    )


def decode_heat(heat_NPhw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N P 2 column and row, N P scores) of each heat map's peak: the greatest cell, then one step of Newton's method
    towards the top of the blurred map's logarithm, which a Gaussian peak has exactly there."""
    N, P, _, w = heat_NPhw.shape
    peaks_NP = heat_NPhw.reshape(N, P, -1).argmax(axis=-1)
    at_NP2 = np.stack([peaks_NP % w, peaks_NP // w], axis=-1).astype(np.float64)
    for n, p in np.ndindex(N, P):
        blurred_hw = cv2.GaussianBlur(heat_NPhw[n, p], (BLUR_PX, BLUR_PX), BLUR_SIGMA, borderType=cv2.BORDER_REFLECT)
        log_hw = np.pad(np.log(np.clip(blurred_hw, *HEAT).astype(np.float64)), 1, mode="edge")
        column, row = at_NP2[n, p].astype(int) + 1
        at_NP2[n, p] -= _newton_step(log_hw[row - 1 : row + 2, column - 1 : column + 2])
    return at_NP2, heat_NPhw.max(axis=(-2, -1)).astype(np.float64)


def _newton_step(near_33: np.ndarray) -> np.ndarray:
    """(across, down): the inverse of the second derivatives times the first, by differences; 0 where it is flat."""
    (a, b, _), (d, e, f), (_, h, i) = near_33
    slope_2 = np.array([f - d, h - b]) / 2
    mixed = (a - b - d + 2 * e - f - h + i) / 2
    curves_22 = np.array([[f - 2 * e + d, mixed], [mixed, h - 2 * e + b]]) + np.finfo(np.float32).eps * np.eye(2)
    return np.linalg.lstsq(curves_22, slope_2, rcond=None)[0]
