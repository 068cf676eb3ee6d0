"""Weights on disk: what a file holds, reading it, renaming it, fitting it into a network, writing it.

Nothing is skipped and nothing is cast unasked: a name or shape that does not fit is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import as_user_error, few
from reeltune.families import configs
from reeltune.families.tensor_files import has_weights, notice, prefix_of, tell_prefix, tensors_of, without_prefix
from reeltune.memory.quantized import Quantisation, quantize_linears

NAMED = 8  # tensors of each kind of misfit that an error names
T = TypeVar("T")
Rows = tuple[tuple[str, str], ...]


# ---- reading


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
    return without_prefix(tensors_of(Path(path), device), str(path))


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
    return [line for kind in _kinds(wanted, state) for line in kind]


def _kinds(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    missing = [f"missing: {name} {tuple(wanted[name].shape)}" for name in wanted if name not in state]
    unexpected = [f"unexpected: {name} {tuple(state[name].shape)}" for name in state if name not in wanted]
    misshapen = [
        f"misshapen: {name} is {tuple(state[name].shape)}, the network has {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    return missing, unexpected, misshapen


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def misfits(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    """What keeps `state` from being the network's weights: the first few of each kind, and how many more."""
    kinds = _kinds(wanted, state)
    quantised = [
        f"{name} is stored as {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in state.items()
        if not tensor.is_floating_point() and (name not in wanted or wanted[name].is_floating_point())
    ]
    if quantised or (any(tensor.dtype in FP8 for tensor in state.values()) and kinds[1]):
        yield "its weights are quantised; give the release in bf16, fp16 or fp32"
    elif 2 * sum(map(len, kinds)) > len(wanted):
        yield "most of it does not fit: it is of another model or size; compare config.json and weights"
    for lines in (quantised, *kinds):
        yield from few(lines, NAMED)


def tell_fp8(state: Mapping[str, Tensor], where: str) -> None:
    coarse = sum(tensor.dtype in FP8 for tensor in state.values())
    if coarse:
        count = f"{coarse} of {len(state)} tensors"
        notice(f"{where}: {count} are stored in fp8; what is read of them is as coarse as that, whatever its type")


def fit(
    net: nn.Module,
    state: Mapping[str, Tensor],
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantisation: Quantisation | None = None,
) -> nn.Module:
    """Puts copies of the tensors into `net`, which may be on the meta device: as stored, or in `dtype`, on `device`.

    Copies, because those of a mapped file lie at odd addresses, which changes the last bits of sums on the CPU.
    quantisation: of some of its layers, one by one, so that a mapped file is never in memory as a whole.
    Raises UserError that names what is missing, unexpected, of another shape or quantised.
    """
    wanted = net.state_dict()
    refuse(where, list(misfits(wanted, state)))
    tell_fp8(state, where)
    quantised = {} if quantisation is None else quantize_linears(net, quantisation)

    def place(name: str, tensor: Tensor) -> Tensor:
        if name in quantised:
            return quantised[name].pack(tensor, device)
        return tensor.to(device, dtype or tensor.dtype, copy=True)

    net.load_state_dict({name: place(name, tensor) for name, tensor in state.items()}, assign=True)
    return net


def write(state: Mapping[str, Tensor], file: Path) -> None:
    """One .safetensors file; the tensors' own dtypes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, file, {"format": "pt"})


# ---- checkpoints in diffusers' layout: a folder for each network, with its config.json


def encoding_files(parts: Mapping[str, Path]) -> dict[str, Path]:
    """What encoding reads of a checkpoint's components: of the trained network its config alone."""
    others = {name: path for name, path in parts.items() if name not in ("transformer", "scheduler")}
    return {"config": parts["transformer"] / "config.json", **others}


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
    quantisation: Quantisation | None = None,
) -> Any:
    """A network of a diffusers class, sized by config.json; its weights (or those at `replacement`) put in strictly.

    On the meta device their names and shapes alone are read. Of config.json what the class takes is read.
    names: renames the file's tensors to the class's. correct: changes the network before its weights go in.
    quantisation: as for `fit`. Raises UserError as that does. The class must keep nothing in buffers that its files
    lack.
    """
    source = folder if replacement is None else saved_transformer(replacement)
    on_meta = torch.device(device).type == "meta"
    outlines = names(peek(source))
    config, where = configs.read_config(folder), str(folder / "config.json")
    configs.check_layers(config, outlines, where)
    net = correct(configs.build(cls, configs.arguments_of(cls, config), where))
    fit(net, outlines if on_meta else names(read(source, fake)), str(source), dtype, device, quantisation)
    lost = [name for name, buffer in net.named_buffers() if buffer.is_meta and not on_meta]
    if lost:
        raise TypeError(f"{cls.__name__} makes buffers that its files lack: {', '.join(lost)}")
    return net.to(device) if fake is None else net  # the buffers too; fake tensors cannot be moved


