"""Clips and pictures: measured, read, written.  (no torch)

A file is always seen as a viewer shows it: turned by its display matrix or EXIF orientation, with
square pixels, over white where it is transparent, deinterlaced, in 8-bit full-range RGB by its colour
tags or profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from reeltune.core.files import whole_path
from reeltune.core.types import Crop, Kind, Shape
from reeltune.data.clips import decode, frames_on_show, measure_clip
from reeltune.data.display import FILTER, Displayer
from reeltune.data.findings import DecodeCheck, Measure, MediaError, content_of, require_file
from reeltune.data.pictures import is_picture, measure_picture, read_picture

__all__ = ["DecodeCheck", "Measure", "MediaError", "frames_on_show", "measure", "read_frames", "write_clip"]

MIN_SIDE = 16  # pixels: the smallest multiple that any family's heights and widths come in


def measure(path: str | Path, kind: Kind, decode_check: DecodeCheck = "ends") -> Measure:
    """Size, length and rate of a file, and whether it decodes.

    Of a clip, "header" reads every packet and decodes the first frame (which tells how it is turned), "ends" also
    decodes the last frame, "full" all of them. A picture is decoded unless the check is "header".
    Raises MediaError.
    """
    path = str(path)
    require_file(path)
    found = measure_clip(path, decode_check) if kind == "video" else measure_picture(path, decode_check)
    if min(found.height, found.width) < MIN_SIDE:
        raise MediaError(f"is too small: {found.width}x{found.height} pixels; {MIN_SIDE} a side is the least")
    try:
        return replace(found, content=content_of(path))
    except OSError as error:
        raise MediaError(f"cannot be read: {error.strerror}", lasting=False) from None


def read_frames(path: str | Path, frames: Sequence[int], crop: Crop, shape: Shape) -> np.ndarray:
    """uint8 F C H W in RGB: those frames of the file (0-based, in display order, in any order, repeats allowed).

    Each is resized once to crop.height x crop.width by a Lanczos filter, then cut to `shape` at (crop.top, crop.left).
    A picture has frame 0 alone. Each frame is decoded once, and only what leads up to it. Raises MediaError.
    """
    path = str(path)
    bottom, right = crop.top + shape.height, crop.left + shape.width
    if len(frames) != shape.frames or min(crop.top, crop.left) < 0 or bottom > crop.height or right > crop.width:
        raise ValueError(f"{len(frames)} frames cut by {crop} do not make {shape}")
    out_FCHW = np.empty((shape.frames, 3, shape.height, shape.width), np.uint8)
    window = slice(crop.top, bottom), slice(crop.left, right)
    places: dict[int, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(int(frame), []).append(place)
    if is_picture(path):
        if set(places) - {0}:
            raise ValueError(f"a picture has frame 0 alone, not {sorted(places)}: {path}")
        out_FCHW[:] = read_picture(path, crop)[:, *window]
        return out_FCHW
    displayer = Displayer(crop.height, crop.width)
    for rank, frame, _ in decode(path, sorted(places)):
        first, *others = places[rank]
        for channel, plane in enumerate(displayer.planes(frame)):
            out_FCHW[first, channel] = plane[window]
        out_FCHW[others] = out_FCHW[first]
    return out_FCHW


def write_clip(path: str | Path, frames_FHWC: np.ndarray, fps: float, *, crf: int = 18) -> None:
    """Write uint8 RGB frames as an H.264 mp4 that browsers play: yuv420p, BT.709, index first; whole or not at all.

    4:2:0 needs even sides, so an odd one is made even by repeating its last row or column.
    """
    odd_h, odd_w = (side % 2 for side in frames_FHWC.shape[1:3])
    frames_FHWC = np.pad(frames_FHWC, ((0, 0), (0, odd_h), (0, odd_w), (0, 0)), mode="edge")
    options = {"movflags": "+faststart"}
    with whole_path(Path(path)) as beside, av.open(str(beside), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "medium"}
        coder = stream.codec_context
        coder.thread_count = 1  # the same bytes on every machine
        coder.colorspace, coder.color_range = 1, ColorRange.MPEG  # 1 is BT.709 in FFmpeg's AVColorSpace
        coder.color_primaries, coder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for rgb_HWC in frames_FHWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HWC), "rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=FILTER,
                threads=1,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
