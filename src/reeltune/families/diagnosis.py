"""Why a path is no checkpoint: what is there, the rule, the remedy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from reeltune.core.reading import absent, few, foreign
from reeltune.families import tensor_files

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def no_folder(path: Path) -> str:
    """What is wrong with a path that is no folder, and the remedy."""
    text = str(path)
    if path.is_symlink():
        return f"{text!r} is not a folder: it {absent(path)}"
    if path.is_file():
        return f"{text!r} is not a folder but a file; give the folder of a download"
    if HUB_NAME.fullmatch(text):
        return (
            f"{text!r} is not a folder; if it is a name on a hub: nothing is downloaded here; fetch it with "
            f"`hf download {text} --local-dir FOLDER`, and give that folder"
        )
    return f"{text!r} is not a folder; give that of a download"


def unknown(folder: Path, supported: Sequence[str]) -> str:
    """What is wrong with a folder in which no family finds its checkpoint, and the remedy."""
    names = sorted(entry.name for entry in folder.iterdir())
    there = ", ".join(few(names, 12)) or "nothing"
    rule = f"which is no checkpoint of a supported family ({', '.join(supported)})"
    return f"{folder} holds {there}, {rule}; {_reason(folder, names)}"


def _reason(folder: Path, names: list[str]) -> str:
    """What is known to be found in a checkpoint's place, with the remedy."""
    snapshots = sorted(folder.glob("snapshots/*"))
    if snapshots:
        return f"this is the hub's cache; give {snapshots[-1]}"
    for name in names:
        file = folder / name
        if file.is_symlink() and not file.exists():
            return f"{name} {absent(file)}"
        if file.is_file():
            with file.open("rb") as opened:
                known = foreign(opened.read(512))
            if known:
                return f"{name} is {known[0]}; {known[1]}"
    for place in (folder / "transformer", folder):
        if place.is_dir() and not tensor_files.has_weights(place):
            reason = tensor_files.why_no_weights(place)
            if not reason.startswith("no weights"):
                return f"{place.relative_to(folder.parent)} {reason}"
    inner = [name for name in names if (folder / name / "config.json").exists()]
    if len(names) <= 3 and len(inner) == 1:
        return f"perhaps {folder / inner[0]} is meant"
    return "released and diffusers layouts are known"
