"""Posters of clips and pictures: made once, small, and as the reader shows them.  (no torch)"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from pathlib import Path

import av
import numpy as np
from PIL import Image

from reeltune.core.files import whole_file
from reeltune.core.types import Crop
from reeltune.data.display import Displayer, turn_of
from reeltune.data.findings import MediaError
from reeltune.data.pictures import is_picture, opened, read_picture

SIDE = 320  # pixels of the longer side
QUALITY = 80
_at_once = threading.Semaphore(4)  # decoders


def poster(path: Path, store: Path) -> Path:
    """A JPEG of the first frame, in `store`, named by the file and its time of change. Raises MediaError."""
    status = path.stat()
    known_by = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{SIDE}"
    made = store / "posters" / f"{hashlib.blake2b(os.fsencode(known_by), digest_size=12).hexdigest()}.jpg"
    if not made.exists():
        with _at_once:
            rgb_HWC = _picture(path) if is_picture(str(path)) else _first_frame(path)
        data = io.BytesIO()
        Image.fromarray(rgb_HWC).save(data, "JPEG", quality=QUALITY)
        with whole_file(made, "wb") as file:
            file.write(data.getvalue())
    return made


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
