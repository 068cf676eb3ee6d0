"""How far a clip obeys its control, by kind of control: the detector that makes such controls, and a measure."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from reeltune.control.obedience import edge_agreement, lines_of, rank_correlation
from reeltune.core.types import Draw, Record


@dataclass(frozen=True)
class Asked:
    """The control that a clip was given."""

    draw: Draw
    record: Record | None  # what `draw` is of
    control_FHWC: np.ndarray | None  # uint8, as the network saw it


Scores = dict[str, float]  # name -> number; the first is the score


@dataclass(frozen=True)
class Judge:
    """Of one kind of control, by one detector."""

    kind: str
    detector: str  # digest of its files and settings
    measure: str  # the score in words
    unit: str  # behind it: nothing, or a degree sign
    rises: bool  # more is better
    scores: Callable[[Asked, np.ndarray, float], Scores | None]
    """Of a clip, uint8_FHWC, and its frames per second; None where its control asks for nothing, or nothing can be said
    of the clip."""

    @property
    def unmeasured(self) -> str:
        """What to tell where it is None for every clip."""
        return (
            f"obedience is not measured: in no preview is there a control of kind {self.kind} to hold what is found "
            "against; is control_kind what the controls are?"
        )


def _lines(control_FHWC: np.ndarray, found_FHWC: np.ndarray) -> Scores | None:
    agreed = edge_agreement(lines_of(control_FHWC), lines_of(found_FHWC))
    return None if agreed is None else {"f1": agreed.f1, "precision": agreed.precision, "recall": agreed.recall}


def _depths(control_FHWC: np.ndarray, found_FHWC: np.ndarray) -> Scores | None:
    correlation = rank_correlation(_brightness(control_FHWC), _brightness(found_FHWC))
    return None if correlation is None else {"correlation": correlation}


def _brightness(grey_FHWC: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(grey_FHWC[..., 1])  # of grey pixels, which video codecs keep best in green


def judge_of(kind: str, detector: str | None, needs: Collection[str]) -> Judge:
    import cv2

    def find(clip):
        return np.stack([cv2.cvtColor(cv2.Canny(f, 100, 200, L2gradient=True), cv2.COLOR_GRAY2RGB) for f in clip])

    return Judge(kind, "", "edges along its lines (F1)", "", True, lambda asked, clip, fps: _lines(asked.control_FHWC, find(clip)))
