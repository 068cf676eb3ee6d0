"""Clips to read: their files, the records and a reader of them, and whether two batches are the same."""

from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reeltune.core.types import Batch, Record
from reeltune.data.loader import Reader
from reeltune.data.media import write_clip
from reeltune.data.plan import Plan
from reeltune.data.records import Records
from reeltune.data.shapes import SizeRules

RULES = SizeRules(
    video_sample_n_frames=5,
    video_sample_size=32,
    image_sample_size=48,
    enable_bucket=True,
    random_frame_crop=True,
    control_ref_image="random",
)
POSES = "\n" + "\n".join(f"0 0.5 0.9 0.5 0.5 0 0 1 0 0 {0.1 * i} 0 1 0 0 0 0 1 {0.2 * i}" for i in range(6))


def clip(path, frames: int, height: int, width: int, seed: int):
    """Blobs that move, so that neighbouring frames differ."""
    rows, columns = np.mgrid[:height, :width]
    picture = 127 + 120 * np.sin((rows + columns * (1 + seed)) / 7)
    moving = np.stack([np.roll(picture, 3 * i, axis=1) for i in range(frames)])
    write_clip(path, np.repeat(moving[..., None], 3, axis=-1).astype(np.uint8), 12.0)


def write_clips(folder: Path) -> Path:
    """Five clips with controls, three pictures and a camera path."""
    for i in range(5):
        clip(folder / f"{i}.mp4", 14 + i, 48, 64, seed=i)
        clip(folder / f"{i}_control.mp4", 14 + i, 48, 64, seed=9 + i)
    for i in range(3):
        Image.effect_noise((80, 60), 50 + i).convert("RGB").save(folder / f"{i}.png")
    (folder / "path.txt").write_text(POSES)
    return folder


def rows(folder) -> list[Record]:
    clips = [
        Record(
            entry=i,
            path=str(folder / f"{i}.mp4"),
            text=f"clip {i}",
            kind="video",
            frames=14 + i,
            fps=12.0,
            height=48,
            width=64,
            control_path=str(folder / f"{i}_control.mp4"),
            camera_path=str(folder / "path.txt"),
        )
        for i in range(5)
    ]
    pictures = [
        Record(5 + i, str(folder / f"{i}.png"), f"picture {i}", "image", 1, 0.0, 60, 80, str(folder / f"{i}.png"))
        for i in range(3)
    ]
    return clips + pictures


def reader(records, *, group=2, rules=RULES, seed=1, drop=None, needs=frozenset({"control"}), **more) -> Reader:
    records = records if isinstance(records, Records) else Records.of(records)
    plan = partial(Plan, records, rules, group=group, seed=seed)
    return Reader(records, plan, group=group, drop=drop or {}, text_drop_ratio=0.1, needs=needs, **more)


def same(one: Batch, other: Batch):
    for name in (field.name for field in fields(Batch)):
        left, right = getattr(one, name), getattr(other, name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right), name
        elif name == "keep":
            assert {key: keep.tolist() for key, keep in left.items()} == {k: v.tolist() for k, v in right.items()}
        else:
            assert left == right, name
