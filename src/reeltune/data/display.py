"""A decoded frame of a clip, as a viewer shows it: turned, deinterlaced, over white, in BT.709 colours.  (no torch)"""

from __future__ import annotations

from typing import Any, NamedTuple

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc, Interpolation, VideoReformatter

from reeltune.core.errors import UserError
from reeltune.data.findings import MediaError

# Lanczos aliases least of swscale's filters (zone plate at 4x down: rmse 0.5, bicubic 3.3, area 13.7; measured,
# 2026-11), and planar output is the fastest (0.84 ms against 1.37 for packed RGB, 720p to 256; measured, 2026-11).
FILTER = Interpolation.LANCZOS | Interpolation.ACCURATE_RND

# Light that an 8-bit picture for a plain screen has no room for, by transfer function (ITU-T H.273, table 3).
_UNSHOWN: dict[int, str] = {
    ColorTrc.LINEAR: "has linear light",
    ColorTrc.LOG: "has logarithmic light",
    ColorTrc.LOG_SQRT: "has logarithmic light",
    ColorTrc.SMPTE2084: "is HDR (PQ)",
    ColorTrc.SMPTE428: "has the colours of a cinema file (SMPTE ST 428)",
    ColorTrc.ARIB_STD_B67: "is HDR (HLG)",
}
_TO_BT709: dict[
    int, list[list[float]]
] = {  # linear RGB of wider primaries -> that of BT.709 (ITU-R BT.2087; SMPTE EG 432-1, D65)
    ColorPrimaries.BT2020: [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    ColorPrimaries.SMPTE432: [[1.2249, -0.2249, 0.0], [-0.0421, 1.0421, 0.0], [-0.0196, -0.0786, 1.0983]],
}
_GAMMA = 2.4  # of a plain screen (ITU-R BT.1886)
_LINEAR = (np.arange(256) / 255.0).astype(np.float32) ** _GAMMA
MOST_PIXELS = (2**31 - 1) // 8  # av_image_check_size2 of FFmpeg 8: sides with 128 pixels more each


class _Turn(NamedTuple):
    """How coded rows and columns become displayed ones: transpose, then flip."""

    transposed: bool
    flip_rows: bool
    flip_columns: bool

    def apply(self, plane: np.ndarray) -> np.ndarray:
        plane = plane.T if self.transposed else plane
        return plane[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def turn_of(frame: av.VideoFrame) -> _Turn:
    """The display matrix [[a, b], [c, d]] sends coded (x, y) to (ax + cy, bx + dy); FFmpeg, libavutil/display.h."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _Turn(False, False, False)
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return _Turn(True, b < 0, c < 0)
    return _Turn(False, d < 0, a < 0)


def refuse_unshown(frame: av.VideoFrame) -> None:
    """Raises MediaError for a frame whose light is not that of a plain screen: tools that make it so differ by a tenth
    of the range, so that the choice of look is the user's."""
    if (light := _UNSHOWN.get(frame.color_trc)) is not None:
        raise MediaError(
            f"{light}, and would be read in false colours",
            remedy="Write it as SDR in BT.709 (docs/data.md has a command), or correct its tags if they are wrong",
        )


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether something lies under it."""
    return _may_be_transparent(frame) and bool((_planes(frame.reformat(format="gbrap"))[3] < 255).any())


def _may_be_transparent(frame: av.VideoFrame) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def refuse_unmade(height: int, width: int) -> None:
    """Raises UserError for more pixels than FFmpeg makes frames of."""
    if (width + 128) * (height + 128) >= MOST_PIXELS:
        told = f"{width} x {height} pixels are asked of a frame, more than FFmpeg makes; lower the sample sizes"
        raise UserError("recipe", told)


class Displayer:
    """Frames of one clip to a height and width, each resized once."""

    def __init__(self, height: int, width: int):
        """Pixels, as displayed. Raises as `refuse_unmade`."""
        refuse_unmade(height, width)
        self.height, self.width = height, width
        self._resize, self._uncover = VideoReformatter(), VideoReformatter()

    def planes(self, frame: av.VideoFrame) -> list[np.ndarray]:
        """uint8 H W of red, green and blue, which belong to the frame. Raises MediaError for HDR."""
        refuse_unshown(frame)
        turn = turn_of(frame)
        height, width = (self.width, self.height) if turn.transposed else (self.height, self.width)
        wide = _TO_BT709.get(frame.color_primaries)
        if _may_be_transparent(frame):
            frame = self._over_white(frame)
        planar = self._resize.reformat(frame, width, height, "gbrp", interpolation=FILTER, threads=1)
        green, blue, red = _planes(planar)
        planes = [red, green, blue] if wide is None else _narrowed([red, green, blue], wide)
        return [turn.apply(plane) for plane in planes]

    def _over_white(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame over white, at full size, so that what lies under transparent parts does not bleed out of them."""
        covered = self._uncover.reformat(frame, format="gbrap", interpolation=FILTER, threads=1)
        green, blue, red, alpha = (plane.astype(np.int32) for plane in _planes(covered))
        rgb_HWC = np.stack([red, green, blue], axis=-1)
        alpha_HW1 = alpha[..., None]
        rgb_HWC = (rgb_HWC * alpha_HW1 + 255 * (255 - alpha_HW1) + 127) // 255
        return av.VideoFrame.from_ndarray(rgb_HWC.astype(np.uint8), "rgb24")


def _narrowed(rgb: list[np.ndarray], to_bt709: list[list[float]]) -> list[np.ndarray]:
    """8-bit planes of wide primaries to those of BT.709; what these cannot show is clipped. (swscale takes ten seconds
    to prepare for it; measured, 2026-11.)"""
    linear = [_LINEAR[plane] for plane in rgb]
    narrow = [sum(weight * plane for weight, plane in zip(row, linear, strict=True)) for row in to_bt709]
    return [(np.clip(plane, 0, 1) ** (1 / _GAMMA) * 255 + 0.5).astype(np.uint8) for plane in narrow]


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    planes: Any = frame.planes  # buffers, which PyAV's types do not say
    return [
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width] for plane in planes
    ]


def deinterlaced(
    before: av.VideoFrame | None, frame: av.VideoFrame, after: av.VideoFrame | None, time_base
) -> av.VideoFrame:
    """The frame with the lines of its second field made anew from those around them, in space and time (bwdif)."""
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    fields = graph.add("bwdif", "mode=send_frame:parity=auto:deint=all")
    graph.link_nodes(source, fields, graph.add("buffersink")).configure()
    for one in (before, frame, after):
        if one is not None:
            graph.push(one)
    graph.push(None)
    if before is not None:
        graph.vpull()
    made = graph.vpull()
    made.pts = frame.pts
    return made
