"""What each record was, in three numbers: a run that goes on then notices what has changed of its data.  (no torch)"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from reeltune.core.reading import few
from reeltune.core.types import Record
from reeltune.data.keypoints import is_keypoints
from reeltune.data.pose_drawing import drawing_digest
from reeltune.data.records import Records


@dataclass(frozen=True)
class Identity:
    """What tells every record from others, in the plan's order."""

    entry: np.ndarray  # int64: place in the metadata file
    name: np.ndarray  # uint64: of the paths, from the data's folder
    content: np.ndarray  # uint64: of kind, frames, rate and size, and the files' bytes counted
    text: np.ndarray  # uint64
    camera: np.ndarray | None = None  # uint64, of the camera path's bytes; None of checkpoints before 2026-11-27
    control: np.ndarray | None = None  # int64: Record.control_content; None of checkpoints before 2026-11-27 too

    @classmethod
    def of(cls, records: Records, root: Path) -> Identity:
        """Asks the system for the size of every file, and opens none but key points and camera paths, which are small
        and may be mended without another size. root: of the data; a data set may move."""
        rows = np.array([_hashes(record, str(root.absolute()) + os.sep) for record in records], np.uint64)
        name, content, text, camera = rows.reshape(-1, 4).T
        return cls(np.array(records.entry), name, content, text, camera, np.array(records.control_content))

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"record_{name}": array for name, array in vars(self).items() if array is not None}

    @classmethod
    def stored(cls, arrays: Mapping[str, np.ndarray]) -> Identity | None:
        """What a checkpoint stored; None if it has nothing of it, as versions before 0.2 wrote."""
        if "record_name" not in arrays:
            return None
        keys = {name: f"record_{name}" for name in cls.__dataclass_fields__}
        return cls(**{name: arrays[key] for name, key in keys.items() if key in arrays})

    def __len__(self) -> int:
        return len(self.name)

    def known(self) -> list[tuple[int, int]]:
        """Each record's name, and how many of that name came before it."""
        before: Counter[int] = Counter()
        pairs = []
        for name in self.name.tolist():
            pairs.append((name, before[name]))
            before[name] += 1
        return pairs


def _hashes(record: Record, root: str) -> tuple[int, int, int, int]:
    paths = [path for path in (record.path, record.control_path, record.camera_path) if path]
    names = "\0".join(path.removeprefix(root) for path in paths)
    sizes = [_drawn(path) if is_keypoints(path) else _size_bytes(path) for path in paths]
    facts = record.kind, record.frames, record.fps, record.height, record.width, record.content
    content = f"{facts} {sizes}"
    return _hash(names), _hash(content), _hash(record.text), _bytes_of(record.camera_path)


def _hash(text: str) -> int:
    return _number(text.encode("utf-8", "surrogateescape"))


def _number(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def _bytes_of(path: str | None) -> int:
    """0 of a file that is not there."""
    try:
        data = Path(path).read_bytes() if path else b""
    except OSError:
        data = b""
    return _number(data) if data else 0


def _drawn(path: str) -> str:
    try:
        return drawing_digest(path)
    except OSError:
        return ""


def _size_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


@dataclass(frozen=True)
class Changes:
    """What changed between the records of a checkpoint and those of now."""

    moved_to: np.ndarray  # int64 per record of then: its row now; -1: it is gone
    gone: list[int]  # entries of then
    replaced: list[int]  # entries of now, as those below: the same paths, with other files
    reordered: list[int]  # another place among the records that both have
    added: list[int]
    captions: list[int]

    @property
    def any(self) -> bool:
        return any(map(len, (self.gone, self.replaced, self.reordered, self.added, self.captions)))

    @property
    def breaking(self) -> bool:
        """Whether a record that the run counts on is not what or where it was."""
        return any(map(len, (self.gone, self.replaced, self.reordered)))

    def lines(self, now: Records) -> Iterator[str]:
        """Each kind of change, with its entries."""
        path_of = dict(zip(now.entry.tolist(), (record.path for record in now), strict=True)) if self.any else {}
        if self.gone:
            yield f"gone, by their numbers then: {', '.join(few([str(entry) for entry in self.gone]))}"
        for words, entries in (
            ("other files under the same paths", self.replaced),
            ("in another place of the list", self.reordered),
            ("new", self.added),
            ("other captions", self.captions),
        ):
            if entries:
                named = few([f"entry {entry} ({Path(path_of[entry]).name})" for entry in entries])
                yield f"{words}: {', '.join(named)}"


def changes(then: Identity, now: Identity) -> Changes:
    """Records are the same if their paths are; of equal ones, the first is the first."""
    rows = {pair: row for row, pair in enumerate(now.known())}
    moved_to = np.array([rows.get(pair, -1) for pair in then.known()], np.int64)
    stays = moved_to >= 0
    there = moved_to[stays]
    new = np.ones(len(now), bool)
    new[there] = False
    other = now.content[there] != then.content[stays]
    for mine, theirs in ((now.camera, then.camera), (now.control, then.control)):
        if mine is not None and theirs is not None:
            other |= mine[there] != theirs[stays]
    replaced = there[other]
    retold = there[now.text[there] != then.text[stays]]
    places = np.argsort(np.argsort(there))  # among those that both have
    reordered = there[places != np.arange(len(there))]
    after = np.flatnonzero(new)
    return Changes(
        moved_to,
        gone=then.entry[~stays].tolist(),
        replaced=now.entry[replaced].tolist(),
        reordered=sorted(now.entry[reordered].tolist()),
        added=now.entry[after].tolist(),
        captions=now.entry[retold].tolist(),
    )
