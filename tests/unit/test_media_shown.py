"""What a viewer shows of a file: edit lists, streams, times, alpha, colours, fields; or why it is refused."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, ImageCms

from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Shape
from reeltune.data.display import Displayer
from reeltune.data.media import MediaError, frames_on_show, measure, read_frames, write_clip
from tests.unit.test_media import SIDE, WHOLE, encode, numbered, numbers, read_picture


def edit(path, first: int, count: int, *, ticks_a_frame: int, fps: int = 24):
    """The edit list of a clip made here, changed to show `count` frames from frame `first` on (ISO 14496-12, 8.6.6)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # version 0, one entry: duration in 1/1000 s, media time in ticks, rate
    time = int.from_bytes(data[at + 4 : at + 8], "big") + first * ticks_a_frame
    data[at : at + 8] = round(count * 1000 / fps).to_bytes(4, "big") + time.to_bytes(4, "big")
    path.write_bytes(data)


@pytest.mark.parametrize(("first", "count"), [(0, 30), (13, 20), (30, 20), (12, 12), (49, 1)])
@pytest.mark.parametrize("bf", [0, 3])
def test_a_clip_trimmed_by_an_edit_list_has_the_frames_that_are_shown(tmp_path, bf, first, count):
    path = tmp_path / "clip.mp4"
    encode(path, numbered(50), bf=bf, crf=12)
    with av.open(str(path)) as container:
        ticks = round(container.streams.video[0].time_base ** -1 / 24)
    edit(path, first, count, ticks_a_frame=ticks)
    found = measure(path, "video", "full")
    assert found.frames == count
    whole = list(range(first, first + count))
    assert numbers(read_frames(path, range(count), WHOLE, Shape(count, SIDE, SIDE))) == whole
    assert numbers(read_frames(path, [count - 1], WHOLE, Shape(1, SIDE, SIDE))) == whole[-1:]
    if count > 2:
        assert found.fps == pytest.approx(24, rel=0.02) and found.notes == ()
    data = path.read_bytes()
    for tenths in (6, 9):  # whether shown or not, what is lost is missed
        path.write_bytes(data[: len(data) * tenths // 10])
        with pytest.raises(MediaError, match=r"cut short|decode|damaged|holds no frames"):
            measure(path, "video")


def chained(path, *sizes: tuple[int, int], count: int = 6):
    """One stream of pieces of these heights and widths."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width = sizes[0]
        stream.pix_fmt = "yuv420p"
        for part, (height, width) in enumerate(sizes):
            coder = av.CodecContext.create("libx264", "w")
            coder.height, coder.width, coder.pix_fmt, coder.time_base = height, width, "yuv420p", Fraction(1, 24)
            for n, rgb in enumerate(numbered(count, height, width)):
                frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format="yuv420p")
                frame.pts, frame.time_base = part * count + n, Fraction(1, 24)
                pieces(container, stream, coder.encode(frame))
            pieces(container, stream, coder.encode())


def pieces(container, stream, packets):
    for packet in packets:
        packet.stream = stream
        container.mux(packet)


def test_a_size_that_changes_is_refused_with_its_frame(tmp_path):
    path = tmp_path / "clip.ts"
    chained(path, (64, 96), (96, 64))
    with pytest.raises(MediaError, match="changes its size: 96x64 pixels at first, 64x96 from frame 6 on"):
        measure(path, "video")
    chained(path, (64, 96), (96, 64), (64, 96))
    with pytest.raises(MediaError, match="96x64 pixels at first, 64x96 from frame 6 on"):
        measure(path, "video", "full")
    assert measure(path, "video").frames == 18  # its ends are alike: seen when it is read
    with pytest.raises(MediaError, match="from frame 6 on"):
        read_frames(path, [7, 8], Crop(64, 96, 0, 0), Shape(2, 64, 96))


@pytest.mark.parametrize(
    ("default", "shown"), [((False, True), 1), ((True, False), 0), ((False, False), 1), ((True, True), 1)]
)
def test_the_default_stream_is_shown_or_else_the_largest(tmp_path, default, shown):
    path = tmp_path / "clip.mkv"
    sides = 32, 64
    with av.open(str(path), "w", options={"default_mode": "passthrough"}) as container:
        streams = []
        for side, is_default in zip(sides, default, strict=True):
            stream = container.add_stream("libx264", rate=24)
            stream.height = stream.width = side
            stream.pix_fmt = "yuv420p"
            stream.disposition = Disposition.default if is_default else Disposition(0)
            streams.append(stream)
        for side, stream in zip(sides, streams, strict=True):
            for rgb in numbered(3, side, side):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, "rgb24")))
            container.mux(stream.encode())
    found = measure(path, "video")
    assert (found.height, found.width) == (sides[shown], sides[shown])
    assert "several video streams" in found.notes[0]


def test_uneven_frames_are_taken_by_time_where_a_rate_is_asked_for(tmp_path):
    path = tmp_path / "vfr.mp4"
    pts = [n if n < 30 else 30 + 6 * (n - 30) for n in range(40)]  # 30 a second for 1 s, then 5
    encode(path, numbered(40), pts=pts, ticks=30, bf=0, crf=12)
    found = measure(path, "video")
    assert "at 5 to 30 a second" in found.notes[0]
    for rate, start in ((10, 0), (30, 0), (5, 7), (4, 20)):
        count = int((found.frames - 1 - start) / found.fps * rate)
        ranks = frames_on_show(str(path), [start + n for n in range(count)], found.fps, rate)
        times_s = np.array(pts) / 30
        for n, rank in enumerate(ranks):
            wanted_s = start / found.fps + n / rate
            assert times_s[rank] <= wanted_s + 1e-3 and (rank == 39 or wanted_s + 1e-3 < times_s[rank + 1])
    even = tmp_path / "even.mp4"
    encode(even, numbered(40), bf=0, crf=12)
    assert frames_on_show(str(even), (3, 5, 7), 24.0, 12.0) == (3, 5, 7)


# Colour


def with_alpha(side: int = SIDE) -> np.ndarray:
    """uint8 H W RGBA: opaque blue on the left, on the right red that is fully transparent."""
    picture = np.zeros((side, side, 4), np.uint8)
    picture[:, : side // 2] = 20, 60, 220, 255
    picture[:, side // 2 :] = 230, 10, 10, 0
    return picture


@pytest.mark.parametrize(
    ("codec", "ending", "pix_fmt"),
    [
        ("qtrle", "mov", "argb"),
        ("png", "mov", "rgba"),
        ("prores_ks", "mov", "yuva444p10le"),
        ("libvpx-vp9", "webm", "yuva420p"),
        ("ffv1", "mkv", "yuva444p"),
    ],
)
def test_what_is_transparent_lies_over_white(tmp_path, codec, ending, pix_fmt):
    path, picture = tmp_path / f"clip.{ending}", with_alpha()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height = stream.width = SIDE
        stream.pix_fmt = pix_fmt
        for n in range(3):
            frame = av.VideoFrame.from_ndarray(picture, "rgba").reformat(format=pix_fmt)
            frame.pts, frame.time_base = n, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "transparent in parts" in measure(path, "video").notes[0]
    shown = read_frames(path, [2], Crop(32, 32, 0, 0), Shape(1, 32, 32))[0].astype(int)
    assert np.abs(shown[:, :, :14] - np.reshape((20, 60, 220), (3, 1, 1))).max() <= 6
    assert shown[:, :, 19:].min() >= 250
    Image.fromarray(picture).save(tmp_path / "same.png")
    still = read_frames(tmp_path / "same.png", [0], Crop(32, 32, 0, 0), Shape(1, 32, 32))[0]
    assert np.abs(shown - still).mean() < 4  # the red beneath bleeds in neither


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG"), (8, "linear light")])
def test_hdr_is_refused_with_a_remedy(tmp_path, transfer, name):
    path = tmp_path / "hdr.mp4"
    tagged(path, numbered(3), primaries=9, transfer=transfer, matrix=9)
    with pytest.raises(MediaError, match=name) as refused:
        measure(path, "video", "header")
    assert "SDR in BT.709" in refused.value.remedy and refused.value.lasting
    with pytest.raises(MediaError, match=name):
        read_frames(path, [1], WHOLE, Shape(1, SIDE, SIDE))


def tagged(path, frames_FHWC, *, primaries, transfer, matrix, **options):
    """A clip whose values are these, with the numbers of ITU-T H.273 said of them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4", **options})
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = "yuv444p"
        coder = stream.codec_context
        coder.color_primaries, coder.color_trc, coder.colorspace, coder.color_range = primaries, transfer, matrix, 1
        for rgb in frames_FHWC:
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace=matrix, dst_color_range=1)))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("primaries", "to_709"),
    [  # linear RGB to linear BT.709 (ITU-R BT.2087 for BT.2020; SMPTE EG 432-1 for P3)
        (9, [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]),
        (12, [[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]),
    ],
)
def test_wide_gamuts_become_bt709(tmp_path, primaries, to_709):
    colour = np.array([150, 110, 80], np.uint8)
    path = tmp_path / "wide.mp4"
    flat, matrix = np.full((2, SIDE, SIDE, 3), colour), 9 if primaries == 9 else 1
    tagged(path, flat, primaries=primaries, transfer=1, matrix=matrix)
    shown = read_frames(path, [0], WHOLE, Shape(1, SIDE, SIDE))[0, :, 20, 20].astype(float)
    right = 255 * (np.array(to_709) @ (colour / 255) ** 2.4) ** (1 / 2.4)
    assert np.abs(right - colour).max() > 5
    assert np.abs(shown - right).max() < 2


