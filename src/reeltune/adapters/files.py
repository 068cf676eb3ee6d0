"""Files of adapters: which file of a folder is meant, its tensors, and the settings beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import as_user_error, beginning, brief, few, read_table
from reeltune.families.tensor_files import header_of

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter/adapter_model.safetensors")
CONFIG = "adapter_config.json"
ONLY = "adapters are read from safetensors files, which hold no code"
# Beginnings by which PEFT 0.21 changes the base's weights (LoraConfig, init_lora_weights).
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
PEFT_IN_DIFFUSERS = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings in a file's metadata


@dataclass(frozen=True)
class Stored:
    """A file as it is, or what several processes keep of one."""

    file: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    """PEFT's of the adapter, where they are beside or in the file."""
    settings_from: str = ""


def file_of(path: Path) -> Path:
    """Raises UserError for a folder without one."""
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    if (path.parent if path.name == "adapter" else path).joinpath("shares").is_dir():
        remedy = f"`reeltune export {path} FILE --adapter --for comfyui` makes one file of them"
        raise UserError(str(path), f"holds the shares of several processes; {remedy}")
    there = sorted(path.glob("*.safetensors"))
    if len(there) == 1:
        return there[0]
    if steps := sorted(path.glob("checkpoint-*"), key=lambda one: (len(one.name), one.name)):
        raise UserError(str(path), f"is a run's folder; give one of its checkpoints, as {steps[-1]}")
    inside = [str(folder) for folder in sorted(path.glob("*/")) if any((folder / name).is_file() for name in FILES)]
    remedy = f"give {' or '.join(few(inside, 3))}" if inside else "give the path of one file"
    raise UserError(str(path), f"has {'several' if there else 'no'} adapters in it; {remedy}")


def stored_in(file: Path, *, outline: bool) -> Stored:
    """The tensors of a file, and what is said of them. outline: all but alphas on the meta device. Raises UserError."""
    head = beginning(file, 9)
    if head[8:] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):  # a length may begin so, too
        raise UserError(str(file), f"is a file of torch.save; {ONLY}; have its tool save it as such")
    outlines = header_of(file)
    where = "cannot be read"
    with as_user_error(file, where), safe_open(file, "pt", device="cpu") as opened:
        metadata = opened.metadata() or {}
        wanted = [name for name, tensor in outlines.items() if not outline or tensor.numel() == 1]
        tensors = outlines | {name: opened.get_tensor(name) for name in wanted}
    settings, settings_from = _settings(file, metadata)
    return Stored(file, tensors, metadata, settings, settings_from)


def _settings(file: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    beside = file.parent / CONFIG
    if beside.is_file() and file.name == FILES[0]:
        table = read_table(beside, "restore it, or take it away and give --alpha")
        return (_checked(beside, table), CONFIG) if "peft_type" in table else ({}, "")
    if PEFT_IN_DIFFUSERS not in metadata:
        return {}, ""
    with as_user_error(file, f"its metadata has no JSON in {PEFT_IN_DIFFUSERS}"):
        table = json.loads(metadata[PEFT_IN_DIFFUSERS])
    if not isinstance(table, dict):
        raise UserError(
            str(file), f"{PEFT_IN_DIFFUSERS} in its metadata is {brief(table)}, and no table of settings; save it again"
        )
    settings = {key.removeprefix("transformer."): value for key, value in table.items()}
    return _checked(file, settings), "its metadata"


def _checked(where: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings themselves. Raises UserError for patterns that are none, and for pairs that are no change of the
    released weights."""
    problems = []
    for name in ("alpha_pattern", "rank_pattern"):
        patterns = settings.get(name)
        for pattern in patterns if isinstance(patterns, dict) else ():
            try:
                re.compile(pattern)
            except re.error as broken:
                problems.append(f"{name} has {brief(pattern)}, which is no pattern ({broken}); save the adapter again")
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(OTHER_BASES):
        problems.append(
            f"init_lora_weights is {brief(begun)}, whose training took a part out of the base's weights, so that the "
            "pairs are no change of the released ones; save it as PEFT converts it, with "
            "path_initial_model_for_weight_conversion"
        )
    if settings.get("fan_in_fan_out") is True:
        problems.append(
            "fan_in_fan_out is true, of weights that are stored turned; linear layers of these models are not"
        )
    refuse(str(where), problems)
    return settings
