"""Weights on disk: what a file holds, reading it, renaming it, fitting it into a network, writing it.

Nothing is skipped and nothing is cast unasked: a name or shape that does not fit is an error that lists every one.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reeltune.core.errors import UserError, refuse

STEMS = ("diffusion_pytorch_model", "model")  # of weight files in a folder, as diffusers and transformers name them
SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
T = TypeVar("T")
Rows = tuple[tuple[str, str], ...]


# ---- reading


def files_of(path: Path) -> list[Path]:
    """The files that hold one network: `path` itself, or the single file or all shards in a folder.

    Raises UserError if there are none, or a shard is missing.
    """
    if path.is_file():
        return [path]
    names = _shards(path)
    for stem in reversed(STEMS):
        index = read_config(path, f"{stem}.safetensors.index.json")
        if index:
            names = sorted(set(index.get("weight_map", {}).values()))
        if (path / f"{stem}.safetensors").is_file():
            names = [f"{stem}.safetensors"]
    refuse(str(path), [f"{name} is missing; download it again" for name in names if not (path / name).is_file()])
    if names:
        return [path / name for name in names]
    raise UserError(str(path), f"no weights here; expected {' or '.join(f'{stem}.safetensors' for stem in STEMS)}")


def has_weights(path: Path) -> bool:
    """Whether `path` is a file, or a folder in which `files_of` would look further than its names."""
    endings = ("", ".index.json")
    named = (path / f"{stem}.safetensors{ending}" for stem in STEMS for ending in endings)
    return path.is_file() or any(file.is_file() for file in named) or bool(_shards(path))


def _shards(folder: Path) -> list[str]:
    """Names of all shards that those present belong to, where there is no index."""
    for stem in STEMS:
        for file in sorted(folder.glob(f"{stem}-*-of-*.safetensors")):
            if match := SHARD.search(file.name):
                number, total = match.groups()
                return [f"{stem}-{i + 1:0{len(number)}d}-of-{total}.safetensors" for i in range(int(total))]
    return []


def peek(path: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes as meta tensors; the weights themselves are not read."""
    return _read(path, "meta")


def read(path: Path, fake: AbstractContextManager | None = None) -> dict[str, Tensor]:
    """The tensors as stored, on the CPU; in a `fake` mode (spec.Loading) their names, shapes and dtypes alone."""
    if fake is None:
        return _read(path, "cpu")
    with fake:
        return {name: torch.empty_like(outline, device="cpu") for name, outline in peek(path).items()}