def test_interlaced_frames_are_deinterlaced(tmp_path):
    """A bright bar moves by 4 pixels a field; as stored, its edges are combs."""
    frames_FHWC = np.full((12, SIDE, 128, 3), 40, np.uint8)
    for n in range(12):
        for field in (0, 1):
            start = 8 + 8 * n + 4 * field
            frames_FHWC[n, field::2, start : start + 16] = 220
    path = tmp_path / "fields.mp4"
    fields = {"flags": "+ildct+ilme", "bf": "2", "g": "4"}
    tagged(path, frames_FHWC, primaries=1, transfer=1, matrix=1, **fields)
    found = measure(path, "video")
    assert found.notes == ("its frames are interlaced, and are deinterlaced",) and found.frames == 12
    crop = Crop(SIDE, 128, 0, 0)
    shown = read_frames(path, range(12), crop, Shape(12, SIDE, 128))

    def combs(pictures_FHW):
        rows = pictures_FHW.astype(int)
        return np.abs(2 * rows[:, 1:-1] - rows[:, :-2] - rows[:, 2:]).mean()

    assert combs(shown[1:-1, 0]) < 0.3 * combs(frames_FHWC[1:-1, :, :, 0])
    for picks in ([7], [0], [11], [3, 8]):  # a frame is the same however it is come by
        assert np.array_equal(read_frames(path, picks, crop, Shape(len(picks), SIDE, 128)), shown[picks])
    for n in range(1, 11):  # of the field that comes first; here x264 says that it is the lower one
        bar = np.flatnonzero(shown[n, 0, 10] > 130)
        assert abs(bar.mean() - (12 + 8 * n + 7.5)) < 2


