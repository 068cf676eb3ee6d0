"""`reeltune export`: a checkpoint's weights in a folder of their own, read back and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from reeltune import checkpoint as checkpoints
from reeltune import families
from reeltune.errors import UserError, refuse
from reeltune.families import weights
from reeltune.families.spec import Family
from reeltune.settings import build, read

DTYPES = {"as_stored": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PATTERN = weights.STEMS[0] + "{suffix}.safetensors"


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str = "bf16",
    max_shard_size: str = "80GB",
    diffusers: bool = False,
    ema: bool = False,
    pretrained_model_name_or_path: str | None = None,
) -> Iterator[str]:
    """Writes config.json and weights to `out`; yields what was written and proven.

    The weights have the names that the original tools load, or diffusers' with `diffusers`, which needs the model
    that was trained: that of the run's recipe, or pretrained_model_name_or_path.
    Raises UserError if `checkpoint` is none or lacks what is asked for, or `out` has something in it.
    """
    source = checkpoint / ("transformer_ema" if ema else "transformer")
    refuse("export", list(_problems(checkpoint, source, out)))
    family = _family(checkpoint, pretrained_model_name_or_path) if diffusers else None
    config = json.loads((source / "config.json").read_text())
    state = _cast(weights.read(source), dtype)
    out.mkdir(parents=True, exist_ok=True)
    if family is None:
        shutil.copyfile(source / "config.json", out / "config.json")
    else:
        if family.save is None:
            raise UserError("export", f"{family.name} has no form for diffusers; leave --diffusers out")
        state = family.from_released(state, config)
        family.save(out, state, config, diffusers=True)  # for its config.json; the weights follow by size
        weights.files_of(out)[0].unlink()
    save_torch_state_dict(state, out, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    del state
    for file in weights.files_of(out):
        yield f"{file}  {file.stat().st_size / 1e6:,.1f} MB"
    yield _proof(source, out, dtype, family, config)


def _problems(checkpoint: Path, source: Path, out: Path) -> Iterator[str]:
    if not (checkpoint / "progress.json").is_file():
        have = ", ".join(str(path) for path in checkpoints.complete(checkpoint)) or "none"
        yield f"{checkpoint} is no complete checkpoint-N folder; complete ones in it: {have}"
    elif not weights.has_weights(source):
        yield f"{checkpoint} has no {source.name}; the moving average is kept by runs with use_ema"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        yield f"{out} is there already and is not an empty folder; give another"


def _family(checkpoint: Path, path: str | None) -> Family:
    if path is None:
        model = build(read(checkpoint.parent / "recipe.yaml")).model
        return families.find(model.pretrained_model_name_or_path, config_path=model.config_path)
    return families.find(path)


def _cast(state: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    for name in state:  # one by one, so that memory holds each tensor once
        state[name] = state[name].to(DTYPES[dtype] or state[name].dtype)
    return state


def _proof(source: Path, out: Path, dtype: str, family: Family | None, config: dict) -> str:
    """Raises RuntimeError naming the tensors that do not come back equal."""
    written = weights.read(out)
    if family is not None:
        written = family.to_released(written, config)
    wanted = _cast(weights.read(source), dtype)
    unlike = sorted(wanted.keys() ^ written.keys())
    unlike += [name for name in wanted.keys() & written.keys() if not torch.equal(wanted[name], written[name])]
    if unlike:
        raise RuntimeError(f"{out} does not hold what was written: {', '.join(unlike)}")
    names = "diffusers'" if family else "released"
    return f"{len(written)} tensors, {dtype}, {names} names: all read back equal"
