"""Kinds of which every frame is a grey picture: drawn one after another.  (no torch)"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from reeltune.control.kind import Put, Source


def put_grey(source: Source, put: Put, draw: Callable[[np.ndarray], np.ndarray]) -> None:
    """Puts `draw` of every frame, in turn: uint8 H W 3 -> uint8 H W."""
    for chunk_FHW3 in source.chunks():
        drawn_FHW3 = np.empty_like(chunk_FHW3)
        for place, rgb_HW3 in enumerate(chunk_FHW3):
            cv2.cvtColor(draw(rgb_HW3), cv2.COLOR_GRAY2RGB, dst=drawn_FHW3[place])
        put(drawn_FHW3)


def change(drawn_HW: np.ndarray, before_HW: np.ndarray) -> float:
    """How far two pictures, uint8 H W, are apart: 0 to 1, the mean over pixels."""
    return cv2.norm(drawn_HW, before_HW, cv2.NORM_L1) / (255 * drawn_HW.size)