def swapped_profile() -> bytes:
    """An sRGB profile, by name too, whose red is blue (tag table: ICC.1, 7.3)."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"tXYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tXYZ", b"bXYZ", 1)


def test_colour_profiles_are_applied(tmp_path):
    red = np.full((32, 32, 3), (230, 20, 20), np.uint8)
    path = tmp_path / "icc.png"
    Image.fromarray(red).save(path, icc_profile=swapped_profile())
    assert measure(path, "image").notes == ()
    assert np.abs(read_picture(path, 32, 32)[0, :, 5, 5].astype(int) - (20, 20, 230)).max() <= 2
    clear = np.dstack([red, np.full((32, 32), 255, np.uint8)])
    clear[16:, :, 3] = 0
    Image.fromarray(clear).save(path, icc_profile=swapped_profile())
    shown = read_picture(path, 32, 32)[0].astype(int)
    assert np.abs(shown[:, 5, 5] - (20, 20, 230)).max() <= 2 and shown[:, 28, 5].tolist() == [255] * 3
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(red).save(path, icc_profile=plain)
    assert read_picture(path, 32, 32)[0, :, 5, 5].tolist() == [230, 20, 20]
    Image.new("L", (32, 32), 90).save(path, icc_profile=plain)
    assert read_picture(path, 32, 32)[0, :, 5, 5].tolist() == [90] * 3
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100, icc_profile=plain)
    assert measure(tmp_path / "ink.jpg", "image").notes != ()  # a profile of another kind of colours
    assert np.abs(read_picture(tmp_path / "ink.jpg", 32, 32)[0, :, 5, 5].astype(int) - [255, 0, 0]).max() <= 3
    for broken in (b"no profile", plain[:200]):
        Image.fromarray(red).save(path, icc_profile=broken)
        assert measure(path, "image").notes == ("its colour profile cannot be used, and its colours are taken as sRGB",)
        assert read_picture(path, 32, 32)[0, :, 5, 5].tolist() == [230, 20, 20]


def test_a_copy_has_the_same_content(tmp_path):
    path, copy = tmp_path / "a.mp4", tmp_path / "b.mp4"
    write_clip(path, numbered(20), 8)
    copy.write_bytes(path.read_bytes())
    content = measure(path, "video").content
    assert content == measure(copy, "video").content != 0
    write_clip(copy, numbered(21), 8)
    assert content != measure(copy, "video").content


def test_frames_larger_than_ffmpeg_makes_are_refused():
    """By a limit of its own: one row less, and it makes them."""
    side = math.isqrt((2**31 - 1) // 8) - 128
    Displayer(side, side)
    with pytest.raises(UserError, match=r"pixels are asked of a frame, more than FFmpeg makes; lower the sample sizes"):
        Displayer(side + 1, side + 1)
