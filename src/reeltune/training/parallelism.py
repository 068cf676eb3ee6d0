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

    def notices(self, train_batch_size: int, world: int) -> list[str]:
        """Where a run that goes on has another number of processes or train_batch_size than it began with. world: as of
        split_batch."""
        if train_batch_size * world == self.group:
            return []
        passes = "one pass" if self.passes == 1 else f"each of {self.passes} passes"
        return [
            f"train_batch_size is {train_batch_size}, and a micro-step keeps the {self.group} samples that the run "
            f"began with: a process takes {self.batch} of them in {passes}; for more samples in a step raise "
            "gradient_accumulation_steps"
        ]


def split_batch(train_batch_size: int, world: int, group: int | None = None, *, sharing: int = 1) -> BatchSplit:
    """How a micro-step's samples are shared by processes. world: how many have samples of their own, of which each is
    shared by `sharing`. group: that of the checkpoint which the run goes on from, kept so that the same samples come in
    the same steps.

    Raises UserError if so many processes cannot take it evenly.
    """
    if group is None:
        return BatchSplit(train_batch_size * world, 1, train_batch_size)
    batch = _batch(train_batch_size, world, group)
    if batch == 0:
        fits = [count * sharing for count in range(1, group + 1) if _batch(train_batch_size, count, group)]
        sizes = [size for size in range(1, group // world + 1) if _batch(size, world, group)]
        or_sizes = f", or with so many processes give one of {', '.join(map(str, sizes))}" if sizes else ""
        raise UserError(
            "resume",
            f"the run takes {group} samples in a micro-step, which does not come out even for processes: "
            f"{world * sharing} and train_batch_size: {train_batch_size}; with this train_batch_size start as many "
            f"processes as one of {', '.join(map(str, fits))}{or_sizes}",
        )
    return BatchSplit(group, group // (batch * world), batch)


def _batch(train_batch_size: int, world: int, group: int) -> int:
    """Samples of one process in a pass; 0 if the micro-step cannot be taken evenly."""
    batch = min(train_batch_size, group // world)
    return batch if batch and group % (batch * world) == 0 else 0
