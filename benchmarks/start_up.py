"""Start-up on 100,000 rows, each a picture and its control: the scan, cold and warm, and a run's first step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from reeltune.data.scan import scan

ROWS = 100_000
A_FOLDER = 10_000  # files; each folder links to a picture of its own, as file systems limit the links of one file
CAPTION = "A person in a red coat walks along a quiet street in the rain; the camera follows slowly from behind."


def make(folder: Path) -> Path:
    """The list and its files below `folder`."""
    names = []
    for number in range(2 * ROWS):
        part = folder / f"{number // A_FOLDER:02d}"
        name = part / f"{number % A_FOLDER:06d}.png"
        if number % A_FOLDER == 0:
            part.mkdir()
            Image.new("RGB", (32, 32), (number % 251, 90, 120)).save(part / "seed.png")
        os.link(part / "seed.png", name)
        names.append(str(name.relative_to(folder)))
    entries = [
        {"file_path": path, "control_file_path": control, "text": CAPTION, "type": "image"}
        for path, control in zip(names[:ROWS], names[ROWS:], strict=True)
    ]
    meta = folder / "metadata.json"
    meta.write_text(json.dumps(entries))
    return meta


def first_step_s(folder: Path, meta: Path) -> float:
    """Seconds from the command to the first step in metrics.jsonl, where a run has scanned these rows before."""
    out, model = folder / "run", folder / "model"
    model.mkdir()
    (model / "toy.json").write_text("{}")
    command = [sys.executable, "-m", "reeltune", "train"]
    settings = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": folder,
        "train_data_meta": meta,
        "output_dir": out,
        "image_sample_size": 32,
        "video_sample_size": 32,
        "max_train_steps": 1,
        "logging_steps": 1,
        "mixed_precision": "no",
        "preview_count": 0,
        "report_to": "none",
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    for _ in ("cold", "warm"):
        shutil.rmtree(out / "checkpoint-1", ignore_errors=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
            while '"kind": "step"' not in _text(out / "metrics.jsonl") and run.poll() is None:
                time.sleep(0.02)
            seconds = time.perf_counter() - begin
        if run.returncode:
            raise SystemExit(f"the run ended with {run.returncode}")
    return seconds


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        meta = make(folder)

        def seconds() -> float:
            begin = time.perf_counter()
            found = scan(meta, folder, needs=frozenset({"control"}), index_dir=folder / "index", workers=2)
            assert len(found.records) == ROWS
            return time.perf_counter() - begin

        cold = seconds()
        warm = min(seconds() for _ in range(3))
        Image.new("RGB", (48, 32)).save(folder / "00" / "new.png")
        (folder / "00" / "new.png").replace(folder / "00" / "000000.png")
        Image.new("RGB", (48, 32)).save(folder / "10" / "new.png")
        (folder / "10" / "new.png").replace(folder / "10" / "000000.png")
        changed = seconds()
        first = first_step_s(folder, meta)
    print(f"scan of {ROWS} rows, {2 * ROWS} files: {cold:.1f} s")
    print(f"again: {warm:.2f} s; after two files changed: {changed:.2f} s; a run's first step after {first:.1f} s")
    return {"scan_cold_s": cold, "scan_warm_s": warm, "scan_two_changed_s": changed, "first_step_s": first}


if __name__ == "__main__":
    main()
