"""How processes share a run: by which engine, by its recipe and its launcher, and how they take its micro-steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reeltune.config.recipe import Recipe
from reeltune.config.rules import broken_under
from reeltune.core.errors import UserError, refuse
from reeltune.distributed.launch import START, Parallelism, chosen, place


def parallelism_of(recipe: Recipe) -> Parallelism:
    """Raises UserError for a launch that would not train as one run, and for settings that its engine has not."""
    parallel = recipe.parallel
    parallelism = chosen(parallel.engine, keep_gathered=parallel.keep_gathered, offload=parallel.offload)
    refuse("launch", broken_under(recipe, parallelism.engine))
    notices, name = parallelism.notices, parallelism.engine
    if name != "ddp" and place()[1] == 1:
        notices = *notices, f"engine is {name}, but one process was started: it has nothing to shard. {START}"
    return replace(parallelism, context=parallel.context_parallel, notices=notices)


@dataclass(frozen=True)
class BatchSplit:
    """A micro-step of the plan is `group` samples, which processes take in `passes` passes of `batch` samples."""

    group: int
    passes: int
    batch: int


def split_batch(train_batch_size: int, world: int, group: int | None = None) -> BatchSplit:
    """How a micro-step's samples are shared by processes. group: that of the checkpoint which the run goes on from,
    kept so that the same samples come in the same steps.

    Raises UserError if so many processes cannot take it evenly.
    """
    if group is None:
        return BatchSplit(train_batch_size * world, 1, train_batch_size)
    batch = _batch(train_batch_size, world, group)
    if batch == 0:
        fits = [count for count in range(1, group + 1) if _batch(train_batch_size, count, group)]
        raise UserError(
            "resume",
            f"the run takes {group} samples in a micro-step, which does not come out even for processes: {world} and "
            f"train_batch_size: {train_batch_size}; with this train_batch_size start as many processes as one of "
            f"{', '.join(map(str, fits))}",
        )
    return BatchSplit(group, group // (batch * world), batch)


def _batch(train_batch_size: int, world: int, group: int) -> int:
    """Samples of one process in a pass; 0 if the micro-step cannot be taken evenly."""
    batch = min(train_batch_size, group // world)
    return batch if batch and group % (batch * world) == 0 else 0
