"""A file as a detector reads it, and as its control is held against.  (no torch)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reeltune.control.kind import Source, frames_a_chunk
from reeltune.core.types import Crop, Kind
from reeltune.data.clips import decode, index_of
from reeltune.data.display import Displayer
from reeltune.data.findings import MediaError
from reeltune.data.media import measure
from reeltune.data.pictures import read_picture

SAME_TIME_S = 1e-6  # ticks are carried over as they are; this is the rounding of their seconds


def source_of(path: Path, kind: Kind) -> Source:
    """A clip or picture at its displayed size. Raises MediaError."""
    found = measure(path, kind, "header")
    name, height, width = str(path), found.height, found.width
    if kind == "image":
        whole = Crop(height, width, 0, 0)
        return Source(
            height,
            width,
            np.zeros(1),
            lambda: iter([np.ascontiguousarray(read_picture(name, whole).transpose(1, 2, 0))[None]]),
        )
    return Source(height, width, index_of(name).times_s, lambda: _chunks(name, found.frames, height, width))


def _chunks(path: str, count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 F H W 3, in C's order. Each is a new array, as whoever gets it may keep it."""
    displayer, size = Displayer(height, width), frames_a_chunk(height, width)
    chunk_FHW3, held = np.empty((0, height, width, 3), np.uint8), 0
    for decoded in decode(path, range(count)):
        if held == len(chunk_FHW3):
            chunk_FHW3, held = np.empty((min(size, count - decoded.rank), height, width, 3), np.uint8), 0
        for channel, plane_HW in enumerate(displayer.planes(decoded.frame)):
            chunk_FHW3[held, :, :, channel] = plane_HW
        held += 1
        if held == len(chunk_FHW3):
            yield chunk_FHW3


def require_like(control: Path, source: Source, kind: Kind) -> None:
    """Raises MediaError for a control, just written, of other frames, times or displayed size than its source."""
    found = measure(control, kind, "ends")
    if (found.height, found.width) != (source.height, source.width):
        raise MediaError(
            f"got a control of {found.width}x{found.height} pixels, and has {source.width}x{source.height}"
        )
    times_s = np.zeros(1) if kind == "image" else index_of(str(control)).times_s
    if len(times_s) != len(source.times_s):
        raise MediaError(f"got a control of {len(times_s)} frames, and has {len(source.times_s)}")
    if np.abs(times_s - source.times_s).max() > SAME_TIME_S:
        raise MediaError("got a control whose frames are shown at other times")
