"""Clips and pictures: measured, read, written.  (no torch)

A file is always seen as a viewer shows it: turned by its display matrix or EXIF orientation, with
square pixels, over white where it is transparent, deinterlaced, in 8-bit full-range RGB by its colour
tags or profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from reeltune.core.files import whole_path
from reeltune.core.types import Crop, Kind, Shape
from reeltune.data import clips
from reeltune.data.clip_writer import clip_written, frame_rate
from reeltune.data.clips import TIME_ROUNDING, decode, index_of, is_uneven, measure_clip, on_show
from reeltune.data.display import Displayer
from reeltune.data.findings import DecodeCheck, Measure, MediaError, content_of, require_file
from reeltune.data.keypoints import is_keypoints, read_keypoints
from reeltune.data.pictures import is_picture, measure_picture, read_picture
from reeltune.data.pose_drawing import draw_frames

__all__ = ["DecodeCheck", "Measure", "MediaError", "frames_on_show", "measure", "measure_control", "read_frames",
           "require_times", "write_clip"]  # fmt: skip

ENCODING = {"crf": "18", "preset": "medium"}  # x264's: at 18 losses are hardly seen (trac.ffmpeg.org/wiki/Encode/H.264)
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


def measure_control(path: str | Path, kind: Kind, decode_check: DecodeCheck = "ends") -> Measure:
    """What `measure` gives, of a control, which may be key points: these are of a picture if they are of one frame.
    Raises MediaError.
    """
    if not is_keypoints(path):
        return measure(path, kind, decode_check)
    keypoints = read_keypoints(path)
    empty = int((keypoints.people == 0).sum())
    notes = [f"nobody is in {empty} of its {keypoints.frames} frames, which are drawn black"] if empty else []
    kind = "video" if keypoints.frames > 1 else "image"
    size = keypoints.height, keypoints.width
    return Measure(kind, keypoints.frames, keypoints.fps, *size, tuple(notes), content_of(str(path)))


def require_times(path: str | Path, clip: str | Path) -> None:
    """Raises MediaError for key points whose frames are not shown when those of the clip are, as far as both are read;
    of other numbers of frames it says nothing."""
    keypoints = read_keypoints(path)
    try:
        times_s = index_of(str(clip)).times_s
    except MediaError:  # the clip's own trouble
        return
    if len(times_s) != keypoints.frames:
        return
    apart_s = np.abs(times_s - keypoints.times_s)
    if apart_s.max() > TIME_ROUNDING:
        first = int(np.argmax(apart_s > TIME_ROUNDING))
        raise MediaError(
            f"has frame {first} at {keypoints.times_s[first]:.3f} s, its clip at {times_s[first]:.3f} s: times differ",
            remedy="Make it again from this clip with reeltune control",
        )


def frames_on_show(path: str | Path, frames: Sequence[int], fps: float, rate: float) -> Sequence[int]:
    """Which frames are on show at the time of frames[0], and every 1 / rate s from there.

    fps: the file's mean rate, by which `frames` were numbered. Where frames are evenly spaced, they are these
    themselves. Raises MediaError.
    """
    if not is_keypoints(path):
        return clips.frames_on_show(str(path), frames, fps, rate)
    keypoints = read_keypoints(path)
    uneven = is_uneven(keypoints.times_s, 2 * TIME_ROUNDING)
    return on_show(keypoints.times_s, frames, fps, rate) if uneven else frames


def read_frames(path: str | Path, frames: Sequence[int], crop: Crop, shape: Shape) -> np.ndarray:
    """uint8 F C H W in RGB: those frames of the file (0-based, in display order, in any order, repeats allowed).

    Each is resized once to crop.height x crop.width by a Lanczos filter, then cut to `shape` at (crop.top, crop.left).
    A picture has frame 0 alone. Each frame is decoded once, and only what leads up to it. Key points are drawn at that
    size, not resized. Raises MediaError.
    """
    path = str(path)
    bottom, right = crop.top + shape.height, crop.left + shape.width
    if len(frames) != shape.frames or min(crop.top, crop.left) < 0 or bottom > crop.height or right > crop.width:
        raise ValueError(f"{len(frames)} frames cut by {crop} do not make {shape}")
    if is_keypoints(path):
        return draw_frames(read_keypoints(path), frames, crop, shape)
    require_file(path)
    out_FCHW = np.empty((shape.frames, 3, shape.height, shape.width), np.uint8)
    window = slice(crop.top, bottom), slice(crop.left, right)
    places: dict[int, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(int(frame), []).append(place)
    if is_picture(path):
        if set(places) - {0}:
            raise MediaError("is a picture, which has frame 0 alone")
        out_FCHW[:] = read_picture(path, crop)[:, *window]
        return out_FCHW
    displayer = Displayer(crop.height, crop.width)
    for rank, frame, _ in decode(path, sorted(places)):
        first, *others = places[rank]
        for channel, plane in enumerate(displayer.planes(frame)):
            out_FCHW[first, channel] = plane[window]
        out_FCHW[others] = out_FCHW[first]
    return out_FCHW


def write_clip(path: str | Path, frames_FHWC: np.ndarray, fps: float) -> None:
    """Write uint8 RGB frames as an H.264 mp4 that browsers play: yuv420p, BT.709, index first; whole or not at all.

    4:2:0 needs even sides, so an odd one is made even by repeating its last row or column.
    """
    odd_h, odd_w = (side % 2 for side in frames_FHWC.shape[1:3])
    frames_FHWC = np.pad(frames_FHWC, ((0, 0), (0, odd_h), (0, odd_w), (0, 0)), mode="edge")
    _, height, width, _ = frames_FHWC.shape
    rate = frame_rate(fps)
    with whole_path(Path(path)) as beside, clip_written(beside, height, width, rate, 1 / rate, ENCODING) as clip:
        for tick, rgb_HWC in enumerate(frames_FHWC):
            clip.add(rgb_HWC, tick)
