"""Start-up: the scan of 100,000 rows with a warm index (each row a picture and its control: 200,000 files)."""

from __future__ import annotations

import json
import os
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
    print(f"scan of {ROWS} rows, {2 * ROWS} files: {cold:.1f} s")
    print(f"again: {warm:.2f} s; after two files changed: {changed:.2f} s")
    return {"scan_cold_s": cold, "scan_warm_s": warm, "scan_two_changed_s": changed}


if __name__ == "__main__":
    main()
