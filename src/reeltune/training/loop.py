"""The loop. Everything else in the package exists so that this reads straight down."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from reeltune.cache.entries import Cache, open_cache
from reeltune.checkpoint import folder as checkpoint
from reeltune.config.idle import idle_notices
from reeltune.config.parse import flat
from reeltune.config.recipe import Recipe
from reeltune.config.unlikely import unlikely_notices
from reeltune.control.stale import stale_controls
from reeltune.core.interrupt import Interrupt
from reeltune.core.types import Batch, Encoded, Progress
from reeltune.data.loader import stream
from reeltune.data.plan import Plan
from reeltune.diffusion.loss import Loss
from reeltune.diffusion.objective import Objective
from reeltune.distributed.engine import Engine, peak_flops
from reeltune.distributed.watchdog import Watchdog
from reeltune.families.spec import Family, Parts, learning
from reeltune.memory import attention, compiled
from reeltune.memory.choices import faster
from reeltune.reporting.ledger import Ledger
from reeltune.reporting.log import Log, check_trackers
from reeltune.run.data import Inputs, gather, ledger_of
from reeltune.run.experts import of_expert
from reeltune.run.folder import (
    GOES_ON_FROM,
    changes_since,
    is_own,
    refuse_other_model,
    refuse_overwriting,
    refuse_starting_over,
)
from reeltune.run.lock import locked
from reeltune.run.machine import machine_notices
from reeltune.run.model import choose_family, encode_options
from reeltune.run.sizes import refuse_too_large
from reeltune.sampling.other_expert import OtherExpert
from reeltune.sampling.prompts import DrawnControls, drawn_controls
from reeltune.sampling.sample import Setup
from reeltune.sampling.validate import Validation
from reeltune.training.dropout import seeded_dropout
from reeltune.training.duties import Duties, Step, is_due
from reeltune.training.loss import training_loss
from reeltune.training.meter import Meter
from reeltune.training.parallelism import BatchSplit, parallelism_of, split_batch
from reeltune.training.prefetch import Prefetcher, encodes_ahead
from reeltune.training.rank_checks import (
    from_first,
    refuse_apart,
    refuse_damaged,
    refuse_damaged_weights,
    refuse_other_records,
)
from reeltune.training.rate import rate_notices
from reeltune.training.run import Run
from reeltune.training.turns import Turn, load_network, looked_at, turns_of


def train(recipe: Recipe) -> int:
    """Trains as the recipe says. Returns the exit code: 0, or 128 + the signal that ended the run.

    Raises UserError for everything that a user can mend.
    """
    check_trackers(recipe.output.report_to)
    parallelism = parallelism_of(recipe)
    patience_seconds = recipe.parallel.rank_timeout_seconds
    engine = Engine(
        recipe.training.mixed_precision,
        allow_tf32=recipe.training.allow_tf32,
        deterministic=recipe.training.deterministic,
        parallelism=parallelism,
        rank_timeout_seconds=patience_seconds,
    )
    with Watchdog(engine.rank, engine.world, patience_seconds) as watchdog, ExitStack() as locks:
        lock = partial(locks.enter_context, locked(Path(recipe.output.output_dir)))
        without_locks = from_first(engine, lock)
        return loop(start(recipe, engine, watchdog, [without_locks] if without_locks else []))


def start(recipe: Recipe, engine: Engine, watchdog: Watchdog, notices: Sequence[str] = ()) -> Run:
    """Loads networks, data and, where the run is resumed, its checkpoint, in each process. Raises UserError."""
    refuse_apart(engine, recipe)
    training = recipe.training
    attention.refuse_missing(training.attention, engine.device, engine.dtype)
    if training.compile == "blocks":
        compiled.refuse_missing(engine.device.type)
    resumed_from, progress, changes = _checkpoint(recipe, engine)
    split = split_batch(training.train_batch_size, engine.place[1], progress.group or None, sharing=engine.context)
    progress.group = split.group
    family, mode, objective = choose_family(recipe)
    facts = {"family": family.name, "mode": mode, **({"expert": recipe.model.expert} if family.experts else {})}
    own = resumed_from is not None and is_own(Path(recipe.output.output_dir), resumed_from)
    if resumed_from is not None:
        refuse_other_model(resumed_from, facts, adapters=recipe.adapter.rank > 0)
        changes += [*changes_since(resumed_from, recipe), *split.notices(training.train_batch_size, engine.place[1])]
        if not progress.plan_version:
            changes.append("the run was begun when each epoch filled up its last groups with repeats, and goes on so")
    if engine.main:
        checkpoint.sweep(Path(recipe.output.output_dir))
    inputs, drawn = _gather(recipe, engine, family, mode, group=split.group, groups_run_on=progress.plan_version > 0)
    first_epoch = inputs.plan(0)
    refuse_too_large(first_epoch.share(0, 0, split.batch))
    refuse_other_records(engine, inputs.train)
    ledger = ledger_of(recipe, inputs)
    if resumed_from is not None:
        changes += from_first(engine, partial(go_on, resumed_from, progress, inputs, ledger, recipe))
    cache = open_cache(recipe, family, mode, inputs, show_progress=engine.main)
    setup = _setup(recipe, engine, family, mode, objective, cache, resumed_from)
    pixel_reader = None if cache is None else inputs.reader
    inputs = inputs if cache is None else cache.feed(inputs)
    samples = split.group * training.gradient_accumulation_steps
    passes = training.gradient_accumulation_steps * split.passes
    total_steps = steps_of(recipe, first_epoch, progress)
    turns = turns_of(
        recipe,
        setup,
        engine,
        batch=split.batch,
        accumulate=passes,
        total_steps=total_steps,
        resumed_from=resumed_from,
    )
    validation = Validation.build(recipe, looked_at(turns, setup), inputs.held_out_reader, inputs.rules, drawn)
    has_start = partial(validation.has_start, is_own=own)  # asked now, and not when all is trained
    compares = resumed_from is None or from_first(engine, has_start)
    log = _log(recipe, engine, total_steps, None if resumed_from is None else progress.step, is_own=own)
    if engine.main:
        later = checkpoint.set_later_aside(Path(recipe.output.output_dir), progress.step)
        changes += [f"{path} is no longer of this run" for path in later]
    return Run(
        recipe=recipe,
        engine=engine,
        watchdog=watchdog,
        setup=setup,
        turns=turns,
        validation=validation,
        compares=compares,
        prefetcher=_prefetcher(recipe, engine, setup, inputs, split, progress, total_steps),
        reader=inputs.reader,
        pixel_reader=pixel_reader,
        split=split,
        ledger=ledger,
        log=log,
        meter=Meter(engine, watchdog, family.geometry, samples=samples, count_flops=log.peak_flops is not None),
        progress=progress,
        total_steps=total_steps,
        resumed_from=resumed_from,
        facts=facts
        | {**turns.counts, "attention": training.attention, "processes": engine.world}
        | ({} if resumed_from is None or own else {GOES_ON_FROM: str(resumed_from.absolute())}),
        notices=[
            *notices,
            *_notices(recipe, engine, inputs, total_steps),
            *changes,
            *turns.notices,
            *attention.notices(training.attention),
            *validation.notices,
        ],
    )


def _checkpoint(recipe: Recipe, engine: Engine) -> tuple[Path | None, Progress, list[str]]:
    """The checkpoint to go on from, None for a new run; how far it is; notices of it.

    Raises UserError for one that is damaged, and where a new run would write over another.
    """
    out = Path(recipe.output.output_dir)
    resumed_from = engine.first(checkpoint.find(out, recipe.output.resume_from_checkpoint))
    refuse_overwriting(out, resumed_from)
    if resumed_from is None and recipe.output.resume_from_checkpoint is not None:
        refuse_starting_over(out)
    progress = Progress() if resumed_from is None else checkpoint.progress_of(resumed_from)
    notices = [] if resumed_from is None else refuse_damaged(engine, resumed_from)
    refuse_damaged_weights(engine, recipe.model, resumed_from)
    return resumed_from, progress, notices


def _setup(
    recipe: Recipe,
    engine: Engine,
    family: Family,
    mode: str,
    objective: Objective,
    cache: Cache | None,
    resumed_from: Path | None,
) -> Setup:
    """The networks with all that they train with; those that a cache stands for are not read."""
    parts = _load(recipe, engine, family, resumed_from, encoders=cache is None)
    if cache is not None:
        parts.null |= cache.null(engine.device)
    other, options = OtherExpert.of(recipe, family, engine.device), encode_options(recipe)
    return Setup(family, mode, parts, objective, autocast=engine.autocast, options=options, other=other)


def _load(recipe: Recipe, engine: Engine, family: Family, resumed_from: Path | None, *, encoders: bool) -> Parts:
    """The network that learns, the first of two, as it is released or as the checkpoint has it, and those beside it."""
    first = learning(family)[0]
    part = None if resumed_from is None else checkpoint.part(resumed_from, first.expert)
    return load_network(of_expert(recipe, first.expert), first, engine, part, encoders=encoders)


def _notices(recipe: Recipe, engine: Engine, inputs: Inputs, total_steps: int) -> list[str]:
    """Notices of what is to be trained on, where, and at which rate."""
    stale = stale_controls(inputs.train, inputs.held_out) if engine.main else []
    slow = [*machine_notices(recipe), *rate_notices(recipe.optimization, total_steps)]
    said = [*idle_notices(recipe), *unlikely_notices(recipe)]
    return [*engine.parallelism.notices, *said, *inputs.scan.notices, *stale, *slow]


def loop(run: Run) -> int:
    """Steps, until all are done or a signal ends the run. Returns train's exit code."""
    recipe, engine, progress, turns = run.recipe, run.engine, run.progress, run.turns
    prefetcher, meter, stage, passes = run.prefetcher, run.meter, run.meter.stage, run.passes
    ends = "ends after this step, with a checkpoint" if engine.main else ""
    with Interrupt(ends) as interrupt, run.log, Duties(run) as duties, prefetcher:
        duties.begin()
        while progress.step < run.total_steps and not engine.any(interrupt.code > 0 or duties.saving.has_failed()):
            meter.begin(progress.step)
            with stage("step"):
                turn, taken = turns.at(progress.step)
            for micro_step in range(passes):
                with stage("data"):
                    batch, progress.epoch, progress.cursor = prefetcher.batch()
                    duties.count(batch)
                with stage("encode"):
                    encoded = prefetcher.encoded()
                prefetcher.begin_next()
                shape = batch.draws[0].shape
                with stage("forward"), engine.same_bits():
                    loss = _loss(run, turn, batch, encoded, micro_step)
                    turn.learner.backward(loss.value * engine.context / passes, last=micro_step == passes - 1)
                mean_loss = engine.mean(loss.value)
                meter.count(mean_loss, shape, len(batch.draws))
                duties.check_finite(Step(progress.step, batch, loss, mean_loss))
            with stage("step"), engine.same_bits():
                rate = turn.rate(progress.step)
                grad_norm = turn.learner.step(taken, rate)
                progress.step += 1
            run.log.step(meter.row(progress, grad_norm, turn.row(rate)), meter.seconds())
            duties.saving.prepare(turn, progress.step)
            if is_due(recipe.output.checkpointing_steps, progress.step):
                duties.save(last=progress.step == run.total_steps)
            if is_due(recipe.validation.validation_steps, progress.step):
                duties.validate()
        duties.save(last=True)
        code = max(engine.gather(interrupt.code))  # a signal to one ends all
        if not code:
            duties.validate()
        run.watchdog.doing("end", progress.step)
    return code


