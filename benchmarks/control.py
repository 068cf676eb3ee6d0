"""Edges of 720p clips: frames per second and core, beside decoding alone and OpenCV's Canny alone.

One process, its CPU time. Edges take their thresholds by the clip, so that its frames are read twice; what that takes
counts as reading. The file is what the stage does in all: reading twice, drawing, encoding, checking.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from benchmarks.data_read import CLIP_FRAMES, make
from reeltune.control.canny import open_canny
from reeltune.control.kind import Settings, Source
from reeltune.control.source import source_of
from reeltune.control.writing import make_control

ROUNDS = 3


def best(act: Callable[[], object]) -> float:
    """Frames per second of CPU time."""
    seconds = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        act()
        seconds.append(time.process_time() - begin)
    return CLIP_FRAMES / min(seconds)


def main() -> dict[str, float]:
    cv2.setNumThreads(1)
    detector = open_canny(Settings())
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "clip.mp4")
        make(path, 0)
        source = source_of(path, "video")
        frames_FHW3 = np.concatenate(list(source.chunks()))
        held = Source.of(frames_FHW3, 24)
        quality = detector.detect(held, lambda chunk: None)
        low, high = quality.facts["low"], quality.facts["high"]
        decoded = best(lambda: sum(len(chunk) for chunk in source.chunks()))
        drawn = best(lambda: detector.detect(held, lambda chunk: None))
        opencv = best(lambda: [cv2.Canny(frame, low, high) for frame in frames_FHW3])
        written = best(lambda: make_control(detector, "pictures", path, "video", source, Path(name, "control.mp4")))
    print(
        f"edges at 720p, frames/s and core: decode alone {decoded:.0f}, OpenCV's Canny alone {opencv:.0f}, ours "
        f"{drawn:.0f}, the file in all {written:.0f}; lines on {quality.facts['lines_share']:.1%} of the pixels"
    )
    return {
        "control_canny_per_core": drawn,
        "control_canny_ratio": drawn / opencv,
        "control_decode_per_core": decoded,
        "control_file_per_core": written,
    }


if __name__ == "__main__":
    main()
