"""The folder of a cache: shards of tensors, and a manifest that alone says what is in them.

manifest/00003.jsonl     one for each process that wrote: a line for each shard: its bytes, hash, entries and their sums
shards/00003-00012.safetensors     the twelfth shard of that process; tensors named KEY/NAME

A shard is written beside, flushed, renamed; then its line is added to the manifest. Whatever moment a process is
killed or the disk is full at, what the manifest names is whole, and what it does not name is never read. Processes
share nothing but the folder: the number of a manifest is taken by whoever creates the file. A lock, empty, keeps
`prune` from a folder that is being written to.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Set
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reeltune.core.errors import UserError, refuse
from reeltune.core.files import flush_folder, whole_file, writing
from reeltune.core.reading import as_user_error, bare_name, few, json_value, reason_of

FORMAT = 1  # of the manifest
MANIFEST = "manifest"  # a folder of every cache
SHARD_BYTES = 256 * 2**20  # at most, but for one entry that is larger; a kill loses as much of the work at most
OPEN_SHARDS = 64  # mapped at a time in one process
SPLITS = {"train", "held_out", "text"}  # what an entry may be of
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """A line of the manifest."""

    name: str
    bytes: int
    blake2b: str
    entries: Mapping[str, str]  # key -> "train", "held_out" or "text"
    crc32: Mapping[str, int] | None  # key -> `checksum` of its tensors; None: written by a version before 0.2
    contents: Mapping[str, str]  # key -> what its files held, where that is known


@dataclass
class Manifest:
    """All lines of all processes."""

    facts: list[dict[str, Any]] = field(default_factory=list)  # how each process encoded
    shards: dict[str, Shard] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # key -> why the file could not be read


def parts(folder: Path) -> list[Path]:
    """The manifest's files, oldest first."""
    return sorted(path for path in (folder / MANIFEST).glob("*.jsonl") if path.stem.isdigit())


def read_manifest(folder: Path) -> Manifest:
    """All lines of the folder's manifest, none where it has none. A last line without its end was being written when
    the process was killed.

    Raises UserError for lines that cannot be read, and for a manifest of another version.
    """
    manifest, problems = Manifest(), []
    for part in parts(folder):
        with as_user_error(part, "cannot be read", "remove it, and reeltune cache encodes again what it named"):
            *lines, _ = part.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                _take(manifest, json_value(line))
            except (ValueError, KeyError, TypeError) as broken:
                problems.append(
                    f"line {number} of {part} is damaged or of another version ({reason_of(broken)}); remove that "
                    "file, and reeltune cache encodes again what it named"
                )
    refuse(str(folder), few(problems))
    return manifest


def _take(manifest: Manifest, row: dict[str, Any]) -> None:
    """A line's part of the manifest. Raises KeyError, TypeError or ValueError for what is none of ours."""
    if "shard" in row:
        name, size_bytes, hashed, entries = bare_name(row["shard"]), row["bytes"], row["blake2b"], row["entries"]
        if type(size_bytes) is not int or not isinstance(hashed, str) or not set(_words(entries).values()) <= SPLITS:
            raise ValueError(f"shard {name} has bytes, blake2b or entries of another kind")
        sums = row.get("crc32")
        if sums is not None and (not isinstance(sums, dict) or sums.keys() != entries.keys()):
            raise ValueError(f"shard {name} has sums of other entries")
        manifest.shards[name] = Shard(name, size_bytes, hashed, entries, sums, _words(row.get("contents", {})))
    elif "failed" in row:
        manifest.failed |= _words(row["failed"])
    elif row["format"] == FORMAT:
        manifest.facts.append(dict(row["facts"]))
    else:
        raise ValueError(f"format {row['format']}, and this version reads {FORMAT}")


def _words(table: Any) -> dict[str, str]:
    """Raises TypeError for anything but a table of text."""
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise TypeError("a table of text is expected")
    return table


# ---- writing


