"""Posters of clips and pictures, and key points as the clip that is drawn of them: made once, small, and as the reader
shows them.  (no torch)"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path

import av
import numpy as np
from PIL import Image

from reeltune.core.files import whole_file, whole_path
from reeltune.core.types import Crop
from reeltune.data.clip_writer import clip_written, frame_rate
from reeltune.data.display import Displayer, turn_of
from reeltune.data.findings import MediaError
from reeltune.data.keypoints import is_keypoints, read_keypoints
from reeltune.data.pictures import is_picture, opened, read_picture
from reeltune.data.pose_drawing import draw_people

SIDE = 320  # pixels of the longer side
QUALITY = 80
MOST_DRAWN = 1000  # frames of key points
_at_once = threading.Semaphore(4)  # decoders


def poster(path: Path, store: Path) -> Path:
    """A JPEG of the first frame, in `store`, named by the file and its time of change. Raises MediaError."""
    made = store / "posters" / f"{_known_by(path)}.jpg"
    if not made.exists():
        with _at_once:
            if is_keypoints(path):
                rgb_HWC = _people(path, 0)
            else:
                rgb_HWC = _picture(path) if is_picture(str(path)) else _first_frame(path)
        data = io.BytesIO()
        Image.fromarray(rgb_HWC).save(data, "JPEG", quality=QUALITY)
        with whole_file(made, "wb") as file:
            file.write(data.getvalue())
    return made


def drawn_clip(path: Path, store: Path) -> Path:
    """Key points as a clip, the first MOST_DRAWN frames of it, in `store` as posters are. Raises MediaError."""
    made, keypoints = store / "posters" / f"{_known_by(path)}.mp4", read_keypoints(path)
    if not made.exists():
        rate = frame_rate(keypoints.fps or 1)
        height, width = (side + side % 2 for side in fitted(keypoints.height, keypoints.width))  # 4:2:0
        with _at_once, whole_path(made) as beside, clip_written(beside, height, width, rate, 1 / rate, {}) as clip:
            for i in range(min(keypoints.frames, MOST_DRAWN)):
                clip.add(draw_people(keypoints.frame(i, height, width), height, width), i)
    return made


def _known_by(path: Path) -> str:
    """Another name for other bytes."""
    status = path.stat()
    told = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{SIDE}"
    return hashlib.blake2b(os.fsencode(told), digest_size=12).hexdigest()


def _people(path: Path, frame: int) -> np.ndarray:
    keypoints = read_keypoints(path)
    size = fitted(keypoints.height, keypoints.width)
    return draw_people(keypoints.frame(frame, *size), *size)


def fitted(height: int, width: int) -> tuple[int, int]:
    """The size whose longer side is SIDE, or the size itself if it is smaller."""
    factor = min(1.0, SIDE / max(height, width))
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _picture(path: Path) -> np.ndarray:
    with opened(str(path)) as stored:
        width, height = stored.size
        if stored.getexif().get(0x0112, 1) >= 5:  # EXIF Orientation: 5 to 8 exchange the sides
            width, height = height, width
    small = fitted(height, width)
    return np.ascontiguousarray(read_picture(str(path), Crop(*small, 0, 0)).transpose(1, 2, 0))


def _first_frame(path: Path) -> np.ndarray:
    """The first that decodes; unlike the reader's it is found without reading the whole file."""
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            aspect = container.streams.video[0].sample_aspect_ratio or 1
            height, width = frame.height, round(frame.width * aspect)
            if turn_of(frame).transposed:
                height, width = width, height
            return np.stack(Displayer(*fitted(height, width)).planes(frame), axis=-1)
    except (av.FFmpegError, StopIteration, IndexError) as error:
        raise MediaError(f"does not decode: {error}") from None
