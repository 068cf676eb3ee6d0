"""Key points of people in a clip, as a file that is drawn when it is read (`.npz`, no pickle).  (no torch)

A file holds, for P points a person in the order of its layout, N people in all frames one after another:
    facts         uint8: JSON of format, kind ("pose"), layout, detector (a digest), and the clip's height and width as
                  displayed, in pixels
    times_s       float64 F: when each frame is shown, the first at 0
    people        int32 F: how many people each frame has; their sum is N
    points        float16 N,P,2: x and y
    scores        float16 N,P
    boxes         float16 N,4: left, top, right, bottom
    box_scores    float16 N
x and y go from -1 to 1 about the picture's centre: -1 is its left or upper edge, 1 its right or lower one, so that they
mean the same at any size. There float16 is finest: its greatest error within the picture is 2**-12 (IEEE 754, 11
significant bits), 0.24 pixels of 1920. A file is about 800 bytes a person and frame.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reeltune.core.files import whole_file
from reeltune.core.shown import printable
from reeltune.data.findings import MediaError, require_file

ENDING = ".npz"
FORMAT = 1
LAYOUTS = {  # name -> points a person
    "coco": 17,  # the body (COCO key points, arXiv:1405.0312)
    "coco_wholebody": 133,  # the same, 6 of the feet, 68 of the face, 21 of each hand, left first (arXiv:2007.11858)
}
REACH = 8.0  # how far out a coordinate may lie, in half pictures; a detector's box reaches less than 2 beyond the edge
MOST_BYTES = 2**28  # of a file, and of what it unpacks to: 300,000 people
MOST_FACTS_BYTES = 4096
MOST_PEOPLE = 1000  # of a frame: detectors find 300 at most, and to draw so many takes a second
_SHAPES = {"facts": 1, "times_s": 1, "people": 1, "points": 3, "scores": 2, "boxes": 2, "box_scores": 1}
_DTYPES = {"facts": "|u1", "times_s": "<f8", "people": "<i4"}  # the others: half precision
_HALF = "<f2"
_DAMAGE = (OSError, ValueError, EOFError, LookupError, RuntimeError, NotImplementedError, OverflowError, SyntaxError,
           TypeError, RecursionError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile)  # fmt: skip
REMEDY = "Make it again with reeltune control, or give a control clip"


class People(NamedTuple):
    """The people of one frame, in pixels of a picture: x from 0 at its left edge, y from 0 at its upper one, so that
    the centre of the first pixel lies at 0.5."""

    points_NP2: np.ndarray  # float
    scores_NP: np.ndarray
    boxes_N4: np.ndarray  # left, top, right, bottom
    box_scores_N: np.ndarray

    @classmethod
    def nobody(cls, layout: str) -> People:
        count = LAYOUTS[layout]
        return cls(np.zeros((0, count, 2)), np.zeros((0, count)), np.zeros((0, 4)), np.zeros(0))


@dataclass(frozen=True, eq=False)
class Keypoints:
    """All people of a clip; see above."""

    layout: str
    height: int
    width: int
    detector: str  # digest of what found them
    times_s: np.ndarray
    people: np.ndarray
    points: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    box_scores: np.ndarray

    @classmethod
    def of(
        cls, frames: Iterable[People], times_s: Sequence[float] | np.ndarray, *, layout: str, height: int, width: int,
        detector: str,
    ) -> Keypoints:  # fmt: skip
        """The key points of a clip, from the people of each frame. Raises ValueError where there are not as many frames
        as times."""
        found = list(frames)
        if len(found) != len(times_s):
            raise ValueError(f"{len(found)} frames and {len(times_s)} times")
        joined = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        points_NP2, scores_NP, boxes_N4, box_scores_N = joined
        half_size = np.array([width, height]) / 2

        def about_centre(pixels: np.ndarray) -> np.ndarray:
            return np.clip(pixels / half_size - 1, -REACH, REACH).astype(_HALF)

        made = cls(
            layout=layout,
            height=height,
            width=width,
            detector=detector,
            times_s=np.asarray(times_s, np.float64),
            people=np.array([len(one.points_NP2) for one in found], np.int32),
            points=about_centre(points_NP2),
            scores=np.clip(scores_NP, 0, 100).astype(_HALF),
            boxes=about_centre(boxes_N4.reshape(-1, 2, 2)).reshape(-1, 4),
            box_scores=np.clip(box_scores_N, 0, 100).astype(_HALF),
        )
        _require_sound(made)
        return made

    @property
    def frames(self) -> int:
        return len(self.times_s)

    @property
    def fps(self) -> float:
        """The mean rate; 0 of a picture."""
        return (self.frames - 1) / float(self.times_s[-1]) if self.frames > 1 else 0.0

    def frame(self, number: int, height: int | None = None, width: int | None = None) -> People:
        """The people of a frame, in pixels of a picture of that size, or of the clip's own. Raises MediaError."""
        if not 0 <= number < self.frames:
            raise MediaError(f"has {self.frames} frames, so no frame {number}")
        end = int(self._ends[number])
        held = slice(end - int(self.people[number]), end)
        half_size = np.array([width or self.width, height or self.height]) / 2

        def pixels(about_centre: np.ndarray) -> np.ndarray:
            return (about_centre.astype(np.float64) + 1) * half_size

        boxes_N4 = pixels(self.boxes[held].reshape(-1, 2, 2)).reshape(-1, 4)
        scores_NP, box_scores_N = (held_in[held].astype(np.float64) for held_in in (self.scores, self.box_scores))
        return People(pixels(self.points[held]), scores_NP, boxes_N4, box_scores_N)

    @property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.people, dtype=np.int64)


