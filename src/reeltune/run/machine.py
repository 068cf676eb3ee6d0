"""What a recipe asks of this machine that it has not."""

from __future__ import annotations

import os

from reeltune.config.recipe import Recipe
from reeltune.run.precision import fp16_without_gpu, slow_bf16


def machine_notices(recipe: Recipe, *, only_encoding: bool = False) -> list[str]:
    precision = [*slow_bf16(recipe, only_encoding=only_encoding), *fp16_without_gpu(recipe)]
    return [*precision, *too_many_workers(recipe)]


def too_many_workers(recipe: Recipe) -> list[str]:
    workers, cores = recipe.data.dataloader_num_workers, usable_cores()
    if workers <= cores:
        return []
    return [
        f"dataloader_num_workers is {workers} and this process may use {cores} core{'s' if cores > 1 else ''}, which "
        f"workers share with training; {cores} is the most that helps, unless they wait for a slow disk"
    ]


def usable_cores() -> int:
    """How many cores this process may use: schedulers of clusters may have bound it to some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
