"""Pictures, as a viewer shows them. Pillow lives here.  (no torch)"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from reeltune.core.types import Crop
from reeltune.data.findings import DecodeCheck, Measure, MediaError

_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS or PDF, which start other programs
_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, OverflowError)
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # beyond which Pillow opens none
warnings.filterwarnings("ignore", module=r"PIL\.")  # of half as many, and of damaged tags; what it opens is looked at
EXCHANGED = (5, 6, 7, 8)  # EXIF Orientations that exchange the sides; other values than 1 to 8 mean nothing
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a colour profile's space (ICC.1, 7.2.6) -> Pillow's mode


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """The picture as stored; every error of Pillow inside is a MediaError."""
    try:
        with Image.open(path, formats=_FORMATS) as picture:
            yield picture
    except UnidentifiedImageError:
        raise MediaError(f"is not a picture ({', '.join(_FORMATS)})") from None
    except Image.DecompressionBombError:
        raise MediaError(f"has more than {MOST_PIXELS:,} pixels", remedy="Make it smaller") from None
    except _ERRORS as error:
        raise MediaError(f"is a picture that cannot be read: {error}") from None


def is_picture(path: str) -> bool:
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except (*_ERRORS, Image.DecompressionBombError):
        return False


def read_picture(path: str, crop: Crop) -> np.ndarray:
    """uint8 C H W: the whole picture, resized to crop.height x crop.width. Raises MediaError."""
    with opened(path) as stored:
        picture, _ = displayed(stored)
        picture = picture.resize((crop.width, crop.height), Image.Resampling.LANCZOS)
    return np.asarray(picture).transpose(2, 0, 1)


def measure_picture(path: str, decode_check: DecodeCheck) -> Measure:
    with opened(path) as stored:
        notes = ["it is animated, and its first picture is used"] if getattr(stored, "is_animated", False) else []
        if stored.format == "MPO":  # several views in one JPEG, as telephones write
            notes = []
        width, height = stored.size
        if decode_check != "header" or stored.format == "TIFF":  # which has either size, by Pillow's version
            picture, more = displayed(stored)
            (width, height), notes = picture.size, notes + more
        elif stored.getexif().get(0x0112) in EXCHANGED:
            width, height = height, width
    return Measure("image", 1, 0.0, height, width, tuple(notes))


def displayed(stored: Image.Image) -> tuple[Image.Image, list[str]]:
    """(8-bit sRGB, upright, transparent parts over white, 16 bits scaled to 8; what to tell of it)."""
    picture = ImageOps.exif_transpose(stored)
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise MediaError("has more than 16 bits a pixel; write it with 8")
        picture = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if picture.mode == "F":
        raise MediaError("has floating-point pixels; write it with 8 bits")
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    picture, notes = _in_srgb(picture, stored.info.get("icc_profile"))
    if alpha is not None:
        picture.putalpha(alpha)
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture, notes


def _in_srgb(picture: Image.Image, icc_profile: bytes | None) -> tuple[Image.Image, list[str]]:
    """(RGB without alpha, by the picture's own colour profile if it has one; what to tell)."""
    colours = picture.convert("RGB") if picture.mode in ("P", "PA", "RGBA", "RGBX", "YCbCr", "LAB", "HSV") else picture
    if not icc_profile:
        return colours.convert("RGB"), []
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        mode = _MODES.get(getattr(profile.profile, "xcolor_space", "").strip(), "")
        if (mode == "CMYK") != (colours.mode == "CMYK") or (mode == "L" and colours.mode == "RGB"):
            raise ImageCms.PyCMSError(f"a {mode} profile in a {colours.mode} picture")
        changed = ImageCms.profileToProfile(
            colours.convert(mode),
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent(ImageCms.getDefaultIntent(profile)),
            outputMode="RGB",
        )
        assert changed is not None  # it is asked for a copy
        return changed, []
    except (ImageCms.PyCMSError, OSError, ValueError):
        return colours.convert("RGB"), ["its colour profile cannot be used, and its colours are taken as sRGB"]
