"""Clips and pictures made here, read back: which frame, which way up, which colour, which pixels."""

import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from reeltune.core.types import Crop, Shape
from reeltune.data import clips, display
from reeltune.data.media import MediaError, measure, read_frames, write_clip

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


@pytest.mark.parametrize("ending", ["jpg", "tiff", "webp", "png"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(tmp_path, orientation, ending):
    """Row 0 and column 0 of the stored picture lie where the tag says (Exif 2.3, table 6); 0 and 9 say nothing."""
    stored = np.full((32, 48, 3), 30, np.uint8)
    stored[:16, :24] = 220
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{ending}"
    Image.fromarray(stored).save(path, exif=exif, **({} if ending == "tiff" else {"quality": 95}))
    for how in ("header", "ends"):
        found = measure(path, "image", how)
        assert (found.height, found.width) == ((48, 32) if 5 <= orientation <= 8 else (32, 48)), how
    shown = read_picture(path, found.height, found.width)[0, 0]
    corners = [shown[4, 4], shown[4, -4], shown[-4, -4], shown[-4, 4]]
    at = {0: 0, 9: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]
    assert [value > 128 for value in corners] == [place == at for place in range(4)]


def test_a_picture_with_too_many_pixels(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(MediaError, match="has more than 178,956,970 pixels"):
        measure(tmp_path / "huge.png", "image", "header")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")  # of which Pillow warns
    words = "import sys; from reeltune.data.media import measure; print(measure(sys.argv[1], 'image', 'header').width)"
    command = [sys.executable, "-c", words, str(tmp_path / "large.png")]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("10000\n", "")


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


def test_equal_frames_are_equal_bytes_whatever_memory_holds(tmp_path):
    """x264 reads memory that nobody wrote, unless it is kept from it."""
    chance = np.random.RandomState(0)
    picture = chance.randint(0, 256, (6, 8, 3)).repeat(24, 0).repeat(24, 1).astype(np.uint8)
    moving_FHWC = np.stack([np.roll(picture, 6 * frame, axis=1) for frame in range(12)])
    files = set()
    for _ in range(12):
        used = [np.full(chance.randint(1000, 3_000_000), chance.randint(256), np.uint8) for _ in range(4)]
        del used
        write_clip(tmp_path / "a.mp4", moving_FHWC, 8)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize(("fps", "nearest"), [(1 / 3600, 1 / 1001), (1e6, 1000.0), (float("inf"), 1000.0), (8, 8)])
def test_a_clip_of_any_rate_is_written_at_the_nearest_that_there_is(fps, nearest, tmp_path):
    write_clip(tmp_path / "a.mp4", numbered(3), fps)
    written = measure(tmp_path / "a.mp4", "video")
    assert (written.frames, written.fps) == (3, pytest.approx(nearest, rel=1e-3))
