"""A folder of pictures and clips, and lists of them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from reeltune.data.media import write_clip

PLAIN = frozenset()
CONTROL = frozenset({"control"})


def lay_out(folder: Path) -> Path:
    """Four pictures, two clips, and their list in each of the three forms."""
    entries = []
    for n in range(4):
        Image.new("RGB", (64 + 16 * n, 48), (40 * n, 90, 30)).save(folder / f"{n}.png")
        entries.append({"file_path": f"{n}.png", "text": f'picture, "{n}"', "type": "image"})
    for n in range(2):
        write_clip(folder / f"{n}.mp4", np.full((9 + n, 48, 64, 3), 50 * n, np.uint8), 8)
        entries.append({"file_path": f"{n}.mp4", "text": f"clip\n{n}", "type": "video"})
    (folder / "list.json").write_text("\ufeff" + json.dumps(entries, indent=1), encoding="utf-8")
    (folder / "list.jsonl").write_text("\n\n".join(map(json.dumps, entries)) + "\n")
    cells = ['"' + entry["text"].replace('"', '""') + '"' for entry in entries]
    rows = [f"{entry['file_path']},{cell},{entry['type']}," for entry, cell in zip(entries, cells, strict=True)]
    (folder / "list.csv").write_text("\n".join(["file_path,text,type,control_file_path", *rows]), encoding="utf-8-sig")
    return folder


def write_list(folder: Path, entries: list) -> Path:
    meta = folder / "rows.json"
    meta.write_text(json.dumps(entries))
    return meta
