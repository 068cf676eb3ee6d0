"""What a kind of control is: a value with a name and a function that opens its detector.  (no torch)

A detector reads a clip as a stream, any number of times, and hands on what it makes of it as it comes, so that memory
does not grow with a clip's length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reeltune.core.errors import UserError

CHUNK_BYTES = 32 * 2**20  # of frames that are read at once; one frame may be larger
Form = Literal["pictures", "keypoints", "camera"]


@dataclass(frozen=True)
class Source:
    """A clip as displayed, or a picture, which is a clip of one frame."""

    height: int  # pixels, as width
    width: int
    times_s: np.ndarray  # float64 F: when each frame is shown, the first at 0
    chunks: Callable[[], Iterator[np.ndarray]]
    """uint8 F H W 3 in RGB, a few frames at a time; each call begins at the first frame. Raises MediaError."""

    @classmethod
    def of(cls, frames_FHW3: np.ndarray, fps: float) -> Source:
        """The source of frames in memory, uint8."""
        count, height, width, _ = frames_FHW3.shape
        size = frames_a_chunk(height, width)
        return cls(
            height,
            width,
            np.arange(count) / (fps or 1.0),
            lambda: (frames_FHW3[start : start + size] for start in range(0, count, size)),
        )

    def frames(self) -> Iterator[np.ndarray]:
        """uint8 H W 3, one at a time."""
        for chunk_FHW3 in self.chunks():
            yield from chunk_FHW3

    def spread(self, most: int) -> Iterator[np.ndarray]:
        """At most so many of the frames, evenly from the first to the last."""
        count = len(self.times_s)
        wanted = set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist())
        return (frame for place, frame in enumerate(self.frames()) if place in wanted)


def frames_a_chunk(height: int, width: int) -> int:
    return max(CHUNK_BYTES // (height * width * 3), 1)


@dataclass(frozen=True)
class Quality:
    """How good a control is. score: 0 to 1; below the least that is asked for, its clip is left out."""

    score: float
    facts: Mapping[str, float] = field(default_factory=dict)  # what the score is made of, for the ledger
    reason: str = ""  # why the clip is left out whatever is asked for, in words that follow its name; empty: it is not


Put = Callable[[Any], None]


@dataclass(frozen=True)
class Detector:
    """detect(source, put): puts what it makes of the clip, by the kind's form, and says how good that is.

    pictures: uint8 F H W 3 of the source's size, in turn, as many frames in all as the source has
    keypoints: one `data.keypoints.Keypoints`
    camera: one float64 F 19 of `data.camera`, a row for every frame
    A clip that is to be left out (`Quality.reason`) may get nothing. Raises MediaError for a clip that breaks midway.
    The same source gives the same bits.
    """

    digest: str  # of its files and settings
    detect: Callable[[Source, Put], Quality]


@dataclass(frozen=True)
class Settings:
    """What a user may set of detectors."""

    thresholds: tuple[float, float] | None = None  # of canny: low and high; None: by the clip
    device: str = "cpu"  # where networks run, by torch's name


Open = Callable[[Path | None, Settings], Detector]


@dataclass(frozen=True)
class Kind:
    name: str
    form: Form
    about: str  # one line for --help
    needs: str  # which files of a detector, in words; empty: none
    least_score: float  # below it a clip is left out, unless the user asks for another
    open: Open
    """(the detector's folder or file, settings). Raises UserError: no files, other files, or no library."""


def digest_of(name: str, settings: Any, files: Sequence[Path] = ()) -> str:
    """A detector's digest: of its name and version, what is set of it, and every byte of its files, in this order."""
    told = hashlib.blake2b(json.dumps([name, settings], sort_keys=True).encode(), digest_size=16)
    for path in files:
        with path.open("rb") as file:
            told.update(hashlib.file_digest(file, "sha256").digest())
    return told.hexdigest()


def pictures(detector: Detector, source: Source) -> np.ndarray:
    """uint8 F H W 3: all that a detector of the form `pictures` draws. For short clips: it is held in memory."""
    drawn: list[np.ndarray] = []
    detector.detect(source, drawn.append)
    return np.concatenate(drawn)


def require_numbers(where: Path, *arrays: np.ndarray) -> None:
    """Raises UserError where what a network has made are none. where: the network."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise UserError(str(where), "its network gives what are no numbers; download it again, or try another")
