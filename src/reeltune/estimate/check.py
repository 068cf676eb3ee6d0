"""`reeltune check`: what training would do with the data. Scans and plans; loads no weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from reeltune.config.recipe import Recipe
from reeltune.core.types import Draw, Geometry, Shape
from reeltune.data.plan import Plan
from reeltune.data.records import Records
from reeltune.run.inputs import Inputs, choose_family, gather, load_parts
from reeltune.training.loop import steps_of


def check(recipe: Recipe) -> Iterator[str]:
    """The lines of the answer, for one process. Raises UserError for what training would refuse."""
    family, mode, _ = choose_family(recipe)
    # By names and shapes alone, which tell whether the weights are there and fit.
    load_parts(recipe, family, torch.device("cpu"), encoders=False, network=False)
    inputs = gather(recipe, family, mode)
    plan = inputs.plan(0)
    yield f"model    {family.name}, train_mode {mode}"
    yield from _entries(recipe, inputs, plan)
    yield from _steps(recipe, plan)
    yield ""
    yield from _table(_sizes(plan, inputs.train), family.geometry)


def _entries(recipe: Recipe, inputs: Inputs, plan: Plan) -> Iterator[str]:
    found, data = inputs.scan, recipe.data
    videos = int(found.records.kind_video.sum())
    yield f"data     {data.train_data_meta}: {_count(found.entries, 'entry', 'entries')}; usable: " + (
        f"{_count(videos, 'video')} and {_count(len(found.records) - videos, 'image')}"
    )
    yield f"left out {len(found.left_out)} ({len(found.left_out) / found.entries:.1%}; up to {data.max_bad_share:.1%})"
    yield from (f"         {row}" for row in found.left_out)
    if plan.left_out:
        yield f"short    {_count(len(plan.left_out), 'entry', 'entries')} of too few frames"
    for record, reason in plan.left_out:
        yield f"         entry {inputs.train[record].entry}, {inputs.train[record].path}: {reason}"
    if inputs.unsuited:
        yield f"unused   {_count(len(inputs.unsuited), 'entry', 'entries')} that teach this model nothing"
        yield from (f"         {row}" for row in inputs.unsuited)
    yield from (f"notice   {notice}" for notice in found.notices)
    yield f"held out {_count(len(inputs.held_out), 'clip')}"


def _steps(recipe: Recipe, plan: Plan) -> Iterator[str]:
    training = recipe.training
    steps = _count(steps_of(recipe, len(plan)), "optimizer step")
    yield (
        f"epoch    {_count(len(plan), 'micro-step')} of {_count(training.train_batch_size, 'sample')}, "
        f"{_count(plan.repeats, 'repeat')} to fill groups"
    )
    yield f"run      {steps} of {_count(training.gradient_accumulation_steps, 'micro-step')}"


@dataclass
class _Size:
    """What the first epoch draws at one Shape."""

    samples: int = 0
    shortest_s: float = math.inf  # seconds of footage that a sample covers
    longest_s: float = 0.0


def _sizes(plan: Plan, records: Records) -> dict[Shape, _Size]:
    sizes: dict[Shape, _Size] = {}
    for k in range(len(plan)):
        for draw in plan[k]:
            size = sizes.setdefault(draw.shape, _Size())
            size.samples += 1
            seconds = footage_s(draw, records)
            size.shortest_s = min(size.shortest_s, seconds)
            size.longest_s = max(size.longest_s, seconds)
    return sizes


def footage_s(draw: Draw, records: Records) -> float:
    """Seconds from the first frame taken to the end of the last; 0 for an image."""
    fps = float(records.fps[draw.record])
    return (draw.frames[-1] + 1 - draw.frames[0]) / fps if fps > 0 else 0.0


def _table(sizes: dict[Shape, _Size], geometry: Geometry) -> Iterator[str]:
    yield "samples  frames  height  width  tokens  seconds of footage"
    for shape, size in sorted(sizes.items(), key=lambda item: -geometry.tokens(item[0])):
        footage = f"{size.shortest_s:.2f}"
        if round(size.longest_s, 2) != round(size.shortest_s, 2):
            footage += f" to {size.longest_s:.2f}"
        if not size.longest_s:
            footage = "still"
        yield (
            f"{size.samples:7,}  {shape.frames:6}  {shape.height:6}  {shape.width:5}  "
            f"{geometry.tokens(shape):6,}  {footage}"
        )


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
