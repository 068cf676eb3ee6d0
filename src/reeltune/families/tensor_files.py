"""Files of weights: which ones hold a network, what their headers say, and their tensors as stored.

A header is checked before it is believed: it is what a hostile or broken file can make large, deep or absurd.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import (
    AGAIN,
    absent,
    as_user_error,
    bare_name,
    beginning,
    brief,
    few,
    json_value,
    read_table,
    refuse_foreign,
)
from reeltune.core.shown import printable

notices = logging.getLogger(__name__)  # without a handler, Python prints its warnings bare on stderr

STEMS = ("diffusion_pytorch_model", "model")  # of weight files in a folder, as diffusers and transformers name them
SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
MOST_SHARDS = 1000  # of one network
MOST_HEADER_BYTES = 16 * 2**20  # of a network of 100,000 tensors
MOST_SIZE = 2**40  # of one axis of a tensor
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # safetensors' names (https://github.com/huggingface/safetensors#format)
TABLES = ("state_dict", "module", "model", "ema")  # in which trainers wrap the one table of weights


# ---- which files


def files_of(path: Path) -> list[Path]:
    """The files that hold one network: `path` itself, or the single file or all shards in a folder.

    Raises UserError if there are none, or a shard is missing, or a single file and shards hold other weights.
    """
    if path.is_file():
        _refuse_unfinished([path])
        return [path]
    files, *others = [_of_stem(path, stem) for stem in STEMS if _has_stem(path, stem)] or [[]]
    if not files:
        raise UserError(str(path), why_no_weights(path))
    for other in others:
        notice(f"{path}: {files[0].name} is read, and {other[0].name}, which is there too, is not")
    _refuse_unfinished(files)
    return files


def _has_stem(folder: Path, stem: str) -> bool:
    names = (f"{stem}.safetensors", f"{stem}.safetensors.index.json")
    return any((folder / name).is_file() for name in names) or bool(_shards(folder, stem))


def _of_stem(folder: Path, stem: str) -> list[Path]:
    """Raises as `files_of`."""
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    listed = _indexed(index) if index.is_file() else {}
    names = sorted(set(listed.values())) if listed else _shards(folder, stem)
    shards = [folder / name for name in names]
    missing = [file.name for file in shards if not file.is_file()]
    if not single.is_file():
        refuse(str(folder), few([f"{name} {absent(folder / name)}" for name in missing]))
        if listed:
            there = {name: file.name for file in shards for name in header_of(file)}
            known = there.keys() & listed.keys()
            lost = sorted(listed.keys() - there) if known else []  # if all are lost, they were renamed
            refuse(str(index), few([f"names {name}, which is in no shard; {AGAIN}" for name in lost]))
            if elsewhere := sorted(name for name in known if there[name] != listed[name]):
                notice(
                    f"{index}: says that {elsewhere[0]} ({len(elsewhere)} in all) lies in {listed[elsewhere[0]]}, and "
                    f"it is read from {there[elsewhere[0]]}, where it is; index and shards may be of two downloads"
                )
        return shards
    if missing:
        notice(f"{folder}: {single.name} is read; {missing[0]}, a shard of what is there too, is not there")
    elif shards and (unlike := _unlike([single], shards)):
        raise UserError(
            str(folder),
            f"holds {single.name} and {len(shards)} shards, {shards[0].name} the first, and these are other weights "
            f"({unlike}); one of the two is left from before: move it away",
        )
    return [single]


def _unlike(files: Sequence[Path], others: Sequence[Path]) -> str:
    """What is not the same in two sets of files, by their headers and each tensor's first row: weights of another
    training differ everywhere. Empty: nothing."""
    ours, theirs = ({name for file in one for name in header_of(file)} for one in (files, others))
    if lone := sorted(ours ^ theirs):
        return f"{lone[0]} is in one of them alone"
    first_rows = dict(row for file in files for row in _first_rows(file))
    return next((name for file in others for name, row in _first_rows(file) if row != first_rows[name]), "")


def _first_rows(file: Path) -> Iterator[tuple[str, tuple[str, list[int], bytes]]]:
    """Each tensor's name, with its type, its shape and the bytes of its first row. Raises UserError."""
    with as_user_error(file, "cannot be read"), safe_open(file, "pt", device="cpu") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            held = tensors.get_slice(name)
            shape = held.get_shape()
            row = held[:1] if shape else tensors.get_tensor(name)
            yield name, (held.get_dtype(), shape, row.reshape(-1).view(torch.uint8).numpy().tobytes())


