"""Adapters as a command names them: FILE:strength, or a checkpoint of a run that trained one."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reeltune.adapters import saved
from reeltune.adapters.adapter import Adapter
from reeltune.adapters.apply import check
from reeltune.adapters.dialects import read_adapter
from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.folder import ADAPTER
from reeltune.checkpoint.state import Shared, has_average
from reeltune.core.errors import UserError, refuse
from reeltune.families.tensor_files import notice

MOST_STRENGTH = 1000.0  # beyond it is a slip: adapters are used at up to a few times what was trained


@dataclass(frozen=True)
class Given:
    """An adapter, where it came from, and how strongly it counts."""

    adapter: Adapter
    path: str
    sha256: str
    strength: float = 1.0

    def times(self, factor: float) -> Given:
        return replace(self, strength=self.strength * factor)

    @property
    def told(self) -> dict[str, Any]:
        """What the .json of a clip says of this adapter."""
        return {"path": self.path, "sha256": self.sha256, "strength": self.strength}


def read_all(texts: Sequence[str], base: Mapping[str, Tensor]) -> list[Given]:
    """The adapters of texts that are FILE:strength each. base: the network's parameters by released name, meta tensors
    or not.

    Raises UserError with all that is wrong: files that are not there or damaged, no numbers, other networks.
    """
    found, problems = [], []
    for text in texts:
        try:
            path, strength = parsed(text)
            found.append(read(path, base).times(strength))
        except UserError as error:
            said = "" if error.where == "adapters" else f"{error.where}: "
            problems += [f"{said}{problem}" for problem in error.problems]
    refuse("adapters", problems)
    for sha256, count in Counter(one.sha256 for one in found).items():
        if count > 1:
            same = [one for one in found if one.sha256 == sha256]
            total = sum(one.strength for one in same)
            notice(f"{same[0].path} is given {count} times; it counts with strength {total:g}, the sum of theirs")
    return found


def parsed(text: str) -> tuple[Path, float]:
    """(path, strength), which is behind the last colon, or 1. Raises UserError."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not path or not math.isfinite(strength):
        raise UserError("adapters", f"{text!r}: {number!r} is no strength; write FILE:number, as a.safetensors:0.8")
    if abs(strength) > MOST_STRENGTH:
        raise UserError("adapters", f"{text!r}: strength {number} is beyond {MOST_STRENGTH:g}; 1 is as it was trained")
    return Path(path), strength


def read(path: Path, base: Mapping[str, Tensor]) -> Given:
    """Any tool's file, a folder that PEFT wrote, a checkpoint-N folder, or its folder `adapter`. Raises UserError."""
    inside = path.parent if path.name == ADAPTER else path
    if both := checkpoint.parts(inside):
        own = " or ".join(map(str, both.values()))
        raise UserError("adapters", f"{path} has what is of both experts; give {own}, or adapter_path {path} for both")
    if checkpoint.is_ours(inside):
        return of_checkpoint(inside, base)
    adapter, found = read_adapter(path, base)
    return Given(adapter, str(found.file), file_digest(found.file))


def of_checkpoint(folder: Path, base: Mapping[str, Tensor], *, ema: bool = False) -> Given:
    """The adapter that a run had learnt then, or its moving average, whichever engine wrote it.

    Raises UserError, also for an adapter of a network other than `base`.
    """
    if not checkpoint.is_adapter(folder):
        raise UserError(
            "adapters",
            f"{folder} keeps the whole network and no adapter; transformer_path {folder} starts from it, and "
            "other_expert_path takes that of the other expert",
        )
    checkpoint.verify(folder, under=checkpoint.WEIGHTS)
    if ema and not has_average(folder):
        raise UserError("adapters", f"{folder} has no moving average; it is kept by runs with use_ema")
    where = folder / (f"{ADAPTER}_ema" if ema else ADAPTER)
    if not checkpoint.is_shared(folder):
        made = Given(saved.load(where), str(where), file_digest(where / saved.FILE))
    else:
        tensors = dict(Shared(folder).weights(average=ema))
        made = Given(saved.adapter_of(tensors, saved.config_of(folder / ADAPTER)), str(where), digest(tensors))
    check(made.adapter, {name: weight.shape for name, weight in base.items()}, made.path)
    return made


def file_digest(path: Path) -> str:
    """SHA-256 of its bytes, by which places that offer adapters know their files."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes, whatever files they came from: 1.4 GB/s."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
