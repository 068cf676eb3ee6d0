"""The loop. Everything else in the package exists so that this reads straight down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from reeltune.cache.entries import open_cache
from reeltune.checkpoint import folder as checkpoint
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.interrupt import Interrupt
from reeltune.core.types import Batch, Progress, Shape
from reeltune.data.loader import stream
from reeltune.diffusion.loss import Loss, diffusion_loss
from reeltune.distributed.engine import Engine, FlopCount, Stopwatch, peak_flops
from reeltune.distributed.watchdog import Watch
from reeltune.reporting import report
from reeltune.reporting.first_batch import write_first_batch
from reeltune.reporting.ledger import Ledger
from reeltune.reporting.log import PARTS, Log, check_trackers
from reeltune.run.folder import changes_since, describe, refuse_other_model, refuse_overwriting
from reeltune.run.inputs import DTYPES, choose_family, encode_options, gather, ledger_of, load_parts
from reeltune.sampling.sample import Setup
from reeltune.sampling.validate import Validation
from reeltune.training.background_save import Saving
from reeltune.training.engine_choice import engine_of, rhythm
from reeltune.training.learner import Learner
from reeltune.training.out_of_memory import explained
from reeltune.training.prefetch import Ahead, wanted
from reeltune.training.rank_checks import refuse_apart, refuse_other_records


def train(recipe: Recipe) -> int:
    """Trains as the recipe says. Returns the exit code: 0, or 128 + the signal that ended the run.

    Raises UserError for everything that a user can mend.
    """
    check_trackers(recipe.output.report_to)
    wish = engine_of(recipe)
    patience_seconds = recipe.parallel.rank_timeout_seconds
    engine = Engine(
        recipe.training.mixed_precision,
        allow_tf32=recipe.training.allow_tf32,
        wish=wish,
        rank_timeout_seconds=patience_seconds,
    )
    with Watch(engine.rank, engine.world, patience_seconds) as watch:
        return run(recipe, engine, watch, wish.notices)


def run(recipe: Recipe, engine: Engine, watch: Watch, notices: Sequence[str] = ()) -> int:
    """What each of its processes does."""
    refuse_apart(engine, recipe)
    out = Path(recipe.output.output_dir)
    found = engine.first(checkpoint.find(out, recipe.output.resume_from_checkpoint))
    refuse_overwriting(out, found)
    progress = Progress() if found is None else checkpoint.progress_of(found)
    pace = rhythm(recipe.training.train_batch_size, engine.place[1], progress.group or None)
    progress.group = pace.group
    family, mode, objective = choose_family(recipe)
    told = {"family": family.name, "mode": mode}
    changes = []
    if found is not None:
        refuse_other_model(found, told)
        changes = changes_since(found, recipe)
    if engine.main:
        checkpoint.sweep(out)
    with engine.main_first():  # which scans; the others find what it found
        own = {"show_progress": engine.main, "just_scanned": not engine.main}
        inputs = gather(recipe, family, mode, group=pace.group, **own)
    refuse_other_records(engine, inputs.train)
    cache = open_cache(recipe, family, mode, inputs)
    start_on = torch.device("cpu") if engine.sharded else None  # each process moves its share alone
    transformer = None if found is None or checkpoint.is_shared(found) else found / "transformer"
    parts = load_parts(recipe, family, engine.device, transformer, encoders=cache is None, start_on=start_on)
    pixels = inputs.reader
    if cache is not None:
        parts.null |= cache.null(engine.device)
        inputs = cache.feed(inputs)
    setup = Setup(
        family,
        mode,
        parts,
        objective,
        autocast=engine.autocast,
        options=encode_options(recipe),
    )
    validation = Validation.build(recipe, setup, inputs.held_out_reader, inputs.rules)
    learner = Learner(
        family,
        parts,
        engine,
        recipe.model,
        recipe.optimization,
        recipe.memory,
        seed=recipe.training.seed,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        batch=pace.batch,
        accumulate=recipe.training.gradient_accumulation_steps * pace.parts,
        found=found,
    )
    ledger = ledger_of(recipe, inputs)
    if found is not None:
        learner.load_state(found)
        if engine.main:
            ledger.load(found / "ledger.npz")

    passes = recipe.training.gradient_accumulation_steps * pace.parts
    total_steps = steps_of(recipe, micro_steps_per_epoch=len(inputs.plan(0)))
    rate = learner.rate_curve(total_steps)
    motion_ratio = recipe.loss.motion_sub_loss_ratio if recipe.loss.motion_sub_loss else None
    peak = peak_flops(engine.device, DTYPES[recipe.training.mixed_precision])
    flops = FlopCount(enabled=peak is not None)
    log = Log(
        out,
        main=engine.main,
        report_to=recipe.output.report_to,
        project=recipe.output.tracker_project_name,
        logging_steps=recipe.output.logging_steps,
        resume_step=None if found is None else progress.step,
        total_steps=total_steps,
        peak_flops=peak and peak * engine.world,
    )
    if engine.main:
        describe(out, recipe, {**told, **learner.counts, "processes": engine.world})
    duties = Duties(out, recipe, engine, watch, learner, validation, ledger, log)
    workers = recipe.data.dataloader_num_workers
    rank, world = engine.place
    batches = stream(inputs.reader, progress, workers=workers, rank=rank, world=world, parts=pace.parts)
    batches = islice(batches, passes * max(total_steps - progress.step, 0))
    on_gpu, low_vram = engine.device.type == "cuda", recipe.training.low_vram
    beside = wanted(recipe.memory.encode_ahead, on_gpu=on_gpu, low_vram=low_vram)
    ahead = Ahead(batches, setup.encode, device=engine.device, beside=beside)
    with Interrupt() as interrupt, log, duties, ahead:
        duties.saving.step = progress.step  # step 0 needs no checkpoint, the resumed one has it
        duties.tell_start(found, [*notices, *inputs.scan.notices, *changes])
        if progress.step == 0 or is_due(recipe.validation.validation_steps, progress.step):
            duties.validate(progress)  # again, if a checkpoint of this step is where the run goes on
        while progress.step < total_steps and not engine.any(interrupt.code > 0 or duties.saving.has_failed()):
            stopwatch, losses, tokens, step_flops = Stopwatch(engine.device), [], 0, 0
            for micro in range(passes):
                watch.doing("data", progress.step)
                batch, progress.epoch, progress.cursor = ahead.batch()
                shape = batch.draws[0].shape
                if engine.main and progress.step == micro == 0:
                    place = rank * pace.parts, world * pace.parts
                    seen = pixels[progress.epoch, progress.cursor - 1, *place] if cache else batch
                    write_first_batch(seen, out / "first_batch", reference="ref" in family.needs[mode])
                duties.count(batch)
                stopwatch.mark("data_s")
                watch.doing("encode", progress.step)
                encoded = ahead.encoded()
                stopwatch.mark("encode_s")
                ahead.begin_next()
                watch.doing("forward", progress.step)
                with flops.forward(shape):
                    loss = diffusion_loss(
                        family.denoise,
                        learner.net,
                        objective,
                        encoded,
                        parts.null,
                        batch.seeds,
                        [draw.stratum for draw in batch.draws],
                        motion_sub_loss_ratio=motion_ratio,
                        loss_outlier_threshold=recipe.loss.loss_outlier_threshold,
                    )
                learner.backward(loss.value * engine.context / passes, last=micro == passes - 1)
                stopwatch.mark("forward_backward_s")
                losses.append(engine.mean(loss.value))
                tokens += family.geometry.tokens(shape) * len(batch.draws) * world
                step_flops += flops.known.get(shape, 0) * engine.world
                duties.check_finite(Step(progress.step, batch, loss, losses[-1]))
            watch.doing("step", progress.step)
            grad_norm = learner.step(progress.step, rate(progress.step))
            progress.step += 1
            stopwatch.mark("optimizer_s")
            row = {
                "step": progress.step,
                "epoch": progress.epoch,
                "loss": torch.stack(losses).mean(),
                "grad_norm": grad_norm,
                "lr": rate(progress.step - 1),
                "shape": list(shape),
                "samples": pace.group * recipe.training.gradient_accumulation_steps,
                "tokens": tokens,
                "flops": step_flops,
                "peak_memory_bytes": engine.peak_memory_bytes(),
            }
            log.step(row, partial(stopwatch.seconds, PARTS))
            if progress.step % recipe.output.checkpointing_steps == 0:
                duties.save(progress, last=progress.step == total_steps)
            if is_due(recipe.validation.validation_steps, progress.step):
                ahead.rest()
                duties.validate(progress)
        duties.save(progress, last=True)
        code = max(engine.gather(interrupt.code))  # a signal to one ends all
        if not code:
            duties.validate(progress)
        watch.doing("end", progress.step)
    return code


def steps_of(recipe: Recipe, micro_steps_per_epoch: int) -> int:
    """Optimizer steps of the run: those of num_train_epochs, or max_train_steps if they are fewer."""
    micro_steps = micro_steps_per_epoch * recipe.training.num_train_epochs
    steps = max(1, micro_steps // recipe.training.gradient_accumulation_steps)
    return min(steps, recipe.training.max_train_steps or steps)


def is_due(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0


@dataclass(frozen=True)
class Step:
    """A micro-step, kept until its loss has been looked at."""

    step: int
    batch: Batch
    loss: Loss
    mean: Tensor  # of the losses of all processes


class Duties:
    """What the loop does beside learning. Left (also by an error), it writes the ledger and the report."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        engine: Engine,
        watch: Watch,
        learner: Learner,
        validation: Validation,
        ledger: Ledger,
        log: Log,
    ):
        self.out, self.recipe, self.engine, self.watch, self.learner = out, recipe, engine, watch, learner
        self.validation, self.ledger, self.log = validation, ledger, log
        self.saving = Saving(out, recipe, engine, watch, learner, ledger, log)
        self.unseen: Step | None = None
        self.shape: Shape | None = None  # that memory was last asked for
        self.validated_step = -1

    def __enter__(self) -> Duties:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if kind is not None:
            self.saving.settle()
        try:
            self.account(kind)
        except OSError as broken:
            if kind is None:
                raise
            self.log.warn(f"ledger.csv and the report are not written: {broken}")
        if isinstance(error, torch.OutOfMemoryError):
            raise explained(error, *self.watch.now, self.shape, self.learner.held_bytes(), self.recipe) from error

    def account(self, kind: type | None) -> None:
        """The ledger and the report, of what all processes did. kind: of the error that ended the run."""
        self.log.flush()
        if kind is not None and self.engine.world > 1:
            self.log.notice("ledger.csv and the report are not written: what the other processes did is not known")
            return
        shares = self.engine.of_samples(self.ledger.share())
        if self.engine.main:
            summary = self.ledger.write(self.out, shares)
            left_out = f"{summary['left_out']} left out" if summary["left_out"] else "none left out"
            self.log.notice(
                f"{summary['entries']} entries: {summary['used']} used, {summary['held_out']} held out, "
                f"{summary['not_reached']} not reached, {left_out} (ledger.csv)"
            )
            self.log.flush()
            self.log.notice(f"report: {report.write(self.out)}")
        self.engine.wait()  # or a launcher would see others end, and end this one

    def tell_start(self, found: Path | None, notices: list[str]) -> None:
        for notice in notices:
            self.log.warn(notice)
        if found is not None:
            self.log.notice(f"goes on from {found}")
        elif self.recipe.output.resume_from_checkpoint is not None:
            self.log.notice(f"{self.out} has no complete checkpoint yet: a new run starts")

    def count(self, batch: Batch) -> None:
        """Into the ledger. Raises UserError if too many files broke since the scan."""
        self.shape = batch.draws[0].shape
        self.ledger.count(batch.draws, batch.failures)
        for record, reason in batch.failures:
            path = self.ledger.train[record].path
            self.log.warn(f"{path} could not be read ({reason}); the next clip of its bucket stood in")
        problem = self.ledger.too_many_bad() if batch.failures else None
        if problem is not None:
            raise UserError("train_data_meta", problem)

    def check_finite(self, step: Step | None) -> None:
        """Looks at the loss of the micro-step before, which the device has done by now, and keeps this one's.

        Raises UserError, in all processes, for a loss that is not finite in any of them; what it was made of is
        written beside the checkpoints.
        """
        seen, self.unseen = self.unseen, step
        if seen is None or torch.isfinite(seen.mean).item():
            return
        self.saving.settle()
        self.engine.wait()
        last = next(reversed(checkpoint.complete(self.out)), None)
        raise UserError(
            "train",
            f"the loss of step {seen.step} is not finite{self._write_non_finite(seen)}; resume from "
            f"{last.name if last else 'the start'} with a smaller learning_rate or max_grad_norm",
        )

    def _write_non_finite(self, seen: Step) -> str:
        """What a loss that is not finite was made of, where this process had it. Returns where that is told."""
        if torch.isfinite(seen.loss.value).item():
            return " in another process"
        rank = f"-rank-{self.engine.rank}" if self.engine.rank else ""
        record = self.out / f"non-finite-step-{seen.step}{rank}.json"
        per_sample = zip(seen.batch.draws, seen.loss.per_sample_B.tolist(), seen.loss.level_B.tolist(), strict=True)
        samples = [
            {"path": self.ledger.train[draw.record].path, "draw": asdict(draw), "loss": loss, "level": level}
            for draw, loss, level in per_sample
        ]
        record.write_text(json.dumps({"step": seen.step, "samples": samples}, indent=2) + "\n")
        return f"; {record} says what it was made of"

    def save(self, progress: Progress, *, last: bool = False) -> None:
        """checkpoint-N, unless this step has one already; with `last` it is whole at the end of this."""
        if self.saving.step != progress.step:
            self.check_finite(None)
        self.saving.save(progress, last=last)

    def validate(self, progress: Progress) -> None:
        """Held-out loss and previews, by the main process, or by all alike where the network answers only to all;
        training goes on as if there had been none."""
        if self.validated_step == progress.step:
            return
        self.validated_step = progress.step
        self.watch.doing("validate", progress.step)
        if self.engine.main or self.engine.runs_together:
            row = self.validation.run(self.learner.plain, progress.step, write=self.engine.main)
            if row is not None:
                self.log.validation(row)
        self.engine.wait()
