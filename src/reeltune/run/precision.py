"""Types that a run computes in: those of VAE and encoders, and which of them this machine is slow at, or has not."""

from __future__ import annotations

from pathlib import Path

import torch

from reeltune.config.recipe import Recipe
from reeltune.distributed.engine import DTYPES

STORED_OR = {"stored": None, "fp32": torch.float32, "bf16": torch.bfloat16}
BF16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # in Linux's names: AVX-512, AMX, and Arm's extension
SLOWER = 4  # times a matrix product of 1024 x 1024 in fp32: AVX-512 without its bf16, a thread (measured, 2026-11-26)


def encoder_dtype(recipe: Recipe) -> torch.dtype | None:
    """The type of VAE and encoders; None: as their files have it."""
    asked = recipe.model.encoder_weights
    return DTYPES[recipe.training.mixed_precision] if asked is None else STORED_OR[asked]


def encoder_facts(recipe: Recipe) -> dict[str, str]:
    """What a cache's keys say of the encoders' type beside mixed_precision: nothing where that says it."""
    implied = DTYPES[recipe.training.mixed_precision]
    asked = recipe.model.encoder_weights
    return {} if asked is None or STORED_OR[asked] == implied else {"encoder_weights": asked}


def slow_bf16(recipe: Recipe, *, only_encoding: bool = False) -> list[str]:
    """A notice, where the run would compute in bf16 on this machine's CPU, which has no units for that."""
    in_bf16 = encoder_dtype(recipe) == torch.bfloat16
    in_bf16 |= recipe.training.mixed_precision == "bf16" and not only_encoding
    if not in_bf16 or torch.cuda.is_available() or computes_bf16():
        return []
    return [
        f"there is no GPU here, and this CPU has no bf16 units: bf16 (mixed_precision, encoder_weights) takes about "
        f"{SLOWER} times as long as fp32 (mixed_precision: no)"
    ]


def fp16_without_gpu(recipe: Recipe) -> list[str]:
    """A notice, where training would be refused on this machine, and perhaps not where it is to be."""
    if recipe.training.mixed_precision != "fp16" or torch.cuda.is_available():
        return []
    return ["mixed_precision is fp16, which needs a GPU, and there is none here: on this machine training is refused"]


def computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has units for bf16, as Linux tells; where it tells nothing, it is not called slow."""
    if not cpuinfo.is_file():
        return True
    lines = (line.partition(":") for line in cpuinfo.read_text(errors="replace").splitlines())
    told = {name.strip(): words for name, _, words in lines}  # of the last core; all are alike
    flags = told.get("flags", told.get("Features"))  # on x86, on Arm
    return flags is None or bool(BF16_UNITS & set(flags.split()))
