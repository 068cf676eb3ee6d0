"""Soft edges: HED's, white on black, from the file ControlNetHED.pth.

A frame is brought to the size that the released tool shows the network (`released_net`), and the map of edges to the
clip's. Nothing is carried from frame to frame: the map is no choice between line and none, which could flicker, but
grey, and changes as little as the picture does; a mean over time would draw a trail behind what moves.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch

from reeltune.control.device import one_thread
from reeltune.control.grey import change, put_grey
from reeltune.control.hed_net import Hed
from reeltune.control.kind import Detector, Put, Quality, Settings, Source, digest_of, require_numbers
from reeltune.control.released_net import open_net, planes, shown, shown_size

VERSION = 1  # raise it when the same clip gets other edges
FILES = ("ControlNetHED.pth", "ControlNetHED.safetensors")
EDGE = 128  # of 255: an edge rather than none
ENOUGH = 0.005  # of a frame's pixels on edges, as of canny: with fewer there is little to follow
NOISE = 0.5  # of them: what is mostly edges has nothing to follow either (chosen, not measured on released weights)


def open_hed(given: Path | None, settings: Settings) -> Detector:
    """Raises UserError for weights that are not there, or another network's."""
    net, file = open_net(Hed, given, FILES, settings.device)

    def detect(source: Source, put: Put) -> Quality:
        size, shares, steps = shown_size(source.height, source.width), [], []
        before_HW = None

        def grey(rgb_HW3: np.ndarray) -> np.ndarray:
            nonlocal before_HW
            edges_HW = edges_of(net, shown(rgb_HW3, size), settings.device)
            require_numbers(file, edges_HW)
            drawn_HW = to_size(edges_HW, source.height, source.width).astype(np.uint8)
            shares.append(float((drawn_HW >= EDGE).mean()))
            if before_HW is not None:
                steps.append(change(drawn_HW, before_HW))
            before_HW = drawn_HW
            return drawn_HW

        put_grey(source, put, grey)
        facts = {"edges_share": float(np.mean(shares)), "steady_share": 1 - float(np.mean(steps)) if steps else 1.0}
        return Quality(score_of(np.array(shares)), facts)

    return Detector(digest_of("hed", [VERSION], [file]), detect)


def score_of(shares_F: np.ndarray) -> float:
    """How much there is to follow, 0 to 1, by the share of each frame's pixels that are on edges."""
    return float(np.where(shares_F > NOISE, 0.0, np.minimum(shares_F / ENOUGH, 1.0)).mean())


@one_thread()
@torch.inference_mode()
def edges_of(net: Hed, rgb_HW3: np.ndarray, device: str) -> np.ndarray:
    """float32 H W, 0 to 255: how much each pixel is an edge, of a picture of a size that the network takes."""
    return (net(planes(rgb_HW3, device)).sigmoid() * 255)[0, 0].cpu().numpy()


def to_size(edges_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """Edges, as `edges_of` gives them, brought to that size."""
    grows = height > edges_HW.shape[0]
    resized_HW = cv2.resize(edges_HW, (width, height), interpolation=cv2.INTER_LINEAR if grows else cv2.INTER_AREA)
    return np.clip(resized_HW, 0, 255)