class Writer:
    """Entries gather in memory until they fill a shard. `close` writes what is left.

    lock: where the folder is locked already. Raises UserError if the disk is full or refuses; what the manifest names
    stays.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], shard_bytes: int = SHARD_BYTES, *, lock: IO[str] | None = None
    ):
        self.folder, self.facts, self.shard_bytes, self._lock = folder, facts, shard_bytes, lock
        self.count = self.bytes = 0  # written
        self._manifest: FileIO | None = None
        self._number = 0
        self._clear()

    def _clear(self) -> None:
        self._tensors: Tensors = {}
        self._entries: dict[str, str] = {}
        self._sums: dict[str, int] = {}
        self._contents: dict[str, str] = {}
        self._failed: dict[str, str] = {}
        self._size = 0  # bytes

    def add(self, key: str, split: str, tensors: Tensors, content: str = "") -> None:
        """Kept as they are, in the smallest of their own type and half floats that holds them exactly. content: of the
        files that they were made of, where it is known."""
        packed = {f"{key}/{name}": pack(tensor) for name, tensor in tensors.items()}
        size = sum(tensor.nbytes for tensor in packed.values())
        if self._size and self._size + size > self.shard_bytes:
            self.flush()
        self._tensors |= packed
        self._entries[key] = split
        self._contents |= {key: content} if content else {}
        self._sums[key] = checksum({name.partition("/")[2]: tensor for name, tensor in packed.items()})
        self._size += size

    def fail(self, key: str, reason: str) -> None:
        """The file it would be made of cannot be read."""
        self._failed[key] = reason

    def flush(self) -> None:
        """Everything added so far is on the disk, and in the manifest; or forgotten, if it cannot be."""
        tensors, entries, sums, failed = self._tensors, self._entries, self._sums, self._failed
        contents = self._contents
        self._clear()
        if not entries and not failed:
            return
        with writing(self.folder, "nothing in it is lost"):
            manifest = self._manifest or self._open()
            if entries:
                self._number += 1
                name = f"{Path(str(manifest.name)).stem}-{self._number:05}.safetensors"
                data = save(tensors)
                with whole_file(self.folder / "shards" / name, "wb") as file:
                    file.write(data)
                hashed = hashlib.blake2b(data, digest_size=16).hexdigest()
                row = {"shard": name, "bytes": len(data), "blake2b": hashed, "entries": entries, "crc32": sums}
                row |= {"contents": contents} if contents else {}
                _add_line(manifest, row)
                self.count += len(entries)
                self.bytes += len(data)
            if failed:
                _add_line(manifest, {"failed": failed})

    def _open(self) -> FileIO:
        """The manifest of this process; the folder is locked as long as it is open."""
        for name in (MANIFEST, "shards"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._lock = self._lock or _locked(self.folder, fcntl.LOCK_SH)
        number = max((int(path.stem) for path in parts(self.folder)), default=0)
        while True:
            number += 1
            try:
                manifest = (self.folder / MANIFEST / f"{number:05}.jsonl").open("xb", buffering=0)
            except FileExistsError:  # another process was quicker
                continue
            flush_folder(self.folder / MANIFEST)
            self._manifest = manifest
            _add_line(manifest, {"format": FORMAT, "facts": dict(self.facts)})
            return manifest

    def close(self) -> None:
        """Raises as `flush`."""
        try:
            self.flush()
        finally:
            for file in (self._manifest, self._lock):
                if file is not None:
                    file.close()


def _locked(folder: Path, how: int) -> IO[str]:
    """Locks the folder until the file that this gives is closed: writers share it, `prune` has it alone."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "lock").open("a")
    fcntl.flock(file, how)
    return file


def _add_line(file: FileIO, row: Mapping[str, Any]) -> None:
    left = (json.dumps(row) + "\n").encode()
    while left:
        left = left[file.write(left) :]  # unbuffered: what a full disk refuses is not tried again
    os.fsync(file.fileno())


def pack(tensor: Tensor) -> Tensor:
    """The same numbers on the CPU, in half the bytes if bfloat16 or float16 holds every one exactly."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()  # a copy: two conditions may be one tensor
    if tensor.dtype == torch.float32:
        for half in (torch.bfloat16, torch.float16):
            smaller = tensor.to(half)
            if torch.equal(smaller.float().view(torch.int32), tensor.view(torch.int32)):
                return smaller
    return tensor


def checksum(tensors: Tensors) -> int:
    """CRC-32 over names, types, shapes and bytes: 3 GB/s on one core, against 0.6 of BLAKE2b (measured, 2026-11-26)."""
    total = 0
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), total)
        total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def unpack(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


# ---- reading


@lru_cache(maxsize=OPEN_SHARDS)
def _mapped(path: str, blake2b: str) -> tuple[Any, dict[str, list[str]]]:
    """(the file, names of tensors by key); blake2b, that another file of that name is not taken for it."""
    file, names = safe_open(path, "pt", device="cpu"), {}
    for name in file.keys():  # noqa: SIM118
        key, _, own = name.partition("/")
        names.setdefault(key, []).append(own)
    return file, names


def size_of(path: Path) -> int:
    """-1 where there is no file."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1


