"""The contact sheet of a list: clip, control, blend and score, from the worst on. One file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from reeltune.control.kind import Kind
from reeltune.control.outcome import Outcome
from reeltune.core.files import whole_file
from reeltune.core.types import Crop, Shape
from reeltune.data.camera import CameraError
from reeltune.data.findings import MediaError
from reeltune.data.keypoints import read_keypoints
from reeltune.data.media import measure, read_frames
from reeltune.reporting.report import environment

MOST = 200  # clips; a page of 200 has about 10 MB
HEIGHT = 180  # pixels of each picture
MOST_WIDTH = 16 * HEIGHT  # pixels; a JPEG has 65,500 at most
JPEG_QUALITY = 80
BLEND = 0.5  # of the clip; the control is laid over it by its lighter parts


@dataclass(frozen=True)
class Card:
    """One clip of the sheet."""

    named: str
    score: str
    facts: list[tuple[str, str]]
    reason: str
    pictures: list[tuple[str, str]]  # what, and the picture as a data: URL


def write_sheet(path: Path, kind: Kind, data_dir: Path, found: Sequence[Outcome]) -> None:
    """Raises CannotWriteError."""
    ordered = sorted(found, key=_worst_first)
    page = (
        environment()
        .get_template("control/sheet.html")
        .render(
            name=path.stem,
            kind=kind,
            made=sum(not one.reason for one in found),
            total=len(found),
            cards=[_card(kind, data_dir, one) for one in ordered[:MOST]],
        )
    )
    with whole_file(path) as file:
        file.write(page)


def _worst_first(one: Outcome) -> tuple[bool, float, float]:
    """Those that are left out first, then by score, then by the least steady."""
    steady = one.made.facts.get("steady_share", 1.0) if one.made is not None else 0.0
    return not one.reason, -1.0 if one.score is None else one.score, steady


def _card(kind: Kind, data_dir: Path, one: Outcome) -> Card:
    facts = one.made.facts if one.made is not None else {}
    return Card(
        named=one.entry.named or f"entry {one.entry.number}",
        score="" if one.score is None else f"{one.score:.2f}",
        facts=[
            (name.replace("_", " "), f"{value:.3g}")
            for name, value in facts.items()
            if (one.entry.media, name) != ("image", "steady_share")
        ],
        reason=one.reason,
        pictures=_pictures(kind, data_dir, one),
    )


def _pictures(kind: Kind, data_dir: Path, one: Outcome) -> list[tuple[str, str]]:
    """Pictures of the frame in the middle; what cannot be read is not shown, as the card or `verify` tells why."""
    if not one.entry.inside:
        return []
    shown: list[tuple[str, str]] = []
    with suppress(MediaError, CameraError):
        clip_HW3 = _middle(data_dir / one.entry.inside, one)
        shown.append(("clip", _url(clip_HW3)))
        if one.made is not None and one.made.bytes:
            shown += _with_control(kind, data_dir / one.control, clip_HW3, one)
    return shown


def _with_control(kind: Kind, control: Path, clip_HW3: np.ndarray, one: Outcome) -> list[tuple[str, str]]:
    """What is shown beside the clip. Raises MediaError and CameraError."""
    if kind.form == "camera":
        from reeltune.control.camera_picture import path_picture

        return [("path from above", _url(path_picture(control, HEIGHT)))]
    height, width = clip_HW3.shape[:2]
    size = height, width
    if kind.form == "keypoints":  # drawn at the clip's size, or lines of fixed width would hide the picture
        keypoints = read_keypoints(control)
        size = keypoints.height, keypoints.width
    drawn = Image.fromarray(np.ascontiguousarray(_middle(control, one, size)))
    control_HW3 = np.asarray(drawn.resize((width, height), Image.Resampling.LANCZOS))
    mixed = (
        np.maximum(BLEND * clip_HW3, control_HW3.astype(np.float32))
        if kind.name != "depth"
        else (BLEND * clip_HW3 + (1 - BLEND) * control_HW3)
    )
    return [("control", _url(control_HW3)), ("blend", _url(mixed.astype(np.uint8)))]


def _middle(path: Path, one: Outcome, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 H W 3 of HEIGHT, or of that size. Raises MediaError."""
    frames = one.made.frames if one.made is not None else 0
    if size is None:
        found = measure(path, one.entry.media, "header")
        frames = found.frames
        size = HEIGHT, min(max(round(HEIGHT * found.width / found.height), 1), MOST_WIDTH)
    middle = 0 if one.entry.media == "image" else frames // 2
    return read_frames(path, [middle], Crop(*size, 0, 0), Shape(1, *size))[0].transpose(1, 2, 0)


def _url(rgb_HW3: np.ndarray) -> str:
    held = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb_HW3)).save(held, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"