def _read(path: Path, device: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in files_of(Path(path)):
        state.update(_safetensors(file, device) if file.suffix == ".safetensors" else _pickled(file, device))
    return state


def _safetensors(file: Path, device: str) -> dict[str, Tensor]:
    try:
        if device == "meta":
            return _outlines(file)
        with safe_open(file, "pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as broken:
        raise UserError(str(file), f"cannot be read ({broken}); download it again") from broken


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # safetensors' names (https://github.com/huggingface/safetensors#format)


def _outlines(file: Path) -> dict[str, Tensor]:
    """From the file's header alone: mapping a large file into memory, as safe_open does, needs the memory for it."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(min(length, 10**8)))  # more than safetensors itself allows
    header.pop("__metadata__", None)
    promised = 8 + length + max((piece["data_offsets"][1] for piece in header.values()), default=0)
    if promised != file.stat().st_size:
        raise ValueError(f"its header promises {promised} bytes and it has {file.stat().st_size}")
    return {name: torch.empty(one["shape"], dtype=DTYPES[one["dtype"]], device="meta") for name, one in header.items()}


def _pickled(file: Path, device: str) -> dict[str, Tensor]:
    """A .pth file: only tensors and plain containers are accepted, never code."""
    try:
        state = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as code:
        raise UserError(
            str(file), f"holds more than tensors, and loading it could run code ({str(code).splitlines()[0]})"
        ) from code
    except (RuntimeError, EOFError, OSError) as broken:
        raise UserError(str(file), f"cannot be read ({broken}); download it again") from broken
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(str(file), "is not a plain table of tensors by name")
    return state


# ---- renaming


def rename(state: Mapping[str, T], rows: Rows, *, back: bool = False) -> dict[str, T]:
    """The same values under other names. Rows pair module paths in which {} stands for a number.

    A row also covers the parameters right below its path (`.weight`, `.bias`, `.gamma`). Names that no row
    covers stay as they are. Raises UserError if two names would become one.
    """
    patterns = _compiled(rows, back)

    def renamed(name: str) -> str:
        for pattern, other in patterns:
            if match := pattern.fullmatch(name):
                *numbers, tail = match.groups()
                return other.format(*numbers) + (tail or "")
        return name

    out = {renamed(name): value for name, value in state.items()}
    if len(out) != len(state):
        raise UserError("weights", "two names become one: released and library names are mixed in one file")
    return out


@lru_cache
def _compiled(rows: Rows, back: bool) -> list[tuple[re.Pattern[str], str]]:
    pairs = [(b, a) if back else (a, b) for a, b in rows]
    return [
        (re.compile(re.escape(a).replace(r"\{\}", r"(\d+)") + r"(\.(?:weight|bias|gamma))?"), other)
        for a, other in pairs
    ]


# ---- fitting and writing


def differences(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """One line for every name that is missing, unexpected or of another shape."""
    missing = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in state]
    unexpected = [f"unexpected: {name} {tuple(state[name].shape)}" for name in state if name not in wanted]
    misshapen = [
        f"misshapen: {name} is {tuple(state[name].shape)}, the network has {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    return missing + unexpected + misshapen


def fit(
    net: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Puts copies of the tensors into `net`, which may be on the meta device: as stored, or in `dtype`, on `device`.

    Copies, because those of a mapped file lie at odd addresses, which changes the last bits of sums on the CPU.
    Raises UserError with every name that is missing, unexpected or of another shape.
    """
    wanted = net.state_dict()
    problems = differences(wanted, state)
    if 2 * len(problems) > len(wanted):
        problems.insert(0, "most of it does not fit: it is of another model or size; compare config.json and weights")
    refuse(where, problems)
    placed = {name: tensor.to(device, dtype or tensor.dtype, copy=True) for name, tensor in state.items()}
    net.load_state_dict(placed, assign=True)
    return net


def write(state: Mapping[str, Tensor], file: Path) -> None:
    """One .safetensors file; the tensors' own dtypes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, file, {"format": "pt"})


# ---- checkpoints in diffusers' layout: a folder for each network, with its config.json


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """The JSON file beside or in `path`; empty if there is none. Raises UserError if it is no table in JSON."""
    file = (path if path.is_dir() else path.parent) / name
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as broken:
        raise UserError(str(file), f"is not JSON ({broken}); download it again") from broken
    if not isinstance(found, dict):
        raise UserError(str(file), "is no table of settings; download it again")
    return found


def encoding_files(parts: Mapping[str, Path]) -> dict[str, Path]:
    """Of a checkpoint's components those that encoding reads: of the trained network its config alone."""
    others = {name: path for name, path in parts.items() if name not in ("transformer", "scheduler")}
    return {"config": parts["transformer"] / "config.json", **others}


def require(config: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    """Raises UserError naming everything in a config.json that is not the one value supported."""
    refuse(
        where,
        [
            f"{name} is {config[name]!r}; only {value!r} is supported"
            for name, value in values.items()
            if config.get(name, value) != value
        ],
    )


def components(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The folder of each component. Raises UserError that names every one missing."""
    found = {name: folder / name for name in names}
    refuse(str(folder), [f"no {name}; download it" for name, path in found.items() if not path.is_dir()])
    return found


def saved_transformer(path: str | Path) -> Path:
    """Where `transformer_path` has its weights: a file, a folder, or the transformer in a checkpoint folder.

    Raises UserError for a checkpoint whose weights lie in the shares of several processes.
    """
    inner = Path(path) / "transformer"
    if inner.is_dir() and not has_weights(inner) and (Path(path) / "shares").is_dir():
        made = f"reeltune export {path} FOLDER"
        raise UserError(
            str(path), f"holds the shares of several processes; `{made}` makes weights of them to give here"
        )
    return inner if inner.is_dir() else Path(path)


def arguments_of(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that a diffusers class takes; other tools write more into it."""
    return {name: config[name] for name in signature(cls.__init__).parameters if name in config}


def load_component(
    cls: Any,
    folder: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    replacement: str | Path | None = None,
    names: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    correct: Callable[[Any], Any] = lambda net: net,
    fake: AbstractContextManager | None = None,
) -> Any:
    """A network of a diffusers class, sized by config.json; its weights (or those at `replacement`) put in strictly.

    On the meta device their names and shapes alone are read. Of config.json what the class takes is read.
    names: renames the file's tensors to the class's. correct: changes the network before its weights go in. Raises
    UserError as `fit` does. The class must keep nothing in buffers that its files lack.
    """
    with torch.device("meta"):
        net = cls(**arguments_of(cls, read_config(folder)))
    net = correct(net)
    source = folder if replacement is None else saved_transformer(replacement)
    on_meta = torch.device(device).type == "meta"
    fit(net, names(peek(source) if on_meta else read(source, fake)), str(source), dtype, device)
    lost = [name for name, buffer in net.named_buffers() if buffer.is_meta and not on_meta]
    if lost:
        raise TypeError(f"{cls.__name__} makes buffers that its files lack: {', '.join(lost)}")
    return net.to(device) if fake is None else net  # the buffers too; fake tensors cannot be moved


def load_frozen(
    cls: Any, folder: Path, dtype: torch.dtype | None = None, fake: AbstractContextManager | None = None
) -> Any:
    """A frozen network of a diffusers class, as `load_component` reads it."""
    return load_component(cls, folder, dtype, fake=fake).requires_grad_(False).eval()


def load_encoder(
    cls: Any, folder: Path, dtype: torch.dtype | None = None, fake: AbstractContextManager | None = None
) -> Any:
    """A frozen network of a transformers class, which knows the key names of older releases; None: dtype as stored.

    Raises UserError with every name that is missing, unexpected or of another shape.
    """
    from transformers.utils import logging  # slow, and not every family has such encoders

    peek(folder), read_config(folder)  # the library would end in errors of its own
    if fake is not None:
        with fake:
            net = cls._from_config(cls.config_class.from_pretrained(folder), dtype=dtype)
        return net.requires_grad_(False).eval()
    logging.disable_progress_bar()
    net, told = cls.from_pretrained(
        folder,
        dtype=dtype or "auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
    )
    problems = [f"{kind}: {name}" for kind in ("missing", "unexpected") for name in sorted(told[f"{kind}_keys"])]
    problems += [f"misshapen: {' '.join(map(str, row))}" for row in sorted(told["mismatched_keys"])]
    refuse(str(folder), problems)
    return net.requires_grad_(False).eval()


def load_tokenizer(folder: Path) -> Any:
    """Of the class that its files name. Raises UserError if they are not whole."""
    from transformers import AutoTokenizer

    for file in folder.glob("*.json"):  # some of which the library reads as far as they go
        read_config(folder, file.name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as broken:
        reason = str(broken).strip().splitlines()[0]
        raise UserError(str(folder), f"is no tokenizer ({reason}); download it again") from broken


def load_image_processor(cls: Any, folder: Path) -> Any:
    """Of a transformers class. Raises UserError if its settings are not there or not whole."""
    settings = read_config(folder, "preprocessor_config.json")
    if not settings:
        raise UserError(str(folder), "no preprocessor_config.json; download it")
    return cls.from_dict(settings)


def write_component(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """config.json and diffusion_pytorch_model.safetensors, as diffusers reads them; of meta tensors the first."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(tensor.is_meta for tensor in state.values()):
        write(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
