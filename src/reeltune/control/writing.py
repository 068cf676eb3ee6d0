"""A control into its file, by the form of its kind, whole or not at all.  (no torch)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from reeltune.control.kind import Detector, Form, Quality, Source
from reeltune.control.source import require_like
from reeltune.core.files import whole_file, whole_path
from reeltune.core.types import Kind as MediaKind
from reeltune.data.camera import COLUMNS
from reeltune.data.clip_writer import clip_written, frame_rate
from reeltune.data.clips import index_of
from reeltune.data.keypoints import Keypoints, write_keypoints

ENDINGS = {("pictures", "video"): ".mp4", ("pictures", "image"): ".png"}  # of others, by form alone
FORM_ENDINGS = {"keypoints": ".npz", "camera": ".txt"}
# x264's. ultrafast: lines are found again without loss, at 168 frames of 720p a second and core; veryfast has 66, in 41
# and not 70 kB a frame (measured, 2026-11-26). It has neither B frames nor mbtree: with both, 10 of 25 encodings of the
# same frames had other bytes (x264 165, of its assembler code; measured, 2026-11-26).
ENCODING = {"crf": "18", "preset": "ultrafast"}
CAMERA_HEADER = "time fx fy cx cy 0 0 world-to-camera, row by row"


def ending_of(form: Form, kind: MediaKind) -> str:
    return FORM_ENDINGS.get(form) or ENDINGS[form, kind]


def make_control(detector: Detector, form: Form, path: Path, kind: MediaKind, source: Source, control: Path) -> Quality:
    """Writes what the detector makes of the clip, and holds it against the clip. Where its quality has a reason to
    leave the clip out, no file is written, and what was there stays. Raises MediaError and CannotWriteError.
    """
    if form == "pictures" and kind == "video":
        return _write_clip(detector, path, source, control)
    made: list = []
    quality = detector.detect(source, made.append)
    if quality.reason:
        return quality
    (value,) = made
    if isinstance(value, Keypoints):
        write_keypoints(control, value)
    elif form == "camera":
        with whole_file(control) as file:
            file.write(f"{CAMERA_HEADER}\n")
            assert value.shape == (len(source.times_s), COLUMNS)
            file.writelines(" ".join(f"{number:.9g}" for number in row) + "\n" for row in value.tolist())
    else:
        with whole_path(control) as beside:
            Image.fromarray(value[0]).save(beside, "PNG")
            require_like(beside, source, kind)
    return quality


class _LeftOutError(Exception):
    def __init__(self, quality: Quality):
        self.quality = quality


def _write_clip(detector: Detector, path: Path, source: Source, control: Path) -> Quality:
    index = index_of(str(path))
    ticks = index.pts - index.pts[0]
    count, last_s = len(ticks), float(source.times_s[-1])
    rate = frame_rate((count - 1) / last_s if last_s else 1.0)
    shown = iter(ticks.tolist())
    try:
        with whole_path(control) as beside:
            with clip_written(beside, source.height, source.width, rate, index.tick_s, ENCODING) as clip:

                def put(drawn_FHW3: np.ndarray) -> None:
                    for rgb_HW3 in drawn_FHW3:
                        clip.add(rgb_HW3, next(shown))

                quality = detector.detect(source, put)
            if quality.reason:
                raise _LeftOutError(quality)
            require_like(beside, source, "video")
    except _LeftOutError as left:
        return left.quality
    return quality
