"""Which records are held out of training, and how each is always read.  (no torch)"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Sequence

from reeltune.core.errors import UserError
from reeltune.core.rng import seed_of
from reeltune.core.types import Draw, Record, Shape
from reeltune.data.shapes import SizeRules, Source, centre_crop, frame_indices, frame_window, outcomes

NAMED = 10  # files that a message names


def split(records: Sequence[Record], share: float, root: str) -> tuple[list[int], list[int]]:
    """(rows to train on, rows held out), each ascending: `share` of the files, at least one if share is over 0.

    Files are chosen by a hash of their path below `root`, so that neither the run's seed nor the order of the metadata
    matters, new files hardly change the choice, and all entries of one file, or of copies of it, stay on one side.
    Raises UserError if nothing would be left to train on.
    """
    if share == 0:
        return list(range(len(records))), []
    named = [(record.path, record.content) for record in records]
    first_path: dict[int, str] = {}  # of each content
    for path, content in sorted(named):
        first_path.setdefault(content, path)
    files = [first_path[content] if content else path for path, content in named]
    by_hash = sorted(set(files), key=lambda path: seed_of(0, "held out", os.path.relpath(path, root)))
    count = max(1, round(share * len(by_hash)))
    if count >= len(by_hash):
        raise UserError(
            "held_out_share",
            f"{share} of {len(by_hash)} usable files leaves nothing to train on; leave it out, or use more files",
        )
    held = set(by_hash[:count])
    rows: tuple[list[int], list[int]] = ([], [])
    for row, path in enumerate(files):
        rows[path in held].append(row)
    return rows


def refuse_shared(train: Iterable[Record], held_out: Iterable[Record]) -> None:
    """Raises UserError if a file is in both, by its path, another path or as a copy: what is trained on tells nothing
    of learning."""
    trained = list(train)
    paths, by_content = {record.path for record in trained}, {record.content: record.path for record in trained}
    both = {}  # path held out -> path trained on
    for record in held_out:
        copy = by_content.get(record.content) if record.content else None
        if record.path in paths:
            both[record.path] = record.path
        elif copy is not None and filecmp.cmp(record.path, copy, shallow=False):
            both[record.path] = copy
    if both:
        pairs = [path if path == copy else f"{path} (the same as {copy})" for path, copy in sorted(both.items())]
        names = ", ".join(pairs[:NAMED]) + (", ..." if len(both) > NAMED else "")
        raise UserError(
            "validation_data_meta",
            f"train_data_meta has {len(both)} of its files too: {names}; held-out clips must not be trained on; take "
            "them out of one of the two",
        )


def fixed_draw(record: Record, row: int, rules: SizeRules) -> Draw:
    """The one way in which a held-out record is read: its likeliest size, the middle of the clip, frame 0 as reference.

    Noise comes from the row alone, so that runs with different seeds are measured alike.
    """
    if record.kind == "image":
        count, start = 1, 0
    else:
        count, latest = frame_window(rules, record.frames, record.fps)
        start = latest // 2
    likeliest = max(outcomes(rules, [Source(record.kind, record.height, record.width, count)]), key=lambda o: o.p)
    shape = Shape(likeliest.frames, *likeliest.crop)
    frames = (0,) if record.kind == "image" else frame_indices(rules, record.fps, start, shape.frames)
    return Draw(
        record=row,
        shape=shape,
        crop=centre_crop(likeliest.resize[0], shape),
        frames=frames,
        ref_frame=0,
        seed=seed_of(0, "held out", row),
        rate=None if record.kind == "image" else rules.video_sample_fps,
    )
