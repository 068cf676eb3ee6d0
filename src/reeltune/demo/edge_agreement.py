"""Does a preview follow its control clip? A number for control clips that are line drawings: outlines, edges, poses.

The preview's edges, found by brightness and colour steps, are laid over the lines of a control clip, both slightly
blurred, and correlated frame by frame. The controls of other previews show what chance gives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reeltune.core.types import Crop, Shape
from reeltune.data.media import measure, read_frames

MEASURE = (
    "Agreement is the correlation of a preview's edges with the lines of a control clip, frame by frame (1 is "
    "perfect): with its own control, and with those of the other previews, which show what chance gives."
)
BLUR = 0.02  # of the shorter side: how far apart an edge and a line may lie and still meet


def agreement(preview_FHWC: np.ndarray, controls: Sequence[np.ndarray]) -> list[float]:
    """One score in [-1, 1] for each control, which has the preview's shape; all uint8 RGB.

    Pearson's correlation over the pixels of a frame, averaged over frames; a frame without edges or lines counts 0.
    """
    found = _blurred(_edges(preview_FHWC))
    return [float(_correlation(found, _blurred(control.max(-1) / 255)).mean()) for control in controls]


def _edges(clip_FHWC: np.ndarray) -> np.ndarray:
    """F H W: the square root of the size of colour steps, so that faint outlines count beside bold ones."""
    clip = clip_FHWC / 255
    down, right = np.gradient(clip, axis=(1, 2))
    return np.sqrt(np.sqrt((down**2 + right**2).sum(-1)))


def _blurred(maps_FHW: np.ndarray) -> np.ndarray:
    sigma = BLUR * min(maps_FHW.shape[1:])
    reach = max(1, round(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in (1, 2):
        padded = np.pad(maps_FHW, [(reach, reach) if axis == a else (0, 0) for a in range(3)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(weights), axis)
        maps_FHW = windows @ (weights / weights.sum())
    return maps_FHW


def _correlation(a_FHW: np.ndarray, b_FHW: np.ndarray) -> np.ndarray:
    a, b = (x.reshape(len(x), -1) - x.mean((1, 2))[:, None] for x in (a_FHW, b_FHW))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.zeros(len(a)), where=size > 1e-9)


def write_agreement(run: Path) -> dict:
    """Measures a run's first and last previews and writes agreement.json for the report. Returns what it wrote.

    {"measure": str, "before": {"step", "previews": [{"own", "others": [...]}], "margin", "first"}, "after": ...}
    margin: own less the mean of others, averaged; first: share of previews that agree best with their own control.
    """
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in (run / "previews").glob("step-*"))
    told: dict = {"measure": MEASURE}
    for when, step in (("before", steps[0]), ("after", steps[-1])):
        clips = sorted((run / "previews" / f"step-{step}").glob("*.mp4"), key=lambda path: int(path.stem))
        rows = [_row(clip, [run / "previews/control" / other.name for other in clips]) for clip in clips]
        told[when] = {
            "step": step,
            "previews": rows,
            "margin": float(np.mean([row["own"] - np.mean(row["others"]) for row in rows])),
            "first": float(np.mean([row["own"] > max(row["others"]) for row in rows])),
        }
    (run / "agreement.json").write_text(json.dumps(told, indent=1) + "\n")
    return told


def _row(clip: Path, controls: list[Path]) -> dict:
    seen = measure(clip, "video")
    shape = Shape(seen.frames, seen.height, seen.width)
    scores = agreement(_read(clip, shape), [_read(path, shape) for path in controls])
    others = [score for score, path in zip(scores, controls, strict=True) if path.name != clip.name]
    return {"own": scores[[path.name for path in controls].index(clip.name)], "others": others}


def _read(path: Path, shape: Shape) -> np.ndarray:
    """F H W C of that shape, whatever the file's own: stretched in time and space."""
    frames = np.linspace(0, measure(path, "video").frames - 1, shape.frames).round().astype(int)
    return read_frames(path, frames.tolist(), Crop(shape.height, shape.width, 0, 0), shape).transpose(0, 2, 3, 1)