def _loss(run: Run, turn: Turn, batch: Batch, encoded: Encoded, micro_step: int) -> Loss:
    """The loss of a micro-step. The first clip of each shape has its FLOPs counted, if blocks are compiled by an extra
    pass that runs them uncompiled, since compiled code cannot be counted."""
    recipe, engine, learner, shape = run.recipe, run.engine, turn.learner, batch.draws[0].shape
    loss = partial(training_loss, turn.setup, learner.net, encoded, batch.draws, recipe.loss)
    where = recipe.training.seed, run.progress.step, micro_step, engine.rank
    if learner.network.compiled is not None and run.meter.counts(shape):
        with torch.no_grad(), run.meter.flops(shape):
            loss()
    with run.meter.flops(shape), seeded_dropout(recipe.adapter.lora_dropout, engine.device, *where):
        return loss()


def _gather(
    recipe: Recipe, engine: Engine, family: Family, mode: str, *, group: int, groups_run_on: bool
) -> tuple[Inputs, DrawnControls]:
    """The main process scans the data and draws controls first; the others then read what it wrote."""
    with engine.main_first():
        first = engine.main
        inputs = gather(
            recipe,
            family,
            mode,
            group=group,
            groups_run_on=groups_run_on,
            show_progress=first,
            just_scanned=not first,
        )
        drawn = drawn_controls(recipe, family, mode, device=engine.device.type)
    return inputs, drawn