def is_keypoints(path: str | Path) -> bool:
    """Whether a path's name is one of key points, as a camera path is told by its own."""
    return str(path).lower().endswith(ENDING)


def write_keypoints(path: Path, keypoints: Keypoints) -> None:
    """Whole or not at all; the same key points are the same bytes. Raises CannotWriteError."""
    facts = {
        "format": FORMAT,
        "kind": "pose",
        "layout": keypoints.layout,
        "height": keypoints.height,
        "width": keypoints.width,
        "detector": keypoints.detector,
    }
    arrays = {name: getattr(keypoints, name) for name in _SHAPES if name != "facts"}
    with whole_file(path, "wb") as file:
        np.savez(file, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), **arrays)


def read_keypoints(path: str | Path) -> Keypoints:
    """Raises MediaError, which says what is wrong, for whatever is not such a file, whole and sound."""
    path = str(path)
    require_file(path)
    status = os.stat(path)
    return _remembered(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)  # a clip is measured, timed and drawn in turn
def _remembered(path: str, size: int, mtime_ns: int) -> Keypoints:
    if size > MOST_BYTES:
        raise MediaError(f"has {size:,} bytes; key points have at most {MOST_BYTES:,}", remedy=REMEDY)
    try:
        with open(path, "rb") as file:
            arrays = _arrays(file.read())
        facts = json.loads(arrays.pop("facts").tobytes())
        if not isinstance(facts, dict) or facts.get("format") != FORMAT or facts.get("kind") != "pose":
            told = {name: facts.get(name) for name in ("format", "kind")} if isinstance(facts, dict) else "no facts"
            raise MediaError(f"has {str(told)[:80]}, not key points of kind pose in format {FORMAT}", remedy=REMEDY)
        fields: dict[str, Any] = {name: facts.get(name) for name in ("layout", "height", "width", "detector")}
        fields.update(arrays)
        keypoints = Keypoints(**fields)
        _require_sound(keypoints)
    except _DAMAGE as error:
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise MediaError(f"is not a sound file of key points: {reason}", remedy=REMEDY) from None
    return keypoints


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    """Every array of the file, none larger than the file says. Raises any of _DAMAGE."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        inside = archive.infolist()
        names = [entry.filename.removesuffix(".npy") for entry in inside]
        if sorted(names) != sorted(_SHAPES):
            raise ValueError(f"it holds {', '.join(sorted(names))[:100] or 'nothing'}, not {', '.join(_SHAPES)}")
        if sum(entry.file_size for entry in inside) > MOST_BYTES:
            raise ValueError(f"it unpacks to more than {MOST_BYTES:,} bytes")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in inside):
            raise ValueError("it is packed in an unknown way")
        return {name: _array(name, archive.read(entry)) for name, entry in zip(names, inside, strict=True)}


def _array(name: str, data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file (NumPy, NEP 1): its header is held against what follows before memory is
    taken."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{name} is of another .npy version")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    expected = np.dtype(_DTYPES.get(name, _HALF))
    if dtype != expected or len(shape) != _SHAPES[name] or (by_columns and len(shape) > 1):
        raise ValueError(f"{name} is {dtype} with {len(shape)} dimensions, not {expected} with {_SHAPES[name]}")
    if name == "facts" and len(data) > MOST_FACTS_BYTES:
        raise ValueError(f"facts has {len(data):,} bytes, and at most {MOST_FACTS_BYTES:,}")
    count = 1
    for side in shape:
        count *= side
    if min(shape) < 0 or count * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{name} of shape {str(shape)[:60]} has {len(data) - file.tell():,} bytes")
    return np.frombuffer(data, dtype, count, file.tell()).reshape(shape)


def _require_sound(made: Keypoints) -> None:
    """Raises ValueError."""
    if not isinstance(made.layout, str) or made.layout not in LAYOUTS:
        raise ValueError(f"its layout is {str(made.layout)[:40]!r}, none of {', '.join(LAYOUTS)}")
    if not all(type(side) is int and 0 < side < 2**15 for side in (made.height, made.width)):
        raise ValueError(f"its size is {str((made.width, made.height))[:40]}")
    if not isinstance(made.detector, str) or len(made.detector) > 200:
        raise ValueError("its detector is no short text")
    frames, total = len(made.times_s), len(made.points)
    if not frames or len(made.people) != frames or (made.people < 0).any() or made.people.sum(dtype=np.int64) != total:
        raise ValueError(f"it has {frames} times, and {len(made.people)} counts of people for {total} of them")
    if made.people.max() > MOST_PEOPLE:
        raise ValueError(f"a frame has {made.people.max():,} people, and {MOST_PEOPLE:,} are allowed")
    points = LAYOUTS[made.layout]
    shapes = {"points": (total, points, 2), "scores": (total, points), "boxes": (total, 4), "box_scores": (total,)}
    for name, shape in shapes.items():
        array = getattr(made, name)
        if array.shape != shape:
            raise ValueError(f"{name} has the shape {array.shape}, not {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds what is no finite number")
    if not np.isfinite(made.times_s).all() or made.times_s[0] != 0 or (np.diff(made.times_s) <= 0).any():
        raise ValueError("its times do not ascend from 0")
    if any((np.abs(array) > REACH).any() for array in (made.points, made.boxes)):
        raise ValueError(f"points or boxes lie more than {REACH:g} half pictures from the centre")
    if any((array < 0).any() for array in (made.scores, made.box_scores)):
        raise ValueError("a score is negative")
    if (made.boxes[:, :2] > made.boxes[:, 2:]).any():
        raise ValueError("a box ends before it begins")


def digest_of(path: str) -> str:
    """A digest of all the file's bytes. Raises OSError."""
    status = os.stat(path)
    return _remembered_digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _remembered_digest(path: str, size: int, mtime_ns: int) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
