"""Tensors written by all processes at once, in torch's distributed checkpoint format.

Every tensor is flattened, and each process writes the pieces that it keeps. A reader asks for other pieces: another
number of processes, another engine, or one process that wants a tensor whole.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import as_user_error, bare_name, reason_of

COPY = "restore it from a copy"
# What the metadata of torch's distributed checkpoints is pickled of (torch 2.13).
METADATA = {
    "pathlib": {"PosixPath"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.serialization": {"_get_layout"},
}


@dataclass(frozen=True)
class Piece:
    """Elements `start` on of a flattened tensor of `total` elements."""

    name: str
    values_N: Tensor  # a view of what trains: reading fills it
    start: int
    total: int

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.values_N.numel()]))


def whole(name: str, tensor: Tensor) -> Piece:
    """All of a tensor that this process alone keeps, or keeps as all others do. It must be contiguous."""
    return Piece(name, tensor.detach().view(-1), 0, tensor.numel())


def share(name: str, local: Tensor, shape: torch.Size, rank: int, world: int) -> Piece:
    """What a process keeps of a tensor of that shape whose rows are sharded as torch.chunk does."""
    rows = -(-shape[0] // world) * rank
    per_row = shape.numel() // shape[0]
    return Piece(name, local.detach().view(-1), min(rows, shape[0]) * per_row, shape.numel())


def write(folder: Path, pieces: Iterable[Piece], group: ProcessGroup | None) -> None:
    """All processes of `group` call this; None: this one alone. Empty pieces are left out."""
    by_name = {piece.name: piece for piece in pieces if piece.values_N.numel()}
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    dcp.save(
        by_name,
        storage_writer=writer,
        planner=_Writing(flatten_state_dict=False),
        process_group=group,
        no_dist=group is None,
    )


def read(folder: Path, pieces: Iterable[Piece], metadata: Metadata | None = None) -> None:
    """Fills the pieces; each process reads for itself. Raises UserError naming what is missing or of another size.

    metadata: as `metadata_of` gives it, where it has been read before.
    """
    by_name = {piece.name: piece for piece in pieces if piece.values_N.numel()}
    reader = _Known(folder, metadata or metadata_of(folder))
    stored = {name: _tensor(reader.read_metadata(), name) for name in by_name}
    there = {name: f"{entry.size.numel()} elements" if entry else "missing" for name, entry in stored.items()}
    refuse(
        str(folder),
        [
            f"{name} is {there[name]}; the network has {piece.total}"
            for name, piece in by_name.items()
            if there[name] != f"{piece.total} elements"
        ],
    )
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it reads in one process
            dcp.load(by_name, storage_reader=reader, planner=_Reading(), no_dist=True)
    except CheckpointException as broken:
        reason = next((reason_of(cause) for cause, _ in broken.failures.values()), "")
        raise UserError(str(folder), f"cannot be read ({reason}); {COPY}") from broken


def metadata_of(folder: Path) -> Metadata:
    """What is stored, and where it lies: as large as the checkpoint has pieces. Raises UserError for a damaged file."""
    path = folder / ".metadata"
    with as_user_error(path, "is damaged", COPY), path.open("rb") as file:
        metadata = _Unpickler(file).load()
        for info in metadata.storage_data.values():
            bare_name(info.relative_path)
        sizes(metadata)
    return metadata


def sizes(metadata: Metadata) -> dict[str, tuple[int, torch.dtype]]:
    """Elements and dtype of every tensor in it."""
    entries = ((name, _tensor(metadata, name)) for name in metadata.state_dict_metadata)
    return {name: (entry.size.numel(), entry.properties.dtype) for name, entry in entries if entry is not None}


def _tensor(metadata: Metadata, name: str) -> TensorStorageMetadata | None:
    """What the metadata says of one name: who reads a checkpoint tensor by tensor must not go through all of it each
    time."""
    entry = metadata.state_dict_metadata.get(name)
    return entry if isinstance(entry, TensorStorageMetadata) else None


class _Unpickler(pickle.Unpickler):
    """torch reads this file by a plain pickle.load, which would run any code in it."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) == ("torch", "Size") or name in METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")


class _Known(dcp.FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_, **__) -> Metadata:
        return self._metadata


class _Writing(dcp.DefaultSavePlanner):
    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        self.state_dict, self.is_coordinator = state_dict, is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(piece) for piece in self.state_dict.values()])
        return self.plan

    @staticmethod
    def _item(piece: Piece) -> WriteItem:
        properties = TensorProperties.create_from_tensor(piece.values_N)
        data = TensorWriteData(chunk=piece.chunk, properties=properties, size=torch.Size([piece.total]))
        return WriteItem(MetadataIndex(piece.name, piece.chunk.offsets), WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.state_dict[write_item.index.fqn].values_N


class _Reading(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict, metadata: Metadata | None = None, is_coordinator=False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, piece in self.state_dict.items():
            assert self.metadata is not None
            entry = _tensor(self.metadata, name)
            assert entry is not None  # or `read` would have refused it
            items += create_read_items_for_chunk_list(name, entry, [piece.chunk])
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        values_N = self.state_dict[read_item.dest_index.fqn].values_N
        return values_N.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: what was read lies in place."""
