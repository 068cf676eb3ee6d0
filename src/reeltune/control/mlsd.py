"""Straight lines: M-LSD's, white on black and one pixel wide, from the file mlsd_large_512_fp32.pth.

A frame's lines are those of the released tool (controlnet-aux's MLSDdetector): centres that no cell around them
exceeds, the MOST best, of a score above STRONG. They are found at the size that the network is shown and drawn at the
clip's, so that they are as thin whatever its size.

They stay from frame to frame by the rule that canny's have: a line of less score, above WEAK, counts where the frame
before has that line. Two are one line if the squares of their ends' distances add up to less than SAME.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional as F

from reeltune.control.device import one_thread
from reeltune.control.grey import put_grey
from reeltune.control.kind import Detector, Put, Quality, Settings, Source, digest_of, require_numbers
from reeltune.control.mlsd_net import Mlsd
from reeltune.control.released_net import SIDE_PX, open_net, planes, shown, shown_size

VERSION = 1  # raise it when the same clip gets other lines
FILES = ("mlsd_large_512_fp32.pth", "mlsd_large_512_fp32.safetensors")
MOST = 200  # lines of a frame (mlsd/utils.py)
STRONG = 0.1  # score of a line (mlsd/__init__.py, thr_v)
WEAK = STRONG / 2  # canny's ratio
LEAST_CELLS = 0.1  # length of a line (the same, thr_d); a cell is two pixels
SAME = 10 * (SIDE_PX / 128) ** 2  # square pixels: sAP10, of a picture of 128 (Zhou et al., arXiv:1905.03246, 5.2)
ENOUGH = 1.0  # length of a frame's lines in all, of its diagonal: with less there is little to follow


def open_mlsd(given: Path | None, settings: Settings) -> Detector:
    """Raises UserError for weights that are not there, or another network's."""
    net, file = open_net(Mlsd, given, FILES, settings.device)

    def detect(source: Source, put: Put) -> Quality:
        size = shown_size(source.height, source.width)
        scale_4 = np.array([source.width / size[1], source.height / size[0]] * 2)
        lengths, counts, steady = [], [], []
        before_L4 = np.empty((0, 4))

        def draw(rgb_HW3: np.ndarray) -> np.ndarray:
            nonlocal before_L4
            found_L4, scores_L = lines_of(net, shown(rgb_HW3, size), settings.device)
            require_numbers(file, found_L4, scores_L)
            again_L = _among(found_L4, before_L4)
            kept_L = (scores_L > STRONG) | again_L
            if counts and kept_L.any():
                steady.append(float(again_L[kept_L].mean()))
            before_L4 = found_L4[kept_L]
            counts.append(len(before_L4))
            lengths.append(np.hypot(*(before_L4[:, :2] - before_L4[:, 2:]).T).sum() / np.hypot(*size))
            return drawn(before_L4 * scale_4, source.height, source.width)

        put_grey(source, put, draw)
        facts = {
            "lines": float(np.mean(counts)),
            "length": float(np.mean(lengths)),
            "steady_share": float(np.mean(steady)) if steady else 1.0,
        }
        return Quality(float(np.minimum(np.array(lengths) / ENOUGH, 1).mean()), facts)

    return Detector(digest_of("mlsd", [VERSION], [file]), detect)


@one_thread()
@torch.inference_mode()
def lines_of(net: Mlsd, rgb_HW3: np.ndarray, device: str) -> tuple[np.ndarray, np.ndarray]:
    """(L 4: x and y of both ends in pixels; L scores), best first, of a picture of a size that the network takes: all
    above WEAK."""
    maps_MHW = net(planes(rgb_HW3, device))[0]
    heat_HW = maps_MHW[0].sigmoid()
    peaks_HW = heat_HW == F.max_pool2d(heat_HW[None], 3, stride=1, padding=1)[0]
    best = (heat_HW * peaks_HW).flatten().topk(min(MOST, heat_HW.numel()))
    scores_L, ends_4L = best.values.cpu().numpy(), maps_MHW[1:5].flatten(1)[:, best.indices].cpu().numpy()
    rows_L, columns_L = np.divmod(best.indices.cpu().numpy(), heat_HW.shape[1])
    length_L = np.hypot(*(ends_4L[:2] - ends_4L[2:]))
    kept_L = ~(scores_L <= WEAK) & ~(length_L <= LEAST_CELLS)  # and what is no number, for the caller to refuse
    lines_L4 = 2 * (ends_4L + np.stack([columns_L, rows_L] * 2)).T
    return lines_L4[kept_L].astype(np.float64), scores_L[kept_L]


def _among(lines_L4: np.ndarray, others_K4: np.ndarray) -> np.ndarray:
    """bool L: whether it is one of those, from whichever end they are told."""
    turned_2K4 = np.stack([others_K4, others_K4[:, [2, 3, 0, 1]]])
    apart_2LK = ((lines_L4[None, :, None] - turned_2K4[:, None]) ** 2).sum(-1)
    return (apart_2LK < SAME).any(axis=(0, 2))


def drawn(lines_L4: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 H W, 255 on lines."""
    picture_HW = np.zeros((height, width), np.uint8)
    for line in np.clip(lines_L4, -(2**14), 2**14).astype(int):  # ends far outside are of no use, and cost time
        cv2.line(picture_HW, line[:2].tolist(), line[2:].tolist(), 255)
    return picture_HW
