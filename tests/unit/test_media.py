"""Clips and pictures made here, read back: which frame, which way up, which colour, which pixels."""

from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, ImageCms

from reeltune.core.types import Crop, Shape
from reeltune.data import clips, display
from reeltune.data.media import MediaError, frames_on_show, measure, read_frames, write_clip

SIDE = 64  # pixels of most clips here
WHOLE = Crop(SIDE, SIDE, 0, 0)


def numbered(count: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """uint8 F H W C: frame n is grey of level 20 + 4n, with one corner bright so that codecs use all frame types."""
    frames_FHWC = np.zeros((count, height, width, 3), np.uint8)
    for n in range(count):
        frames_FHWC[n] = 20 + 4 * n
        frames_FHWC[n, :8, (3 * n) % (width - 8) : (3 * n) % (width - 8) + 8] = 250
    return frames_FHWC


def numbers(pixels_FCHW: np.ndarray) -> list[int]:
    """Which frames of `numbered` these are, from the lower half."""
    return [round((float(frame[:, SIDE // 2 :].mean()) - 20) / 4) for frame in pixels_FCHW]


def encode(path, frames_FHWC, *, pts=None, ticks=24, codec="libx264", pix_fmt="yuv420p", sar=None, gop=12, **options):
    """A clip with time stamps of our choice, in 1/ticks s."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if str(path).endswith("mp4") else {}) as container:
        stream = container.add_stream(codec, rate=24, options={key: str(value) for key, value in options.items()})
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = pix_fmt
        coder = stream.codec_context
        coder.gop_size, coder.time_base = gop, Fraction(1, ticks)
        if sar:
            coder.sample_aspect_ratio = sar
        for n, rgb in enumerate(frames_FHWC):
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = n if pts is None else pts[n], Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


PICKS = [[0], [49], [13, 14, 15], list(range(1, 50, 7)), [40, 3, 3, 25, 40], list(range(50))]


@pytest.mark.parametrize(
    ("ending", "codec", "options"),
    [
        ("mp4", "libx264", {"bf": 3, "crf": 12}),
        ("mp4", "libx264", {"bf": 3, "crf": 12, "gop": 250}),
        ("mkv", "libx264", {"bf": 3, "crf": 12, "x264-params": "open-gop=1:keyint=10:min-keyint=10"}),
        ("mp4", "libx264", {"bf": 3, "crf": 12, "x264-params": "open-gop=1:keyint=10:min-keyint=10"}),
        ("ts", "libx264", {"bf": 3, "crf": 12}),
        ("avi", "mpeg4", {"qmin": 1, "qmax": 2}),
        ("webm", "libvpx-vp9", {"crf": 10, "b": 0, "deadline": "realtime", "cpu-used": 8}),
        ("mp4", "libx265", {"crf": 12, "x265-params": "log-level=none:open-gop=1:keyint=10:min-keyint=10"}),
    ],
)
def test_frames_are_the_ones_asked_for(tmp_path, ending, codec, options):
    path = tmp_path / f"clip.{ending}"
    encode(path, numbered(50), codec=codec, **options)
    found = measure(path, "video", "full")
    assert (found.frames, found.height, found.width, found.notes) == (50, SIDE, SIDE, ())
    assert found.fps == pytest.approx(24, rel=0.01)
    for picks in PICKS:
        assert numbers(read_frames(path, picks, WHOLE, Shape(len(picks), SIDE, SIDE))) == picks
    index = clips.index_of(str(path))
    assert all(index.start_for(pts) <= pts for pts in index.pts.tolist())  # open groups: not the keyframe it precedes


def test_uneven_rate_and_late_start(tmp_path):
    path = tmp_path / "vfr.mp4"
    pts = [1000 + 3 * n if n < 20 else 1060 + 9 * (n - 20) for n in range(50)]
    encode(path, numbered(50), pts=pts, ticks=72, bf=3, crf=12)
    found = measure(path, "video")
    assert found.frames == 50
    assert found.fps == pytest.approx(49 / ((pts[-1] - pts[0]) / 72))
    assert "unevenly spaced" in found.notes[0]
    for picks in PICKS:
        assert numbers(read_frames(path, picks, WHOLE, Shape(len(picks), SIDE, SIDE))) == picks


def test_skipping_unwanted_frames_changes_no_bit(tmp_path):
    path = tmp_path / "clip.mp4"
    frames_FHWC = np.random.RandomState(0).randint(0, 256, (30, 8, 8, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)
    encode(path, frames_FHWC, bf=3, crf=20, gop=30)
    every = read_frames(path, range(30), WHOLE, Shape(30, SIDE, SIDE))
    for stride in (2, 3, 7):
        picks = range(0, 30, stride)
        part = read_frames(path, picks, WHOLE, Shape(len(picks), SIDE, SIDE))
        assert np.array_equal(part, every[::stride])


def test_each_frame_is_decoded_once_and_no_more_than_needed(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    encode(path, numbered(50), bf=0, crf=12, gop=10, **{"x264-params": "scenecut=0"})
    measure(path, "video")
    resized = []
    real = display.VideoReformatter

    class Counting:
        def __init__(self):
            self.inner = real()

        def reformat(self, frame, *args, **kwargs):
            resized.append(frame.pts)
            return self.inner.reformat(frame, *args, **kwargs)

    monkeypatch.setattr(display, "VideoReformatter", Counting)
    read_frames(path, [25, 27, 25, 27], WHOLE, Shape(4, SIDE, SIDE))
    assert len(resized) == len(set(resized)) == 2
    index = clips.index_of(str(path))
    assert index.start_for(int(index.pts[25])) == index.pts[20]  # the keyframe before, not the clip's start


@pytest.mark.parametrize("a,b,c,d", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),
                                     (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)])  # fmt: skip
def test_display_matrix(tmp_path, a, b, c, d):
    """All eight: a coded point (x, y) is shown at (ax + cy, bx + dy)."""
    path = tmp_path / "clip.mp4"
    frames_FHWC = np.full((3, 64, 96, 3), 30, np.uint8)
    frames_FHWC[:, :32, :48] = 220  # the upper left quarter, whose middle lies at (-1, -1) from the centre
    write_clip(path, frames_FHWC, 8)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a version 0 track header (ISO 14496-12, 8.3.2)
    fixed = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in fixed)
    path.write_bytes(data)
    found = measure(path, "video")
    assert (found.height, found.width) == ((64, 96) if a else (96, 64))
    crop = Crop(found.height, found.width, 0, 0)
    picture_HW = read_frames(path, [1], crop, Shape(1, found.height, found.width))[0, 0].astype(int)
    x, y = -a - c, -b - d
    bright = np.full_like(picture_HW, 30)
    rows = slice(0, found.height // 2) if y < 0 else slice(found.height // 2, None)
    columns = slice(0, found.width // 2) if x < 0 else slice(found.width // 2, None)
    bright[rows, columns] = 220
    assert np.abs(picture_HW - bright).mean() < 4


def test_pixels_are_made_square(tmp_path):
    path = tmp_path / "wide.mp4"
    encode(path, numbered(5), sar=Fraction(2, 1), crf=12)
    found = measure(path, "video")
    assert (found.height, found.width) == (SIDE, 2 * SIDE)
    assert "not square" in found.notes[0]


@pytest.mark.parametrize("matrix,rng", [(1, 1), (1, 2), (6, 1), (6, 2), (2, 0)])
def test_colours_by_their_tags(tmp_path, matrix, rng):
    """ITU-R BT.709 and BT.601 luma weights, limited and full range; untagged is BT.601 limited, as in FFmpeg."""
    path = tmp_path / "flat.mp4"
    kr, kb = (0.2126, 0.0722) if matrix == 1 else (0.299, 0.114)
    for rgb in ((255, 255, 255), (0, 0, 0), (200, 30, 60), (20, 180, 90)):
        r, g, b = (value / 255 for value in rgb)
        luma = kr * r + (1 - kr - kb) * g + kb * b
        planes = luma, (b - luma) / (2 - 2 * kb), (r - luma) / (2 - 2 * kr)
        scale, offset = ((255, 255, 255), (0, 128, 128)) if rng == 2 else ((219, 224, 224), (16, 128, 128))
        frame = av.VideoFrame(SIDE, SIDE, "yuv444p")
        for plane, value, factor, base in zip(frame.planes, planes, scale, offset, strict=True):
            plane.update(bytes([round(value * factor + base)]) * (plane.line_size * SIDE))
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
            stream.height = stream.width = SIDE
            stream.pix_fmt = "yuv444p"
            stream.codec_context.colorspace, stream.codec_context.color_range = matrix, rng
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        pixels = read_frames(path, [0], Crop(32, 32, 0, 0), Shape(1, 32, 32))[0].astype(int)
        assert np.abs(pixels - np.reshape(rgb, (3, 1, 1))).max() <= 2


def test_one_resize_then_the_cut(tmp_path):
    """The cut is the window of the whole resize, and the resize does not alias: a fine grating turns grey."""
    path = tmp_path / "clip.mp4"
    x = np.arange(256)
    fine = (128 + 100 * np.sin(x * np.pi * 0.9)).astype(np.uint8)  # 0.45 cycles a pixel: beyond a quarter's reach
    slow = (128 + 100 * np.sin(x * np.pi / 32)).astype(np.uint8)
    picture = np.where(np.arange(256)[:, None] < 128, fine, slow)[..., None].repeat(3, 2)
    encode(path, np.stack([picture] * 2).astype(np.uint8), pix_fmt="yuv444p", crf=4)
    whole = read_frames(path, [0], Crop(64, 64, 0, 0), Shape(1, 64, 64))
    part = read_frames(path, [0], Crop(64, 64, 10, 20), Shape(1, 32, 16))
    assert np.array_equal(part, whole[:, :, 10:42, 20:36])
    assert whole[0, 0, 4:28, 4:60].std() < 3
    middles = 4 * np.arange(64) + 1.5
    expected = 128 + 100 * np.sin(middles * np.pi / 32)
    assert np.abs(whole[0, 0, 40:60, 4:60] - expected[4:60]).max() < 6


def test_the_same_bits_again(tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path, numbered(20), 8)
    first, again = (read_frames(path, range(20), Crop(40, 56, 1, 3), Shape(20, 32, 48)) for _ in range(2))
    assert np.array_equal(first, again)
    other = tmp_path / "other.mp4"
    write_clip(other, numbered(20), 8)
    assert other.read_bytes() == path.read_bytes()


def test_written_clip(tmp_path):
    path = tmp_path / "clip.mp4"
    frames_FHWC = numbered(9, 61, 65)
    frames_FHWC[..., 2] //= 2
    write_clip(path, frames_FHWC, 23.976)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        coder = stream.codec_context
        assert (coder.name, coder.pix_fmt, coder.colorspace, coder.color_range) == ("h264", "yuv420p", 1, 1)
        assert float(stream.average_rate) == pytest.approx(23.976, abs=1e-3)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    back = read_frames(path, range(9), Crop(62, 66, 0, 0), Shape(9, 61, 65)).transpose(0, 2, 3, 1)
    assert np.abs(back.astype(int) - frames_FHWC)[:, 16:].mean() < 2


def read_picture(path, height, width, count=1):
    return read_frames(path, (0,) * count, Crop(height, width, 0, 0), Shape(count, height, width))


def test_picture_modes(tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    deep = read_picture(tmp_path / "deep.png", 32, 32)[0]
    assert np.abs(deep.astype(float) - ramp / 257).max() <= 0.51
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 0], rgba[:16, :, 3], rgba[16:, :, 3] = 200, 255, 51  # red, opaque above, one fifth below
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    clear = read_picture(tmp_path / "clear.png", 32, 32)[0]
    assert clear[:, 4, 4].tolist() == [200, 0, 0]
    assert np.abs(clear[:, 24, 4].astype(int) - [244, 204, 204]).max() <= 1  # over white
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(read_picture(tmp_path / "ink.jpg", 32, 32)[0, :, 5, 5].astype(int) - [255, 0, 0]).max() <= 3
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 120, 230])
    palette.save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png", 32, 32, 3)[2, :, 5, 5].tolist() == [10, 120, 230]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """Row 0 and column 0 of the stored picture lie where the tag says (Exif 2.3, table 6)."""
    stored = np.full((32, 48, 3), 30, np.uint8)
    stored[:16, :24] = 220
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    Image.fromarray(stored).save(path, quality=95, exif=exif)
    found = measure(path, "image")
    assert (found.height, found.width) == ((48, 32) if orientation >= 5 else (32, 48))
    shown = read_picture(path, found.height, found.width)[0, 0]
    corners = [shown[4, 4], shown[4, -4], shown[-4, -4], shown[-4, 4]]
    at = {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert [value > 128 for value in corners] == [place == at for place in range(4)]


def test_what_cannot_be_read_says_why(tmp_path):
    clip = tmp_path / "clip.mp4"
    write_clip(clip, numbered(20), 8)
    with pytest.raises(MediaError, match="has 20 frames, so no frame 20"):
        read_frames(clip, [20], WHOLE, Shape(1, SIDE, SIDE))
    with pytest.raises(ValueError, match="do not make"):
        read_frames(clip, [0], Crop(SIDE, SIDE, 1, 0), Shape(1, SIDE, SIDE))
    (tmp_path / "codec.mp4").write_bytes(clip.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(MediaError, match="codec that cannot be decoded"):
        measure(tmp_path / "codec.mp4", "video")
    data = bytearray(clip.read_bytes())
    start = data.index(b"mdat") + 1200
    data[start : start + 600] = np.random.RandomState(1).bytes(600)
    clip.write_bytes(data)
    with pytest.raises(MediaError, match=r"damaged|decode"):
        read_frames(clip, range(20), WHOLE, Shape(20, SIDE, SIDE))
    assert measure(clip, "video", "header").frames == 20
    with pytest.raises(MediaError, match=r"damaged|decode"):
        measure(clip, "video", "full")


def test_a_playlist_named_like_a_clip_opens_nothing(tmp_path):
    secret = tmp_path / "secret.mp4"
    write_clip(secret, numbered(5), 8)
    for name, text in {
        "list.mp4": f"ffconcat version 1.0\nfile {secret}\n",
        "hls.mp4": f"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(MediaError, match="cannot be opened as a clip"):
            measure(tmp_path / name, "video")


# What is shown, and no more


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
