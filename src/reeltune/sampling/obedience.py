"""Do previews obey? What a detector finds on them, against the control that they were given, beside the start's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from reeltune.config.recipe import Validation
from reeltune.control.judge import Asked, Judge, judge_by, unlike
from reeltune.control.kind import Detector
from reeltune.control.kinds import kind_named, open_for_previews
from reeltune.control.records import made_by
from reeltune.core.reading import NUMBER, TEXT
from reeltune.core.types import Batch
from reeltune.data.findings import content_of
from reeltune.sampling.paired import band95, keep_start, kept_start
from reeltune.sampling.prompts import Request, refuse_other_control
from reeltune.sampling.sample import Setup


@dataclass
class Obedience:
    """The scores of previews, each paired with that of the same preview by the starting weights.

    These are kept in validation/start_obedience.json. Where previews are made in another way than then, or are
    measured in another, the weights of now are the start.
    """

    judge: Judge
    requests: Sequence[Request]
    settings: dict[str, Any]  # with which previews are made
    output_dir: Path
    truths: dict[int, float | None] = field(default_factory=dict)  # of held-out clips themselves, by preview

    def scores(self, place: int, batch: Batch, made_BFCHW: Tensor) -> dict[str, float] | None:
        """The scores of a preview, uint8, by its place; the first number is the score. None where nothing can be said
        of it."""
        request = self.requests[place]
        control_FHWC = None if batch.control_BFCHW is None else _frames(batch.control_BFCHW)
        asked = Asked(batch.draws[0], request.record, control_FHWC)
        if place not in self.truths:
            real = request.entry is not None
            found = self.judge.scores(asked, _frames(batch.pixels_BFCHW), request.fps) if real else None
            self.truths[place] = None if found is None else _first(found)
        return self.judge.scores(asked, _frames(made_BFCHW), request.fps)

    def row(self, step: int, found: Sequence[dict[str, float] | None]) -> dict[str, Any] | None:
        """A row of metrics.jsonl, of what `scores` gave of each preview; None where nothing can be said of any.

        The first of a run, or one at step 0, is the start. Means and band are over previews of which both are known.
        """
        scores = [None if one is None else _first(one) for one in found]
        start_step, start = self._start(step, scores)
        truths = [self.truths.get(place) for place in range(len(scores))]
        known = [all_three for all_three in zip(scores, start, truths, strict=True) if None not in all_three[:2]]
        if not known:
            return None
        now, before, real = (np.array(column, dtype=np.float64) for column in zip(*known, strict=True))
        return {
            "kind": "obedience",
            "step": step,
            "start_step": start_step,
            "control_kind": self.judge.kind,
            "measure": self.judge.measure.words,
            "unit": self.judge.measure.unit,
            "rises": self.judge.measure.rises,
            "score": float(now.mean()),
            "score_start": float(before.mean()),
            "difference": float((now - before).mean()),
            "band95": band95(now - before),
            "truth": None if np.isnan(real).any() else float(real.mean()),
            "previews": [
                {"score": score, "score_start": first, "truth": truth, **(one or {})}
                for score, first, truth, one in zip(scores, start, truths, found, strict=True)
            ],
            "n": len(known),
        }

    def _start(self, step: int, scores: list[float | None]) -> tuple[int, list[float | None]]:
        """(step, scores) of the weights to compare with."""
        kept = None if step == 0 else self.kept()
        if kept is not None and any(score is not None for score in kept["scores"]):
            return kept["step"], kept["scores"]
        keep_start(self._path, {"step": step, **self._measured_on, "scores": scores})
        return step, scores

    def kept(self) -> dict[str, Any] | None:
        """What was measured of the weights that the run began with; None if nothing was, or not of these previews."""
        kinds = {"control_kind": TEXT, "detector": TEXT, "previews": TEXT.many(), "scores": NUMBER.or_none().many()}
        kept = kept_start(self._path, kinds)
        if kept is None or len(kept["scores"]) != len(self.requests):
            return None
        return kept if all(kept.get(name) == value for name, value in self._measured_on.items()) else None

    @property
    def _path(self) -> Path:
        return self.output_dir / "validation" / "start_obedience.json"

    @property
    def _measured_on(self) -> dict[str, Any]:
        return {
            "control_kind": self.judge.kind,
            "detector": self.judge.detector,
            "previews": [
                f"{one.seed} {one.entry} {Path(one.control or '').name} {_contents(one)} {one.prompt}"
                for one in self.requests
            ],
            "settings": self.settings,
        }


def obedience_of(
    recipe: Validation,
    setup: Setup,
    requests: Sequence[Request],
    output_dir: Path,
    opened: Detector | None = None,
) -> tuple[Obedience | None, list[str]]:
    """(of these previews, by the recipe's control_kind or what `reeltune control` made their controls as, None where
    neither tells; what to say). opened: the detector, where it has drawn the controls already.

    Raises UserError for a kind that the mode takes no control of, and for a detector that is not there, or another.
    """
    kind, detector = recipe.control_kind, recipe.control_detector
    if kind is None:
        kind = _made_as(requests)
        if kind is None:
            return None, []
        if kind_named(kind).needs and detector is None:
            told = f"reeltune control made the controls as {kind}, and whether previews follow them is not measured"
            return None, [f"{told}: it needs {kind_named(kind).needs}; give it as control_detector"]
    refuse_other_control(kind, setup.family, setup.mode)
    if not requests:
        return None, []
    settings = {name: getattr(recipe, name) for name in ("preview_steps", "guidance_scale", "negative_prompt")}
    opened = opened or open_for_previews(kind, detector, setup.parts.device.type)
    controls = [None if one.record is None else one.record.control_path for one in requests]
    notices = [told] if (told := unlike(kind, controls)) else []
    return Obedience(judge_by(kind, opened, controls), requests, settings, output_dir), notices


def _made_as(requests: Sequence[Request]) -> str | None:
    """The kind of all controls that `reeltune control` made; None of none, and of several."""
    records = [request.record for request in requests if request.record is not None]
    made = [made_by(path) for record in records if (path := record.control_path or record.camera_path)]
    kinds = {one.kind for one in made if one is not None}
    return kinds.pop() if len(kinds) == 1 else None


def _contents(request: Request) -> list[int]:
    """The contents of the files that a request is read from: one of the same name may be another."""
    record = request.record
    paths = [] if record is None else [record.path, record.control_path, record.camera_path]
    there = [path for path in dict.fromkeys([request.control, *paths]) if path and Path(path).is_file()]
    return [_content(path, status.st_size, status.st_mtime_ns) for path in there for status in [os.stat(path)]]


@lru_cache(maxsize=1024)
def _content(path: str, size: int, mtime_ns: int) -> int:
    """Read again where the file has changed since."""
    return content_of(path)


def _first(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))


def _frames(pixels_BFCHW: Tensor) -> np.ndarray:
    """uint8_FHWC of a batch of one."""
    return pixels_BFCHW[0].permute(0, 2, 3, 1).contiguous().numpy()
