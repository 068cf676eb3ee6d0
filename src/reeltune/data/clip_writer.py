"""A clip written frame by frame.  (no torch)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import av.container
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from reeltune.data.display import FILTER

LARGEST = 1001  # denominator of a rate, that of NTSC's
MOST_FPS = 1000.0


def frame_rate(fps: float) -> Fraction:
    """The nearest rate that clips are written with. Frames may be hours apart, or told in another unit than seconds."""
    return max(Fraction(min(fps, MOST_FPS)).limit_denominator(LARGEST), Fraction(1, LARGEST))


class ClipWriter:
    """H.264 in mp4, which browsers play: 4:2:0 with even sides, 4:4:4 with odd ones; BT.709, index first."""

    def __init__(
        self,
        container: av.container.OutputContainer,
        height: int,
        width: int,
        rate: Fraction,
        tick_s: Fraction,
        options: Mapping[str, str],
    ):
        self.container, self.stream = container, container.add_stream("libx264", rate=rate)
        self.stream.height, self.stream.width = height, width
        self.format = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        self.stream.pix_fmt = self.format
        # Otherwise x264's lookahead (mbtree) runs code of this CPU's that reads memory which nobody wrote: of 250 calls
        # with equal frames it made 6 files, with this one (measured, 2026-11-26).
        self.stream.options = {"x264-params": "cpu-independent=1", **options}
        coder = self.stream.codec_context
        coder.time_base = self.stream.time_base = tick_s
        coder.thread_count = 1  # the same bytes on every machine
        coder.colorspace, coder.color_range = 1, ColorRange.MPEG  # 1 is BT.709 in FFmpeg's AVColorSpace
        coder.color_primaries, coder.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self.tick_s = tick_s

    def add(self, rgb_HW3: np.ndarray, tick: int) -> None:
        """uint8; tick: when it is shown."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HW3), "rgb24").reformat(
            format=self.format,
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=FILTER,
            threads=1,
        )
        frame.pts, frame.time_base = tick, self.tick_s
        self.container.mux(self.stream.encode(frame))


@contextmanager
def clip_written(
    path: Path, height: int, width: int, rate: Fraction, tick_s: Fraction, options: Mapping[str, str]
) -> Iterator[ClipWriter]:
    """Within, frames are added; at its end the clip is whole. rate: frames a second; tick_s: what ticks count; options:
    x264's, by their names in FFmpeg."""
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        writer = ClipWriter(container, height, width, rate, tick_s, options)
        yield writer
        container.mux(writer.stream.encode())
