"""What an entry of the cache is known by: a hash of everything that it was made of, and of nothing else.  (no torch)

A clip's latents do not depend on its caption, so that a changed caption is encoded alone. Files of the data are known
by path below train_data_dir, size and time of change in whole seconds (which archives and copies keep), and key points
by their bytes and how they are drawn too; those of the checkpoint by their bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from reeltune.core.types import Draw, Record
from reeltune.data.keypoints import is_keypoints
from reeltune.data.pose_drawing import drawing_digest

READING_VERSION = 2  # raise it when the same file, crop and seed are read as other pixels, rays or masks
Split = Literal["train", "held_out"]


def digest(thing: Any) -> str:
    return hashlib.blake2b(json.dumps(thing, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Keys:
    """Hands out keys. facts: how everything is encoded; two caches of other facts share no entry.

    seeds_count: the mode's input depends on the draw's seed, by its mask. text_of_clip: texts depend on their clip.
    """

    facts: Mapping[str, Any]
    root: str  # train_data_dir, absolute
    seeds_count: bool
    text_of_clip: bool

    @cached_property
    def _facts(self) -> str:
        return digest(dict(self.facts))

    def clip(self, record: Record, draw: Draw, split: Split) -> str:
        """The key of a clip's entry, which has all but the text. Raises OSError if a file is gone."""
        files = [path and self._file(path) for path in (record.path, record.control_path, record.camera_path)]
        seed = draw.seen_seed if self.seeds_count else None
        frames = [draw.frames, draw.rate]
        return digest([self._facts, "clip", split, files, draw.shape, draw.crop, frames, draw.ref_frame, seed])

    def text(self, record: Record, clip: str) -> str:
        """The key of a caption's entry. clip: the key of the clip that it belongs to."""
        return digest([self._facts, "text", record.text, clip if self.text_of_clip else None])

    @property
    def null(self) -> str:
        """The key of what a dropped caption becomes."""
        return digest([self._facts, "null"])

    def _file(self, path: str) -> list[Any]:
        status = os.stat(path)
        known = [os.path.relpath(path, self.root), status.st_size, int(status.st_mtime)]
        return [*known, drawing_digest(path)] if is_keypoints(path) else known