def go_on(resumed_from: Path, progress: Progress, inputs: Inputs, ledger: Ledger, recipe: Recipe) -> list[str]:
    """Takes the ledger over from the checkpoint. Returns notices. Raises UserError for data that has changed."""
    micro_steps = len(inputs.plan(progress.epoch))
    notices = ledger.load(resumed_from / "ledger.npz", accept_changes=recipe.data.accept_changed_data)
    if progress.cursor > micro_steps and not notices:  # with new clips an epoch may have one fewer of a bucket
        line = f"progress.json has cursor {progress.cursor}, and epoch {progress.epoch} has {micro_steps} micro-steps"
        raise checkpoint.damaged(resumed_from, [line])
    return notices


def steps_of(recipe: Recipe, plan: Plan, done: Progress | None = None) -> int:
    """Optimizer steps of the run: those of num_train_epochs, or max_train_steps if they are fewer. done: how far it is;
    the steps until then may have had other gradient_accumulation_steps."""
    done, before = done or Progress(), plan.micro_steps_before
    micro_steps = before(recipe.training.num_train_epochs) - before(done.epoch) - done.cursor
    steps = max(1, done.step + micro_steps // recipe.training.gradient_accumulation_steps)
    return min(steps, recipe.training.max_train_steps or steps)


def _log(recipe: Recipe, engine: Engine, total_steps: int, resume_step: int | None, *, is_own: bool) -> Log:
    output, peak = recipe.output, peak_flops(engine.device, engine.dtype)
    return Log(
        Path(output.output_dir),
        main=engine.main,
        report_to=output.report_to,
        project=output.tracker_project_name,
        logging_steps=output.logging_steps,
        resume_step=resume_step,
        is_own=is_own,
        total_steps=total_steps,
        peak_flops=peak and peak * engine.world,
        device_bytes=engine.device_bytes,
        sparing=list(dict.fromkeys(lever.setting for lever, _ in faster(flat(recipe)))),
    )


def _prefetcher(
    recipe: Recipe,
    engine: Engine,
    setup: Setup,
    inputs: Inputs,
    split: BatchSplit,
    progress: Progress,
    total_steps: int,
) -> Prefetcher:
    """Reads and encodes the batches from `progress` on, as many as are left of the run."""
    rank, world = engine.place
    workers = recipe.data.dataloader_num_workers
    batches = stream(inputs.reader, progress, workers=workers, rank=rank, world=world, passes=split.passes)
    passes = recipe.training.gradient_accumulation_steps * split.passes
    batches = islice(batches, passes * max(total_steps - progress.step, 0))
    ahead = encodes_ahead(recipe, on_gpu=engine.device.type == "cuda")
    return Prefetcher(batches, setup.encode, device=engine.device, ahead=ahead)
