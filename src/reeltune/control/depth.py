"""Depth: near is white, far is black, by Depth Anything (arXiv:2401.10891, 2406.09414) or ZoeDepth (arXiv:2302.12288)
in transformers' form, from the user's folder.

One scale for a clip: black and white are the darkest and lightest parts of LOOKED_AT frames spread evenly over it, and
what other frames have beyond them is cut off. A scale of each frame's own flickers whenever something enters the
picture. The networks of relative depth give the inverse of depth, up to a scale and a shift; of metric depth the
inverse is taken, so that both read alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from reeltune.control.device import one_thread, require_device
from reeltune.control.grey import put_grey
from reeltune.control.kind import Detector, Put, Quality, Settings, Source, digest_of, require_numbers
from reeltune.core.errors import UserError
from reeltune.core.reading import as_user_error, read_table
from reeltune.families.configs import MISFIT, from_files
from reeltune.families.tensor_files import files_of
from reeltune.families.weights import load_encoder

VERSION = 1  # raise it when the same clip gets another depth
LOOKED_AT = 16  # frames, for the scale
TAILS = (0.01, 0.99)  # of their pixels that are black and white: a scale by the extremes is one by outliers
NEAREST_M = 0.1  # of metric depth: nearer counts as so near
RELIEF = 0.05  # standard deviation of a frame's depths, of a range of 1, from which on it counts in full
PADDED = 3.0  # ZoeDepth's margin: so many times the root of half a side (its preprocessor_config.json's do_pad)
Near = Callable[[np.ndarray], np.ndarray]  # uint8 H W 3 -> float32 H W, more is nearer


def open_depth(folder: Path | None, settings: Settings) -> Detector:
    """Raises UserError for a folder without such a network, or with another."""
    assert folder is not None  # `Kind.needs`
    near, files = _network(folder, settings.device)

    def detect(source: Source, put: Put) -> Quality:
        black, white = _scale(source, near)
        relief, steps, before_HW = [], [], None

        def draw(rgb_HW3: np.ndarray) -> np.ndarray:
            nonlocal before_HW
            shade_HW = np.clip((near(rgb_HW3) - black) / ((white - black) or 1.0), 0, 1)
            relief.append(float(shade_HW.std()))
            if before_HW is not None:
                steps.append(float(np.abs(shade_HW - before_HW).mean()))
            before_HW = shade_HW
            return (shade_HW * 255 + 0.5).astype(np.uint8)

        put_grey(source, put, draw)
        facts = {
            "relief": float(np.mean(relief)),
            "steady_share": 1 - float(np.mean(steps)) if steps else 1.0,
            "black": black,
            "white": white,
        }
        return Quality(float(np.minimum(np.array(relief) / RELIEF, 1).mean()), facts)

    return Detector(digest_of("depth", [VERSION, LOOKED_AT, TAILS], files), detect)


def _scale(source: Source, near: Near) -> tuple[float, float]:
    """(what is black, what is white) of the whole clip."""
    lows, highs = [], []
    for rgb_HW3 in source.spread(LOOKED_AT):
        low, high = np.quantile(near(rgb_HW3), TAILS)
        lows.append(low)
        highs.append(high)
    return float(min(lows)), float(max(highs))


def _network(folder: Path, device: str) -> tuple[Near, list[Path]]:
    """(what it makes of a frame, the files it is made of). Raises UserError."""
    import transformers

    classes: dict[str, tuple[Any, Any]] = {  # network, and what prepares its pictures, without torchvision
        "depth_anything": (transformers.DepthAnythingForDepthEstimation, transformers.DPTImageProcessorPil),
        "zoedepth": (transformers.ZoeDepthForDepthEstimation, transformers.ZoeDepthImageProcessorPil),
    }
    config_path, settings_path = folder / "config.json", folder / "preprocessor_config.json"
    remedy = "give a folder as it is downloaded from a hub, in transformers' form"
    if not folder.is_dir():
        raise UserError(str(folder), f"is no folder; {remedy}")
    model_type = read_table(config_path, remedy).get("model_type")
    if model_type not in classes:
        raise UserError(str(config_path), f"model_type is {model_type!r}; depth needs {' or '.join(classes)}; {remedy}")
    network, processor = classes[model_type]
    own = processor.__name__.removesuffix("Pil")
    named = read_table(settings_path, remedy).get("image_processor_type", own)
    if named not in (own, f"{own}Fast", f"{own}Pil"):
        raise UserError(str(settings_path), f"image_processor_type is {named!r}; {model_type} needs {own}; {remedy}")
    require_device(device)
    net = load_encoder(network, folder, torch.float32).to(device)
    with as_user_error(settings_path, "cannot be read as settings of pictures", MISFIT):
        prepare = from_files(processor, folder)
    metric = model_type == "zoedepth" or net.config.depth_estimation_type == "metric"
    margin = PADDED if model_type == "zoedepth" and prepare.do_pad else 0.0

    @one_thread()
    @torch.inference_mode()
    def near(rgb_HW3: np.ndarray) -> np.ndarray:
        pixels_BCHW = prepare(images=rgb_HW3, input_data_format="channels_last", return_tensors="pt").pixel_values
        found_HW = net(pixels_BCHW.to(device)).predicted_depth[0].float().cpu().numpy()
        require_numbers(folder, found_HW)
        if metric:
            found_HW = 1 / np.maximum(found_HW, NEAREST_M)
        height, width = rgb_HW3.shape[:2]
        down, right = (int(np.sqrt(side / 2) * margin) for side in (height, width))
        whole_HW = cv2.resize(found_HW, (width + 2 * right, height + 2 * down), interpolation=cv2.INTER_CUBIC)
        return whole_HW[down : down + height, right : right + width]

    return near, [config_path, settings_path, *files_of(folder)]
