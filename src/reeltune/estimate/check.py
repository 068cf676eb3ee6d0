"""`reeltune check`: what training would do with the data. Scans and plans; of weights it reads headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune.config.idle import idle_notices
from reeltune.config.recipe import Recipe
from reeltune.config.rules import broken_under
from reeltune.config.unlikely import unlikely_notices
from reeltune.control.stale import stale_controls
from reeltune.core.errors import refuse, together
from reeltune.data.plan import Plan
from reeltune.data.shapes import SizeRules
from reeltune.distributed.engine import Engine
from reeltune.estimate.epoch import Bucket, forecast_data
from reeltune.estimate.fake_step import prepare
from reeltune.families.spec import Family, Parts, learning
from reeltune.memory import compiled
from reeltune.reporting.log import check_trackers
from reeltune.run.data import Inputs, gather
from reeltune.run.experts import of_expert
from reeltune.run.machine import machine_notices
from reeltune.run.model import choose_family, load_parts, may_preview
from reeltune.run.sizes import refuse_too_large
from reeltune.sampling.other_expert import OtherExpert
from reeltune.sampling.prompts import refuse_other_control, requests_of
from reeltune.training.loop import steps_of
from reeltune.training.rate import Rates, rate_notices, rate_of


def check(recipe: Recipe) -> Iterator[str]:
    """The lines of the answer, for one process. Raises UserError for what training would refuse."""
    refuse("recipe", broken_under(recipe))
    if recipe.training.compile == "blocks":
        compiled.refuse_missing("cuda" if torch.cuda.is_available() else "cpu")
    family, mode, _ = choose_family(recipe)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    networks = _look_at_weights(recipe, family, fake)
    inputs = gather(recipe, family, mode)
    _read_ahead(recipe, family, mode, inputs.rules, networks, fake)
    plan = inputs.plan(0)
    refuse_too_large(plan.share(0, 0, recipe.training.train_batch_size))
    yield f"model    {family.name}, train_mode {mode}"
    yield from _entries(recipe, inputs, plan)
    yield from _steps(recipe, plan)
    yield ""
    yield from _table(forecast_data(plan, inputs.train, inputs.rules).buckets)


def _look_at_weights(recipe: Recipe, family: Family, fake: FakeTensorMode) -> list[Parts]:
    """The networks that learn, without their weights' values.

    Raises UserError for weights that are not there or do not fit, by names and shapes alone; also for VAE's and
    encoders', where training reads them.
    """
    cpu = torch.device("cpu")
    load = partial(load_parts, device=cpu, encoders=False, fake=fake)
    networks = [load(of_expert(recipe, one.expert), one) for one in learning(family)]
    OtherExpert.of(recipe, family, cpu)
    if recipe.cache.cache_folder is None or may_preview(recipe.validation):
        networks[0].read_frozen()
    return networks


def _read_ahead(
    recipe: Recipe, family: Family, mode: str, rules: SizeRules, networks: Sequence[Parts], fake: FakeTensorMode
) -> None:
    """Raises UserError for what training would find wrong beside the data before its first step: trackers, files of
    prompts, an adapter to begin with; names of what learns that there are not, blocks that cannot wait."""
    validation = recipe.validation
    with together("recipe") as attempt:
        attempt(check_trackers, recipe.output.report_to)
        if validation.control_kind is not None:
            attempt(refuse_other_control, validation.control_kind, family, mode)
        if validation.validation_prompts and not validation.validation_control_from:
            attempt(requests_of, recipe, family, mode, rules)
        for one, network in zip(learning(family), networks, strict=True):
            attempt(_prepare, of_expert(recipe, one.expert), one, network, fake)


def _prepare(recipe: Recipe, family: Family, network: Parts, fake: FakeTensorMode) -> None:
    prepare(recipe, family, network, Engine(on_cpu=True), None, fake, on_cpu=True)


def _entries(recipe: Recipe, inputs: Inputs, plan: Plan) -> Iterator[str]:
    scan, data = inputs.scan, recipe.data
    videos = int(scan.records.kind_video.sum())
    yield f"data     {data.train_data_meta}: {_count(scan.entries, 'entry', 'entries')}; usable: " + (
        f"{_count(videos, 'video')} and {_count(len(scan.records) - videos, 'image')}"
    )
    yield f"left out {len(scan.left_out)} ({len(scan.left_out) / scan.entries:.1%}; up to {data.max_bad_share:.1%})"
    yield from (f"         {row}" for row in scan.left_out)
    if plan.left_out:
        yield f"short    {_count(len(plan.left_out), 'entry', 'entries')} of too few frames"
    for record, reason in plan.left_out:
        yield f"         entry {inputs.train[record].entry}, {inputs.train[record].path}: {reason}"
    if inputs.unsuited:
        yield f"unused   {_count(len(inputs.unsuited), 'entry', 'entries')} that teach this model nothing"
        yield from (f"         {row}" for row in inputs.unsuited)
    stale = stale_controls(inputs.train, inputs.held_out)
    yield from (f"notice   {notice}" for notice in [*scan.notices, *stale, *machine_notices(recipe)])
    yield from (f"notice   {notice}" for notice in [*idle_notices(recipe), *unlikely_notices(recipe)])
    whose = "" if data.validation_data_meta is None else f" of validation_data_meta, {data.validation_data_meta}"
    yield f"held out {_count(len(inputs.held_out), 'clip')}{whose}"


def _steps(recipe: Recipe, plan: Plan) -> Iterator[str]:
    training = recipe.training
    total_steps, accumulate = steps_of(recipe, plan), training.gradient_accumulation_steps
    epochs = plan.epochs_within(total_steps * accumulate)
    yield f"epoch    {_count(len(plan), 'micro-step')} of {_count(training.train_batch_size, 'sample')}"
    yield (
        f"run      {_count(total_steps, 'optimizer step')} of {_count(accumulate, 'micro-step')}, "
        f"{_count(epochs, 'epoch')}; {_count(plan.repeats(epochs), 'repeat')} fill up its last groups"
    )
    yield f"rate     {Rates.of(rate_of(recipe.optimization, total_steps), total_steps)}"
    yield from (f"notice   {line}" for line in rate_notices(recipe.optimization, total_steps))


def _table(buckets: list[Bucket]) -> Iterator[str]:
    yield "samples  frames  height  width  tokens  seconds of footage"
    for bucket in buckets:
        (frames, height, width), (shortest_s, longest_s) = bucket.shape, bucket.footage_s
        footage = f"{shortest_s:.2f}"
        if round(longest_s, 2) != round(shortest_s, 2):
            footage += f" to {longest_s:.2f}"
        if not longest_s:
            footage = "still"
        yield f"{bucket.samples:7,}  {frames:6}  {height:6}  {width:5}  {bucket.tokens:6,}  {footage}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
