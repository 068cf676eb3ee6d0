"""How far a clip obeys its control, by kind of control: the detector that makes such controls, and a measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from reeltune.control.hed import EDGE
from reeltune.control.kind import Detector, Source
from reeltune.control.obedience import (
    Edges,
    camera_agreement,
    drawing_agreement,
    edge_agreement,
    lines_of,
    pose_agreement,
    rank_correlation,
)
from reeltune.core.types import Draw, Record
from reeltune.data.camera import read_poses, resample
from reeltune.data.findings import MediaError
from reeltune.data.keypoints import Keypoints, is_keypoints, read_keypoints
from reeltune.data.media import frames_on_show
from reeltune.data.pose_drawing import draw_people


@dataclass(frozen=True)
class Asked:
    """The control that a clip was given."""

    draw: Draw
    record: Record | None  # what `draw` is of
    control_FHWC: np.ndarray | None  # uint8, as the network saw it

    @property
    def frames(self) -> Sequence[int]:
        """The frames of the file that the clip has."""
        if self.record is None or self.draw.rate is None:
            return self.draw.frames
        return frames_on_show(self.record.path, self.draw.frames, self.record.fps, self.draw.rate)


Scores = dict[str, float]  # name -> number; the first is the score


class Measure(NamedTuple):
    words: str  # the score
    unit: str  # behind it: nothing, or a degree sign
    rises: bool  # more is better
    compare: Callable[[Asked, list[Any]], Scores | None]
    """Scores of what the detector put, perhaps nothing; None where the control asks for nothing, or nothing can be
    said."""


@dataclass(frozen=True)
class Judge:
    """Scores clips against one kind of control, with one detector."""

    kind: str
    detector: str  # digest of its files and settings
    measure: Measure
    detect: Callable[[Source, Callable[[Any], None]], Any] = field(repr=False)

    def scores(self, asked: Asked, clip_FHWC: np.ndarray, fps: float) -> Scores | None:
        """How far a clip, uint8, follows its control; None where that asks for nothing, or nothing can be said of the
        clip."""
        found: list[Any] = []
        try:
            self.detect(Source.of(np.ascontiguousarray(clip_FHWC), fps), found.append)
        except MediaError:  # a clip that the detector cannot make anything of
            return None
        return self.measure.compare(asked, found)

    @property
    def unmeasured(self) -> str:
        """What to tell where it is None for every clip."""
        return (
            f"obedience is not measured: no preview has a control of kind {self.kind} and anything that the detector "
            "of that kind finds in it; see that control_kind is what the controls are, and that previews are large and "
            "long enough"
        )


def judge_by(kind: str, opened: Detector, controls: Sequence[str | None] = ()) -> Judge:
    """The judge of that kind of control by that detector. controls: files that clips are given, as far as there are
    any; where none of them has what the kind's measure needs, it is measured by the drawing."""
    by_drawing = kind in DRAWN and bool(controls) and all(map(_is_drawing, controls))
    return Judge(kind, opened.digest, (DRAWN if by_drawing else MEASURES)[kind], opened.detect)


def unlike(kind: str, controls: Sequence[str | None]) -> str:
    """What to tell where some controls are drawings and others are not, so that one measure does not fit all; empty
    where it does."""
    drawings = sum(map(_is_drawing, controls)) if kind in DRAWN else 0
    if drawings in (0, len(controls)):
        return ""
    return (
        f"obedience: {drawings} of {len(controls)} previews have a drawing as control and not key points (.npz); they "
        "are not measured beside the others"
    )


def _is_drawing(control: str | None) -> bool:
    return control is not None and not is_keypoints(control)


def _lines(asked: Asked, found: list[Any]) -> Scores | None:
    if asked.control_FHWC is None or not found:
        return None
    return _edges(edge_agreement(lines_of(asked.control_FHWC), lines_of(np.concatenate(found))))