def _refuse_unfinished(files: Sequence[Path]) -> None:
    """Raises UserError where aria2's control file lies beside a file, which has its size from the start and holes."""
    begun = [file for file in files if file.with_name(f"{file.name}.aria2").exists()]
    refuse(
        str(files[0].parent),
        few([f"{file.name} has {file.name}.aria2 beside it: aria2 has not ended; let it go on" for file in begun]),
    )


def has_weights(path: Path) -> bool:
    """Whether `path` is a file, or a folder in which `files_of` would look further than its names."""
    return path.is_file() or any(_has_stem(path, stem) for stem in STEMS)


def why_no_weights(path: Path) -> str:
    """What is found in weights' place, with the remedy."""
    expected = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    if not path.is_dir():
        return absent(path)
    if any((path / inner / "adapter_config.json").is_file() for inner in ("", "adapter")):
        return "keeps an adapter and no whole weights; adapter_path goes on with it, and export --merge makes weights"
    if steps := sorted(path.glob("checkpoint-*"), key=lambda one: (len(one.name), one.name)):
        return f"is a run's folder; give one of its checkpoints, as {steps[-1]}"
    there = sorted(file.name for file in path.iterdir())
    for name in there:
        if name.endswith(".safetensors") and not (path / name).exists():
            return f"{name} {absent(path / name)}"
        if re.search(r"\.(fp16|bf16|fp32)(-\d+-of-\d+)?\.safetensors$", name):
            return f"has the variant {name} alone, which is not read; download {expected}, or rename it to that"
        if name.endswith((".bin", ".ckpt", ".pt", ".gguf")):
            return f"has {name}, but expected {expected}; download the safetensors files"
    return f"no weights here; expected {expected}"