def load_frozen(
    cls: Any, folder: Path, dtype: torch.dtype | None = None, fake: AbstractContextManager | None = None
) -> Any:
    """A frozen network of a diffusers class, as `load_component` reads it."""
    return load_component(cls, folder, dtype, fake=fake).requires_grad_(False).eval()


def _refuse_larger(net: nn.Module, outlines: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError for a network, on the meta device, far larger than its files: the library would fill the rest
    with random numbers before it tells.
    """
    wanted, there = (sum(map(Tensor.numel, tensors)) for tensors in (net.parameters(), outlines.values()))
    if wanted > 2 * there:  # a table under two names counts twice
        problem = f"config.json makes a network of {wanted:,} weights, and its files have {there:,}"
        raise UserError(where, f"{problem}; {configs.MISFIT}")


def _foreign_prefix(net: Any, names: Iterable[str]) -> str:
    """What other tools put before all names of a network of a transformers class; its own prefix that library knows."""
    prefix, wanted = prefix_of(names), net.state_dict()
    known = prefix == f"{net.base_model_prefix}." or any(name in wanted for name in names)
    return "" if known else prefix


def load_encoder(
    cls: Any, folder: Path, dtype: torch.dtype | None = None, fake: AbstractContextManager | None = None
) -> Any:
    """A frozen network of a transformers class, which knows the key names of older releases; None: dtype as stored.

    In a `fake` mode (spec.Loading) its headers alone are read. Raises UserError with every name that is missing,
    unexpected or of another shape.
    """
    from transformers.utils import logging  # slow, and not every family has such encoders

    outlines = tensors_of(folder, "meta")  # the library would end in errors of its own
    tell_fp8(outlines, str(folder))
    config = configs.encoder_config(cls, folder, outlines)
    outline = configs.build(cls._from_config, {"config": config}, str(folder))
    _refuse_larger(outline, outlines, str(folder))
    prefix = _foreign_prefix(outline, outlines)
    if prefix:
        tell_prefix(prefix, str(folder))
    logging.disable_progress_bar()
    # by headers the library tells the same misfits
    tensors = {} if fake is None else {"state_dict": outlines, "device_map": {"": "meta"}}
    with as_user_error(folder, f"{cls.__name__} cannot be made of its config.json and weights", configs.MISFIT):
        net, told = configs.from_files(
            cls,
            folder if fake is None else None,
            config=config,
            dtype=dtype or "auto",
            key_mapping={f"^{re.escape(prefix)}": ""} if prefix else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **tensors,
        )
    problems = [
        line
        for kind in ("missing", "unexpected")
        for line in few([f"{kind}: {name}" for name in sorted(told[f"{kind}_keys"])])
    ]
    problems += few([f"misshapen: {' '.join(map(str, row))}" for row in sorted(told["mismatched_keys"])])
    refuse(str(folder), problems)
    if fake is not None:
        with fake:
            net = cls._from_config(config, dtype=dtype)
    return net.requires_grad_(False).eval()


def write_component(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """config.json and diffusion_pytorch_model.safetensors, as diffusers reads them; of meta tensors the first."""
    folder.mkdir(parents=True, exist_ok=True)
    if not any(tensor.is_meta for tensor in state.values()):
        write(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