def _soft_edges(asked: Asked, found: list[Any]) -> Scores | None:
    """Scores of soft edges: a pixel counts where it is an edge rather than none."""
    if asked.control_FHWC is None or not found:
        return None
    given_FHW, found_FHW = (
        _brightness(drawn_FHWC) >= EDGE for drawn_FHWC in (asked.control_FHWC, np.concatenate(found))
    )
    return _edges(edge_agreement(given_FHW, found_FHW))


def _edges(agreed: Edges | None) -> Scores | None:
    return None if agreed is None else {"f1": agreed.f1, "precision": agreed.precision, "recall": agreed.recall}


def _depths(asked: Asked, found: list[Any]) -> Scores | None:
    if asked.control_FHWC is None or not found:
        return None
    correlation = rank_correlation(_brightness(asked.control_FHWC), _brightness(np.concatenate(found)))
    return None if correlation is None else {"correlation": correlation}


def _brightness(grey_FHWC: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(grey_FHWC[..., 1])  # of grey pixels, any channel; video codecs keep green best


def _poses(asked: Asked, found: list[Any]) -> Scores | None:
    """Scores of key points, which alone tell whose they are. Nothing found is nobody found."""
    path = None if asked.record is None else asked.record.control_path
    if path is None or not is_keypoints(path):
        return None
    crop, shape = asked.draw.crop, asked.draw.shape
    given = _people(read_keypoints(path), asked.frames, crop.height, crop.width, (crop.left, crop.top))
    there = [_people(one, range(shape.frames), shape.height, shape.width) for one in found]
    agreed = pose_agreement(given, there[0] if there else [np.zeros((0, 0, 3))] * shape.frames)
    return None if agreed is None else {"oks": agreed.oks, "pck": agreed.pck}


def _drawn_poses(asked: Asked, found: list[Any]) -> Scores | None:
    """Scores of a drawing, with that of what is found. Nothing found is nobody found."""
    if asked.control_FHWC is None:
        return None
    _, height, width = asked.draw.shape
    there_FHWC = np.zeros_like(asked.control_FHWC)
    for keypoints in found:
        for frame, out_HWC in enumerate(there_FHWC):
            out_HWC[:] = draw_people(keypoints.frame(frame, height, width), height, width)
    return _edges(drawing_agreement(asked.control_FHWC, there_FHWC))


def _people(
    keypoints: Keypoints, frames: Sequence[int], height: int, width: int, corner: tuple[int, int] = (0, 0)
) -> list[np.ndarray]:
    """The people of each frame, N,K,3 of x, y and score, in pixels of a picture of that size from `corner` on."""
    told = [keypoints.frame(int(frame), height, width) for frame in frames]
    return [np.concatenate([one.points_NP2 - corner, one.scores_NP[..., None]], axis=-1) for one in told]


def _paths(asked: Asked, found: list[Any]) -> Scores | None:
    record, count = asked.record, len(asked.draw.frames)
    if record is None or record.camera_path is None or count < 2 or not found:
        return None
    poses_N19 = read_poses(record.camera_path)
    stretched = (record.frames, asked.frames) if record.path else (count, range(count))  # of a prompt: over all of it
    given_F19 = resample(poses_N19, *stretched)
    (found_F19,) = found
    agreed = camera_agreement(*(rows[:, 7:].reshape(-1, 3, 4) for rows in (given_F19, found_F19)))
    scores = {"rotation_deg": agreed.rotation_deg}
    return scores if agreed.translation is None else {**scores, "translation": agreed.translation}


MEASURES = {
    "canny": Measure("edges on the control's lines (F1)", "", True, _lines),
    "hed": Measure("soft edges on the control's edges (F1)", "", True, _soft_edges),
    "mlsd": Measure("straight lines on the control's lines (F1)", "", True, _lines),
    "depth": Measure("rank correlation with the control's depth", "", True, _depths),
    "pose": Measure("key points where the control has them (OKS)", "", True, _poses),
    "camera": Measure("angle between views asked for and found", "°", False, _paths),
}
# By kind, where a control is a clip or picture of what the kind keeps in another form.
DRAWN = {"pose": Measure("drawn poses on the control's, colour by colour (F1)", "", True, _drawn_poses)}
