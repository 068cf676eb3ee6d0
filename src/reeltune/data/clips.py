"""Clips: opened, indexed by their packets, decoded frame by frame. PyAV's containers live here.  (no torch)"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.container
import numpy as np
from av.stream import Disposition

from reeltune.data.display import deinterlaced, is_transparent, refuse_unshown, turn_of
from reeltune.data.findings import DecodeCheck, Measure, MediaError, require_file
from reeltune.data.pictures import is_picture

EVEN_RATE = 0.1  # frame intervals may differ by this share of their median before a clip counts as uneven
SAME_RATE = 0.02  # the header's rate may differ by this share from that of the time stamps
TIME_ROUNDING = 1e-3  # s: Matroska's time stamps are whole milliseconds

# Real containers only: a playlist or a script with a clip's name could make FFmpeg open other files.
_CONTAINERS = {"format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf", "protocol_whitelist": "file"}
_NOT_CLIPS = Disposition.attached_pic | Disposition.timed_thumbnails  # cover art
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these leave transparency out


class _Clip(NamedTuple):
    container: av.container.InputContainer
    stream: av.VideoStream
    coder: av.VideoCodecContext
    streams: int  # of video in the file
    size: tuple[int, int]  # width and height, by the header


@contextmanager
def _opened(path: str, **options: str) -> Iterator[_Clip]:
    """The file and the stream that a player shows; every FFmpeg error inside is a MediaError."""
    try:
        opened = av.open(path, container_options={**_CONTAINERS, **options}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise MediaError(f"cannot be opened as a clip: {error.strerror}") from None
    try:
        with opened as container:
            streams = [s for s in container.streams.video if not s.disposition & _NOT_CLIPS]
            if not streams:
                raise MediaError("holds no video stream")
            stream = _shown(streams)
            if stream.codec_context is None:
                raise MediaError("is of a codec that cannot be decoded")
            size = stream.codec_context.width, stream.codec_context.height  # which decoding may change
            yield _Clip(container, stream, _coder(stream), len(streams), size)
    except av.FFmpegError as error:
        raise MediaError(f"does not decode: {error.strerror}") from None


def _shown(streams: Sequence[av.VideoStream]) -> av.VideoStream:
    """The default stream; where none or several are, the largest picture of these, then the first."""

    def pixels(stream: av.VideoStream) -> int:
        coder = stream.codec_context
        return coder.width * coder.height if coder is not None else 0

    return max([s for s in streams if s.disposition & Disposition.default] or streams, key=pixels)


def _coder(stream: av.VideoStream) -> av.VideoCodecContext:
    coder: Any = stream.codec_context  # `create` gives any kind in its type
    decoder = _WITH_ALPHA.get(stream.codec_context.name)
    if decoder and stream.metadata.get("alpha_mode") == "1":
        try:
            coder = av.CodecContext.create(decoder, "r")
        except av.FFmpegError:
            raise MediaError("is transparent, and this PyAV has no decoder that reads how") from None
        coder.extradata = stream.codec_context.extradata
    coder.thread_count = 1  # the loader's workers are the parallelism
    return coder


class _Index(NamedTuple):
    """The packets of a clip. Shown frame n has time stamp pts[n]; the rest is in the order of decoding."""

    pts: np.ndarray  # int64, display order
    coded_pts: np.ndarray  # int64, decoding order
    coded_key: np.ndarray  # bool, decoding order
    packets: int  # with those that an edit list hides
    tick_s: Fraction

    def start_for(self, pts: int) -> int:
        """Time stamp of the last keyframe from which the frame can be decoded.

        It comes no later in either order: a frame shown before the keyframe it follows may need the one before.
        """
        place = int(np.argmax(self.coded_pts == pts))
        keys = self.coded_pts[: place + 1][self.coded_key[: place + 1]]
        keys = keys[keys <= pts]
        return int(keys[-1]) if len(keys) else int(self.pts[0])

    @property
    def times_s(self) -> np.ndarray:
        """float64: when each frame is shown, the first at 0."""
        return (self.pts - self.pts[0]) * float(self.tick_s)

    @property
    def uneven(self) -> bool:
        return is_uneven(self.pts, 2)


def is_uneven(shown_F: np.ndarray, slack: float) -> bool:
    """Whether frames are shown at uneven times. shown_F: these times, in any unit; slack: what rounding may add to an
    interval."""
    intervals = np.diff(shown_F)
    middle = np.median(intervals) if len(intervals) > 1 else 0
    return len(intervals) > 1 and bool(np.abs(intervals - middle).max() > EVEN_RATE * middle + slack)


def _read_index(clip: _Clip) -> _Index:
    """Read every packet once: the only frame-exact way on uneven rates and start offsets."""
    pts, keys, packets = [], [], 0
    for packet in clip.container.demux(clip.stream):
        if packet.size == 0:  # the end
            continue
        packets += 1
        if packet.is_discard:  # cut away by an edit list, but perhaps needed to decode what is shown
            continue
        if packet.is_corrupt:
            raise MediaError(f"packet {packets - 1} is cut short or damaged")
        if packet.pts is None:
            raise MediaError("its packets carry no time stamps; write it again as mp4")
        pts.append(packet.pts)
        keys.append(packet.is_keyframe)
    if not pts:
        raise MediaError("holds no frames")
    coded_pts, tick_s = np.array(pts, np.int64), clip.stream.time_base
    assert tick_s is not None  # of a file that is read
    return _Index(np.unique(coded_pts), coded_pts, np.array(keys), packets, tick_s)


@functools.lru_cache(maxsize=512)
def _remembered_index(path: str, size: int, mtime_ns: int) -> _Index:
    with _opened(path) as clip:
        return _read_index(clip)


def index_of(path: str) -> _Index:
    """Raises MediaError."""
    require_file(path)
    status = os.stat(path)
    return _remembered_index(path, status.st_size, status.st_mtime_ns)


def frames_on_show(path: str, frames: Sequence[int], fps: float, rate: float) -> Sequence[int]:
    """Which frames are on show at the time of frames[0], and every 1 / rate s from there.

    fps: the clip's mean rate, by which `frames` were numbered. Where frames are evenly spaced, they are these
    themselves. Raises MediaError.
    """
    index = index_of(path)
    return on_show(index.times_s, frames, fps, rate) if index.uneven else frames


def on_show(times_s: np.ndarray, frames: Sequence[int], fps: float, rate: float) -> list[int]:
    """What `frames_on_show` gives, of frames that are shown from those times on."""
    wanted_s = frames[0] / fps + np.arange(len(frames)) / rate
    return (np.searchsorted(times_s, wanted_s + TIME_ROUNDING, side="right") - 1).tolist()


class Decoded(NamedTuple):
    rank: int  # in display order
    frame: av.VideoFrame
    interlaced: bool  # as stored; the frame is not


def decode(path: str, ranks: Sequence[int]) -> Iterator[Decoded]:
    """The frames of the ranks asked for, which ascend; each once, in display order. Raises MediaError."""
    index = index_of(path)
    if ranks[-1] >= len(index.pts):
        raise MediaError(f"has {len(index.pts)} frames, so no frame {ranks[-1]}")
    wanted = {int(index.pts[rank]): rank for rank in ranks}
    from_start = by_field = False
    while wanted:
        for frame, interlaced in _decode_wanted(path, index, wanted, from_start, by_field):
            if frame.interlaced_frame and not by_field:  # once more, with the frames beside each
                by_field = True
                break
            assert frame.pts is not None  # or it would not be one of them
            yield Decoded(wanted.pop(frame.pts), frame, interlaced)
        else:
            if from_start and wanted:
                raise MediaError(f"does not decode: frame {min(wanted.values())} is missing")
            from_start = True  # some containers seek past the keyframe asked for


def _decode_wanted(
    path: str, index: _Index, wanted: dict[int, int], from_start: bool, by_field: bool
) -> Iterator[tuple[av.VideoFrame, bool]]:
    """(frame, whether it was interlaced) of the wanted time stamps; by field, it is so no more."""
    first = int(index.pts[max(min(wanted.values()) - by_field, 0)])
    start = int(index.pts[0]) if from_start else index.start_for(first)
    with _opened(path) as clip:
        if not from_start:
            clip.container.seek(start, stream=clip.stream)
        frames = _frames(clip, start, () if by_field else wanted)
        size = None
        for before, frame, after in _with_neighbours(frames) if by_field else ((None, f, None) for f in frames):
            if frame.pts not in wanted:
                continue
            if size is None:
                size = _check_size(path, clip, frame, wanted[frame.pts])
            elif (frame.width, frame.height) != size:
                raise _size_changes(path, size, wanted[frame.pts])
            interlaced = bool(by_field and frame.interlaced_frame)
            if interlaced:
                if before is None and wanted[frame.pts] > 0:
                    continue  # the seek came too late
                same_size = [f if f is not None and (f.width, f.height) == size else None for f in (before, after)]
                frame = deinterlaced(same_size[0], frame, same_size[1], clip.stream.time_base)
            yield frame, interlaced
            if not wanted:
                return


def _frames(clip: _Clip, start: int, only: Sequence[int] | dict[int, int]) -> Iterator[av.VideoFrame]:
    """Frames as they are decoded. only: time stamps, beside which a frame that no other refers to may be left out."""
    # Such a frame costs nothing if it is not wanted. H.264 marks those for certain; elsewhere the mark may hold for
    # one temporal layer only.
    skip = clip.coder.name == "h264" and bool(only)
    for packet in clip.container.demux(clip.stream):
        if skip:
            useful = packet.size == 0 or packet.pts in only
            clip.coder.skip_frame = "DEFAULT" if useful else "NONREF"
        for frame in clip.coder.decode(packet):
            if frame.is_corrupt and frame.pts is not None and frame.pts >= start:
                raise MediaError(f"is damaged at {float(frame.pts * (clip.stream.time_base or 0)):.2f} s")
            yield frame


def _with_neighbours(frames: Iterator[av.VideoFrame]) -> Iterator[tuple]:
    """(the frame before, the frame, the frame after) of each; None where there is none."""
    before = frame = None
    for after in frames:
        if frame is not None:
            yield before, frame, after
        before, frame = frame, after
    if frame is not None:
        yield before, frame, None


def _check_size(path: str, clip: _Clip, frame: av.VideoFrame, rank: int) -> tuple[int, int]:
    """The frame's width and height. Raises MediaError if the clip's first frame has others."""
    size = frame.width, frame.height
    if rank and size != clip.size:  # the header may be wrong: the first frame tells
        first = _size_of(path, 0)
        if first != size:
            raise _size_changes(path, first, rank)
    return size


def _size_of(path: str, rank: int) -> tuple[int, int]:
    (decoded,) = decode(path, [rank])
    return decoded.frame.width, decoded.frame.height


def _size_changes(path: str, first: tuple[int, int], other: int) -> MediaError:
    """Says where: between frame 0, of size `first`, and frame `other`, of another."""
    index = index_of(path)
    with _opened(path) as clip:
        sizes = {f.pts: (f.width, f.height) for f in _frames(clip, int(index.pts[0]), ())}
    at = next((n for n in range(other) if sizes.get(int(index.pts[n]), first) != first), other)
    width, height = sizes.get(int(index.pts[at]), first)
    return MediaError(
        f"changes its size: {first[0]}x{first[1]} pixels at first, {width}x{height} from frame {at} on",
        remedy="Cut it in two, or write it again in one size",
    )


def measure_clip(path: str, decode_check: DecodeCheck) -> Measure:
    """Raises MediaError."""
    if is_picture(path):
        raise MediaError("is a picture, not a clip")
    with _opened(path) as clip:
        promised, rate, streams = clip.stream.frames, clip.stream.average_rate, clip.streams
        sar = clip.stream.sample_aspect_ratio or Fraction(1)
    index = index_of(path)
    count = len(index.pts)
    if index.packets < promised and (packets := _packets_without_edits(path)) < promised:
        raise MediaError(f"is cut short: it holds {packets} of the {promised} frames that its header promises")
    first = next(decode(path, [0]))
    interlaced = first.interlaced
    others = {"header": range(0), "ends": range(count - 1, count), "full": range(count)}[decode_check]
    for decoded in decode(path, others) if others else ():
        refuse_unshown(decoded.frame)
        interlaced |= decoded.interlaced
    refuse_unshown(first.frame)
    notes = list(_notes(index, streams, interlaced, is_transparent(first.frame)))
    if count > 1 and _by_times(index, rate):
        rate = (count - 1) / index.times_s[-1]
    height, width = first.frame.height, round(first.frame.width * sar)
    if width != first.frame.width:
        notes.append("its pixels are not square, and are made so")
    if turn_of(first.frame).transposed:
        height, width = width, height
    return Measure("video", count, float(rate or 0), height, width, tuple(notes))


def _packets_without_edits(path: str) -> int:
    """How many the file holds, also where an edit list leaves whole stretches out."""
    with _opened(path, ignore_editlist="1") as clip:
        return sum(packet.size > 0 for packet in clip.container.demux(clip.stream))


def _by_times(index: _Index, rate: Fraction | None) -> bool:
    """Whether the time stamps tell the rate, and not the header: of a clip of uneven rate, or one that was trimmed."""
    shown = (len(index.pts) - 1) / index.times_s[-1]
    return index.uneven or not rate or abs(float(rate) / shown - 1) > SAME_RATE


def _notes(index: _Index, streams: int, interlaced: bool, transparent: bool) -> Iterator[str]:
    if index.uneven:
        seconds = np.diff(index.times_s)
        slow, fast = (f"{rate:.0f}" if rate >= 1 else "less than 1" for rate in (1 / seconds.max(), 1 / seconds.min()))
        yield (
            f"its frames are unevenly spaced in time, at {slow} to {fast} a second: video_sample_stride takes them by "
            "number, video_sample_fps by time"
        )
    if streams > 1:
        yield "it holds several video streams; the default one is used, or else the largest"
    if interlaced:
        yield "its frames are interlaced, and are deinterlaced"
    if transparent:
        yield "it is transparent in parts, and is laid over white"
