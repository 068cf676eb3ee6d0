"""A small data set and recipes for whole runs in tests."""

import csv
import json
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image
from torch import Tensor

from reeltune.config.parse import build
from reeltune.config.recipe import Recipe
from reeltune.data import measuring
from reeltune.data.measuring import File
from reeltune.data.media import write_clip


def data_set(folder: Path, clips: int = 7, stills: int = 2, frames: int = 12) -> Path:
    """Clips, outline controls, pose files and stills of random noise that moves; returns the folder.

    They are measured here, in `index`, and not in each run.
    """
    rng = np.random.RandomState(0)
    control, camera = [], []
    for i in range(clips + stills):
        picture = rng.randint(0, 255, (6, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        kind = "video" if i < clips else "image"
        name = f"{i}.mp4" if kind == "video" else f"{i}.png"
        moving = np.stack([np.roll(picture, 2 * f, axis=1) for f in range(frames)])
        for part, pixels in (("train", moving), ("control", 255 - moving)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            if kind == "video":
                write_clip(folder / part / name, pixels, 8.0)
            else:
                Image.fromarray(pixels[0]).save(folder / part / name)
        row = {"file_path": f"train/{name}", "text": f"thing {i}", "type": kind}
        control.append({**row, "control_file_path": f"control/{name}"})
        if kind == "video":
            camera.append({**row, "control_file_path": f"camera/{i}.txt"})
            write_poses(folder / "camera" / f"{i}.txt", frames, drift=0.01 * (i + 1))
    plain = [{name: value for name, value in row.items() if name != "control_file_path"} for row in control]
    for name, entries in (("metadata", plain), ("metadata_control", control), ("metadata_camera", camera)):
        (folder / f"{name}.json").write_text(json.dumps(entries))
    with (folder / "metadata_control.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, control[0])
        table.writeheader()
        table.writerows(control)
    return measured(folder)


def measured(folder: Path) -> Path:
    """Measures the files of a data set into its `index`; returns the folder."""
    kinds = {".mp4": "video", ".png": "image", ".txt": "camera"}
    files = [File(str(path), kinds[path.suffix]) for path in sorted(folder.glob("*/*"))]
    with patch.object(measuring, "_run", measure_here):
        measuring.measure_files(
            files,
            measuring.stamps(file.path for file in files),
            decode_check="ends",
            index_dir=folder / "index",
            workers=1,
            seconds_per_file=60.0,
            progress=None,
        )
    return folder


def measure_here(files, numbers, decode_check, *_):
    """In place of measuring's processes: to start one takes 1.2 s (measured, 2026-11-27), longer than to read a small
    clip."""
    return ((number, measuring._examine(files[number], decode_check)) for number in numbers)


def write_poses(path: Path, count: int, drift: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["a line that is not read"]
    for i in range(count):
        numbers = [i, 0.5, 0.9, 0.5, 0.5, 0, 0, 1, 0, 0, drift * i, 0, 1, 0, 0, 0, 0, 1, 0]
        lines.append(" ".join(map(str, numbers)))
    path.write_text("\n".join(lines) + "\n")


def recipe(checkpoint: Path, data: Path, out: Path, **changes) -> Recipe:
    """Six steps of five-frame clips, two to a batch, nothing dropped by chance of the machine."""
    meta = "metadata_camera.json" if changes.get("train_mode") == "control_ref_camera" else "metadata_control.json"
    settings = {
        "pretrained_model_name_or_path": str(checkpoint),
        "train_data_dir": str(data),
        "train_data_meta": str(data / meta),
        "output_dir": str(out),
        "video_sample_n_frames": 5,
        "video_sample_stride": 1,
        "video_sample_size": 32,
        "image_sample_size": 32,
        "token_sample_size": 32,
        "enable_bucket": True,
        "train_batch_size": 2,
        "max_train_steps": 6,
        "mixed_precision": "no",
        "learning_rate": 1e-3,
        "dataloader_num_workers": 0,
        "checkpointing_steps": 2,
        "logging_steps": 2,
        "held_out_share": 0.2,
        "preview_count": 0,
        "held_out_levels": 2,
        "report_to": ["none"],
    }
    if (data / "index").is_dir():
        shutil.copytree(data / "index", out / "index", dirs_exist_ok=True)
    return build({**settings, **changes})


def write_array(path: Path, pixels_BFCHW: Tensor, fps: float) -> None:
    """In place of `write_pixels`: of equal clips an encoder with several threads makes other bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, pixels_BFCHW[0].numpy())