def _indexed(index: Path) -> dict[str, str]:
    """Tensor -> the file that an index names. Raises UserError for one that could lie elsewhere."""
    table = read_table(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(str(index), f"has no weight_map of tensors to files; {AGAIN}")
    try:
        return {name: bare_name(file) for name, file in table.items()}
    except ValueError as outside:
        raise UserError(str(index), f"{outside}, but weight_map must name files beside it; {AGAIN}") from None


def _shards(folder: Path, stem: str) -> list[str]:
    """Names of all shards that those present belong to, where there is no index."""
    for file in sorted(folder.glob(f"{stem}-*-of-*.safetensors")):
        if match := SHARD.search(file.name):
            number, total = match.groups()
            if len(total) > 9 or int(total) > MOST_SHARDS:
                raise UserError(str(file), f"says that it is one of {total}; a network has at most {MOST_SHARDS}")
            return [f"{stem}-{i + 1:0{len(number)}d}-of-{total}.safetensors" for i in range(int(total))]
    return []


# ---- what is in them


def tensors_of(path: Path, device: str) -> dict[str, Tensor]:
    """The tensors of all files of a network, under the names that they have there."""
    state: dict[str, Tensor] = {}
    for file in files_of(path):
        tensors = tensors_in(file, device)
        twice = sorted(state.keys() & tensors.keys())
        refuse(str(file), few([f"{name} is in another file too; {AGAIN}" for name in twice]))
        state |= tensors
    return state


def tensors_in(file: Path, device: str) -> dict[str, Tensor]:
    """One file's tensors, on the CPU or, as outlines alone, on "meta". Raises UserError for what is no such file."""
    if file.suffix == ".safetensors":
        outlines = header_of(file)
        if device == "meta":
            return outlines
        with as_user_error(file, "cannot be read"), safe_open(file, "pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return _pickled(file, device)


def header_of(file: Path) -> dict[str, Tensor]:
    """Meta tensors from a safetensors file's header: mapping a large file, as safe_open does, needs memory for it.

    Raises UserError for a header that is absurd, or promises other bytes than there are.
    """
    expected = "weights in a safetensors file"
    head = beginning(file, 9)
    if head[8:] != b"{":  # after its length; that may look like anything
        refuse_foreign(file, expected)
        if head.startswith((b"PK\x03\x04", b"\x80")):
            raise UserError(str(file), f"is a file of torch.save; expected {expected}; rename it to end in .pth")
    try:
        if len(head) < 8:
            raise ValueError("it ends after less than 8 bytes")
        length, size_bytes = int.from_bytes(head[:8], "little"), file.stat().st_size
        if length > min(MOST_HEADER_BYTES, size_bytes - 8):
            raise ValueError(f"its header promises {length:,} bytes of header, and the file has {size_bytes:,}")
        return _outlines(json_value(beginning(file, 8 + length)[8:]), size_bytes - 8 - length)
    except ValueError as broken:
        raise UserError(str(file), f"cannot be read ({broken}); {AGAIN}") from broken


def _outlines(header: Any, data_bytes: int) -> dict[str, Tensor]:
    """Raises ValueError."""
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    header.pop("__metadata__", None)
    outlines, end = {}, 0
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"its header says no dtype, shape and place of {brief(name)}") from None
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{brief(name)} has dtype {brief(dtype)}; known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not all(_is_whole(size, MOST_SIZE) for size in (*shape, start, stop)):
            raise ValueError(f"{brief(name)} has shape {brief(shape)} at {brief([start, stop])}")
        if prod(shape) * DTYPES[dtype].itemsize != stop - start or len(shape) > 16:
            raise ValueError(f"{brief(name)} has shape {brief(shape)} in {stop - start} bytes")
        try:
            outlines[name] = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
        except RuntimeError:  # empty, though its sizes are past what can be counted
            raise ValueError(f"{brief(name)} has shape {brief(shape)}") from None
        end = max(end, stop)
    if end != data_bytes:
        raise ValueError(f"its header promises {end:,} bytes of weights and it has {data_bytes:,}")
    return outlines


def _is_whole(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


def _pickled(file: Path, device: str) -> dict[str, Tensor]:
    """A .pth file: only tensors and plain containers are accepted, never code."""
    expected = "weights of torch.save"
    refuse_foreign(file, expected)
    head = beginning(file, 16)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < file.stat().st_size:
        raise UserError(str(file), f"is a safetensors file; expected {expected}; rename it to end in .safetensors")
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        raise UserError(str(file), f"is no file of torch.save, for it begins with {brief(head)}; {AGAIN}")
    try:
        with as_user_error(file, "cannot be read"):
            state = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except UserError as broken:
        # torch's words advise to load such a file with its code
        if named := re.search(r"GLOBAL (\S+)|Unsupported (?:class|operand|global)[^\n]{0,80}", str(broken.__cause__)):
            what = f"it names {named[1]}" if named[1] else "it does more than name tensors"
            raise UserError(
                str(file), f"holds more than tensors, and loading it could run code ({what}); give a safetensors file"
            ) from broken
        raise
    return _table(state, file)


def _table(value: Any, file: Path) -> dict[str, Tensor]:
    """The weights by name, taken out of one of TABLES where they are wrapped. Raises UserError if there are none."""
    if isinstance(value, dict) and not _is_weights(value):
        wrapped = [name for name in TABLES if isinstance(value.get(name), dict)]
        if len(wrapped) > 1:
            tables = " and ".join(wrapped)
            raise UserError(
                str(file), f"holds several tables, {tables}; save the one that is meant to a file of its own"
            )
        if wrapped:
            notice(f"{file}: its weights are those under {wrapped[0]!r}")
            return _table(value[wrapped[0]], file)
    if not _is_weights(value):
        raise UserError(str(file), f"is not a plain table of tensors by name; {AGAIN}")
    return value


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


# ---- names under a prefix

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.", "transformer.", "net.")


def without_prefix(state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The same tensors without what other tools put before every name; a notice says so."""
    taken = prefix_of(state)
    if taken:
        tell_prefix(taken, where)
    return {name.removeprefix(taken): tensor for name, tensor in state.items()}


def prefix_of(names: Iterable[str]) -> str:
    """What other tools put before every one of them."""
    taken, names = "", list(names)
    while prefix := next((prefix for prefix in PREFIXES if names and all(n.startswith(prefix) for n in names)), None):
        taken += prefix
        names = [name.removeprefix(prefix) for name in names]
    return taken


def tell_prefix(taken: str, where: str) -> None:
    notice(f"{where}: all names begin with {taken!r}, which is left out")


@cache
def notice(text: str) -> None:
    """A warning, once in a process."""
    notices.warning("%s", printable(text))
