"""config.json and its like: read, held to the types and sizes that a network's class takes, and built from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from reeltune.core.errors import refuse
from reeltune.core.reading import AGAIN, as_user_error, brief, read_table

MOST = 2**24  # of a whole number in a config: the largest, theta of rotary positions, is 10**6
MOST_ENTRIES = 64  # of a list in a config: Wan2.2's statistics of latents have 48
COUNTS = re.compile(r"n_layers?|layers_per_block|num_(?!decoder_)\w*layers")  # of what an encoder or network builds
MISFIT = "compare config.json and weights with the release"


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    """The JSON file beside or in `path`; empty if there is none. Raises UserError if it is no table in JSON."""
    file = (path if path.is_dir() else path.parent) / name
    if not file.is_file() and not file.is_symlink():
        return {}
    config = read_table(file)
    kind = config.get("_class_name", "")
    refuse(str(file), [] if isinstance(kind, str) else [f"_class_name is {brief(kind)}; {AGAIN}"])
    return config


def require(config: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    """Raises UserError naming everything in a config.json that is not the one value supported."""
    refuse(
        where,
        [
            f"{name} is {brief(config[name])}; only {value!r} is supported"
            for name, value in values.items()
            if config.get(name, value) != value
        ],
    )


def arguments_of(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that a diffusers class takes; other tools write more into it."""
    return {name: config[name] for name in signature(cls.__init__).parameters if name in config}


def check(cls: Any, config: Mapping[str, Any], where: str, none: Iterable[str] = ()) -> None:
    """Raises UserError naming every argument of the class that is of another type than it takes, or absurd.

    none: arguments that may be null beside those whose default is. What is positive by default is so.
    """
    defaults = {name: parameter.default for name, parameter in signature(cls.__init__).parameters.items()}
    hints = {name: hint for name, hint in get_type_hints(cls.__init__).items() if name in defaults}
    hints |= {name: type(value) for name, value in defaults.items() if type(value) in (bool, int)}  # hints may be wrong
    check_types(config, hints, where, {name for name in defaults if defaults[name] is None} | set(none))
    refuse(
        where,
        [
            f"{name} is {config[name]}; expected more than 0"
            for name, value in defaults.items()
            if type(value) in (int, float)
            and value > 0
            and type(config.get(name)) in (int, float)
            and config[name] <= 0
        ]
        + [
            f"{name} is {config[name]}; expected at most 1"
            for name in defaults
            if name.endswith("eps") and type(config.get(name)) in (int, float) and config[name] > 1
        ],
    )


def check_types(config: Mapping[str, Any], hints: Mapping[str, Any], where: str, none: Iterable[str] = ()) -> None:
    """Raises UserError for values of another type than `hints` have: name -> type, of what may be in `config`. none:
    the names that may be null, whatever their type."""
    refuse(
        where,
        [
            f"{name} is {brief(config[name])}; expected {_words(hint)}"
            for name, hint in hints.items()
            if name in config and not (config[name] is None and name in none) and not _conforms(config[name], hint)
        ],
    )


def _conforms(value: Any, hint: Any) -> bool:
    """Numbers are finite and of a bounded size, lists of a bounded length; what the hint does not tell is taken."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_conforms(value, kind) for kind in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is int:
        return type(value) is int and abs(value) <= MOST
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e12
    if hint in (bool, str, dict, NoneType):
        return isinstance(value, hint)
    if (origin or hint) in (tuple, list):
        kinds = [kind for kind in get_args(hint) if kind is not Ellipsis] or [Any]
        return (
            isinstance(value, list | tuple)
            and len(value) <= MOST_ENTRIES
            and len(value) > 0
            and all(any(_conforms(entry, kind) for kind in kinds) for entry in value)
        )
    return True


def _words(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_words, get_args(hint)))
    plain = {int: f"a whole number up to {MOST}", float: "a number", bool: "true or false", str: "text"}
    if (get_origin(hint) or hint) in (tuple, list):
        return f"a list of up to {MOST_ENTRIES}, each " + (_words(get_args(hint)[0]) if get_args(hint) else "any")
    return plain.get(hint, "null" if hint is NoneType else str(hint))


def check_layers(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raises UserError for more layers, at any depth of `config`, than the weights' names number.

    names: of the tensors. Building so many would take hours and the memory of the machine.
    """
    most = 1 + max((int(part) for name in names for part in name.split(".") if part.isdecimal()), default=-1)
    refuse(
        where,
        [
            f"{name} is {brief(value)}, but the weights have {most}; {MISFIT}"
            for name, value in _everything(config)
            if COUNTS.fullmatch(name) and type(value) is int and value > most
        ],
    )


def _everything(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from _everything(value)


def build(cls: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """The network on the meta device. Raises UserError for arguments of which there is none."""
    kind = getattr(cls, "__self__", cls).__name__  # of a class, or a class's method
    with as_user_error(where, f"{kind} cannot be made of its config.json", MISFIT), torch.device("meta"):
        return cls(**arguments)


def encoder_config(cls: Any, folder: Path, names: Iterable[str]) -> Any:
    """The configuration object of a transformers class.

    names: of the tensors. Raises UserError for one that asks for code or quantised weights, or is absurd.
    """
    raw = read_config(folder)
    where = str(folder / "config.json")
    refuse(where, list(_unwanted(raw)))
    check_layers(raw, names, where)
    with as_user_error(where, f"is no config of {cls.__name__}", MISFIT):
        return from_files(cls.config_class, folder)


def _unwanted(raw: Mapping[str, Any]) -> Iterator[str]:
    for name, value in _everything(raw):
        if name.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            yield f"{name} is {brief(value)}, code from a hub, which is not run; remove it"
        elif name == "quantization_config" and value:
            yield "its weights are quantised (quantization_config); download the release in bf16 or fp32"
        elif type(value) is int and abs(value) > 2**31:
            yield f"{name} is {brief(value)}, which is absurd; {AGAIN}"


def from_files(cls: Any, folder: Path | None, **settings: Any) -> Any:
    """A thing of a transformers class, from files, or from the tensors of `state_dict` where there is no folder:
    nothing is fetched, and no code beside them is run or asked about.

    The only place that calls from_pretrained.
    """
    return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **settings)