class Store:
    """Entries by key, from mapped files. Shards that are gone or of another size count as not there."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        manifest = read_manifest(folder)
        there = [shard for shard in manifest.shards.values() if size_of(folder / "shards" / shard.name) == shard.bytes]
        self.facts = manifest.facts
        self.hashes = {shard.name: shard.blake2b for shard in there}
        self.sums = {shard.name: shard.crc32 for shard in there}
        self._checked: set[str] = set()  # shards without sums that were read whole
        self.entries = {key: (shard.name, split) for shard in there for key, split in shard.entries.items()}
        self.contents = {key: shard.contents.get(key, "") for shard in there for key in shard.entries}
        self.failed = {key: reason for key, reason in manifest.failed.items() if key not in self.entries}

    def has_made(self, key: str, content: str) -> bool:
        """Whether the entry is there, and of files that held this; of what is not known on either side, is there."""
        return key in self.entries and (not content or self.contents[key] in ("", content))

    def read(self, key: str, split: str) -> Tensors:
        """Raises UserError if the shard is gone, written for another split, or does not hold what was written."""
        shard, written_for = self.entries[key]
        if written_for != split:
            raise UserError("cache_folder", f"{key} in {shard} was written for {written_for} and is asked for {split}")
        path = self.folder / "shards" / shard
        try:
            file, names = _mapped(str(path), self.hashes[shard])
            tensors = {name: file.get_tensor(f"{key}/{name}") for name in names.get(key, ())}
            if not self._is_as_written(path, key, tensors):
                raise UserError(
                    "cache_folder",
                    f"{path} is damaged: {key} has other bytes than were written; reeltune cache verify sets the file "
                    "aside, and reeltune cache encodes again what was in it",
                )
            return {name: unpack(tensor) for name, tensor in tensors.items()}
        except (OSError, SafetensorError) as broken:
            raise UserError(
                "cache_folder", f"{path} cannot be read ({broken}); reeltune cache verify tells what is damaged"
            ) from broken

    def _is_as_written(self, path: Path, key: str, tensors: Tensors) -> bool:
        """Whether an entry has the sum that it was written with; a shard without sums is read whole the first time."""
        sums = self.sums[path.name]
        if sums is not None:
            return checksum(tensors) == sums.get(key)
        if path.name not in self._checked and _hashed(path) != self.hashes[path.name]:
            return False
        self._checked.add(path.name)
        return True


def _hashed(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


# ---- care


def set_aside_damaged(folder: Path) -> list[str]:
    """Reads every byte. Shards that are not as they were written are renamed, so that their entries count as not
    there, as those of shards that are gone do; returns what is wrong with each.
    """
    problems = []
    for shard in read_manifest(folder).shards.values():
        path = folder / "shards" / shard.name
        if size_of(path) < 0:
            continue
        if _hashed(path) != shard.blake2b:
            problems.append(f"{path} is not as it was written ({size_of(path)} bytes, then {shard.bytes})")
            path.replace(path.with_suffix(".damaged"))
    return problems


def prune(folder: Path, wanted: Set[str], facts: Mapping[str, Any]) -> int:
    """Deletes all but the wanted keys, and files that no manifest names. Returns the bytes freed.

    Wanted entries of a shard with others are copied to a new shard first; a kill at any moment leaves a whole cache.
    Raises UserError if a process is writing to it, and CannotWriteError.
    """
    with writing(folder, "nothing in it is lost"):
        before = _bytes_in(folder)
        _prune(folder, wanted, facts)
        return before - _bytes_in(folder)


def _bytes_in(folder: Path) -> int:
    return sum(size_of(path) for path in (folder / "shards").glob("*"))


def _prune(folder: Path, wanted: Set[str], facts: Mapping[str, Any]) -> None:
    try:
        lock = _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as busy:
        raise UserError("cache_folder", f"a process is writing to {folder}; prune when it is done") from busy
    store, stays, there = Store(folder), set(), parts(folder)
    with closing(Writer(folder, facts, lock=lock)) as writer:
        for shard in read_manifest(folder).shards.values():
            kept = [key for key in shard.entries if key in wanted and store.entries.get(key, ("",))[0] == shard.name]
            if len(kept) == len(shard.entries):
                stays.add(shard.name)
                continue
            for key in kept:
                writer.add(key, shard.entries[key], store.read(key, shard.entries[key]), shard.contents.get(key, ""))
        for key in store.failed.keys() & wanted:
            writer.fail(key, store.failed[key])
        writer.flush()
        for part in there:
            rows = [json_value(line) for line in part.read_bytes().split(b"\n")[:-1]]
            rows = [row for row in rows if row.get("shard") in stays or "format" in row]
            if len(rows) > 1:
                with whole_file(part) as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            else:
                part.unlink()
        named = read_manifest(folder).shards
        for path in (folder / "shards").glob("*"):
            if path.name not in named:
                path.unlink()
