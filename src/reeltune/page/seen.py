"""A micro-step as it would be trained on: drawn by the plan and read by the reader that training uses."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from reeltune.core.errors import refuse
from reeltune.core.types import Batch, Draw
from reeltune.data.media import write_clip
from reeltune.page.judged import Judged
from reeltune.reporting.first_batch import write_first_batch

FPS = 8.0  # at which clips are shown
RAYS = slice(3, 6)  # of a camera's channels: where each pixel's ray points (data/camera.py)
_one_at_a_time = threading.Lock()


def micro_step(judged: Judged, epoch: int, step: int, store: Path, holds: Callable[[str], bool]) -> dict[str, Any]:
    """The samples of a micro-step, each with its files below `store`. holds: whether a file may be shown.

    Raises UserError where no file can be read or one may not be shown, LookupError for a micro-step that there is not.
    """
    assert judged.inputs is not None and judged.family is not None
    reader, needs = judged.inputs.reader, judged.family.needs[judged.mode]
    with _one_at_a_time:
        if not 0 <= step < len(reader.plan(epoch)):
            raise LookupError(step)
        records = [judged.inputs.train[draw.record] for draw in reader.plan(epoch)[step]]
        named = [path for one in records for path in (one.path, one.control_path, one.camera_path) if path]
        lines = [f"{path} leads out of the served folder; serve one above it" for path in named if not holds(path)]
        refuse("micro-step", lines)
        batch = reader[epoch, step, 0, 1]
        folder = store / "seen" / digest(batch, judged)
        if not folder.is_dir():
            _write(batch, folder, reference="ref" in needs)
    return {
        "key": folder.name,
        "micro_steps": len(reader.plan(epoch)),
        "shape": tuple(batch.draws[0].shape),
        "samples": [_sample(judged, batch, i, folder) for i in range(len(batch.draws))],
        "failures": [(judged.inputs.train[record].path, reason) for record, reason in batch.failures],
    }


def digest(batch: Batch, judged: Judged) -> str:
    """Another for other draws, other files and other captions."""
    assert judged.inputs is not None
    records = [judged.inputs.train[draw.record] for draw in batch.draws]
    told = repr([(draw, record) for draw, record in zip(batch.draws, records, strict=True)] + [judged.mode])
    return hashlib.blake2b(told.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def _write(batch: Batch, folder: Path, *, reference: bool) -> None:
    """The folder is there with all its files or not at all, whoever else writes the same."""
    beside = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.partial")
    try:
        write_first_batch(batch, beside, reference=reference, fps=FPS)
        _write_more(batch, beside)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another server has made it meanwhile
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_more(batch: Batch, folder: Path) -> None:
    """Masks, white where the network is to generate; and where the camera's rays point, as colours."""
    if batch.mask_BFHW is not None:
        for i, mask_FHW in enumerate(batch.mask_BFHW.numpy()):
            white_FHWC = np.repeat(mask_FHW[..., None].astype(np.uint8) * 255, 3, axis=-1)
            write_clip(folder / f"{i}_mask.mp4", white_FHWC, FPS)
    if batch.camera_BFCHW is not None:
        for i, rays_FCHW in enumerate(batch.camera_BFCHW.numpy()):
            pointing_FHWC = (rays_FCHW[:, RAYS].transpose(0, 2, 3, 1) + 1) * 127.5
            write_clip(folder / f"{i}_camera.mp4", pointing_FHWC.round().astype(np.uint8), FPS)


def _sample(judged: Judged, batch: Batch, i: int, folder: Path) -> dict[str, Any]:
    assert judged.inputs is not None
    draw, record = batch.draws[i], judged.inputs.train[batch.draws[i].record]
    order = ("pixels", "control", "mask", "camera", "reference")
    files = [
        path for what in order for path in (folder / f"{i}_{what}.mp4", folder / f"{i}_{what}.png") if path.is_file()
    ]
    return {
        "entry": record.entry,
        "text": batch.text[i],
        "dropped": [name for name, keep_B in batch.keep.items() if not keep_B[i]],
        "told": told(draw, (record.height, record.width), record.frames),
        "repeat": draw.repeat,
        "files": [{"name": p.name, "what": p.stem.partition("_")[2], "clip": p.suffix == ".mp4"} for p in files],
    }


def told(draw: Draw, size: tuple[int, int], frames: int) -> list[tuple[str, str]]:
    """What the plan has chosen, in words."""
    crop, shape = draw.crop, draw.shape
    first, last = draw.frames[0], draw.frames[-1]
    return [
        ("frames", f"{first} to {last} of {frames} ({len(draw.frames)} taken)"),
        ("resized", f"{size[1]} x {size[0]} to {crop.width} x {crop.height}"),
        ("cut", f"{shape.width} x {shape.height} from ({crop.left}, {crop.top})"),
        ("reference", f"frame {draw.ref_frame} of those taken"),
    ]
