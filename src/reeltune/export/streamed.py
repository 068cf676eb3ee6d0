"""Weights written to safetensors files one tensor at a time: memory never holds two of them.

The format: https://github.com/huggingface/safetensors#format. The library's own writer takes a whole file at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from reeltune.families import tensor_files
from reeltune.memory.size import size_bytes

STEM = tensor_files.STEMS[0]
NAMES = {dtype: name for name, dtype in tensor_files.DTYPES.items()}


def write(
    folder: Path, outline: Mapping[str, Tensor], tensor: Callable[[str], Tensor], max_shard_bytes: int
) -> list[Path]:
    """One file, or shards of at most so many bytes with an index, as diffusers names them. Returns the files.

    outline: name -> meta tensor, the shape and dtype of what `tensor` then gives for that name.
    A tensor that is larger than a shard has one of its own.
    """
    shards = _split(outline, max_shard_bytes)
    total = len(shards)
    files = [folder / f"{STEM}-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    if total == 1:
        files = [folder / f"{STEM}.safetensors"]
    for file, names in zip(files, shards, strict=True):
        _write_file(file, {name: outline[name] for name in names}, tensor)
    if total > 1:
        where = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
        metadata = {"total_size": size_bytes(list(outline.values()))}
        index = {"metadata": metadata, "weight_map": dict(sorted(where.items()))}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return files


def _split(outline: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Names by shard: wide dtypes first, so that every tensor lies at a multiple of its element's size."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name in sorted(outline, key=lambda name: -outline[name].itemsize):
        tensor_bytes = size_bytes(outline[name])
        if shards[-1] and shard_bytes + tensor_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += tensor_bytes
    return shards


def _write_file(file: Path, outline: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, meta in outline.items():
        begin, end = end, end + size_bytes(meta)
        header[name] = {"dtype": NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name, meta in outline.items():
            values = tensor(name)
            assert (values.shape, values.dtype) == (meta.shape, meta.dtype), name
            out.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
