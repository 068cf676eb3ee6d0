"""The loop. Everything else in the package exists so that this reads straight down."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from reeltune import checkpoint, report
from reeltune.cache.wanted import open_cache
from reeltune.data.loader import stream
from reeltune.diffusion.loss import Loss, diffusion_loss
from reeltune.engine import Engine, FlopCount, Stopwatch, peak_flops
from reeltune.errors import UserError
from reeltune.first_batch import write_first_batch
from reeltune.inputs import DTYPES, choose_family, encode_options, gather, ledger_of, load_parts
from reeltune.interrupt import Interrupt
from reeltune.learner import Learner
from reeltune.ledger import Ledger, Share
from reeltune.log import PARTS, Log, check_trackers
from reeltune.recipe import Recipe
from reeltune.run_folder import changes_since, describe, refuse_other_model, refuse_overwriting
from reeltune.sample import Setup
from reeltune.settings import dump
from reeltune.types import Batch, Progress
from reeltune.validate import Validation


def train(recipe: Recipe) -> int:
    """Trains as the recipe says. Returns the exit code: 0, or 128 + the signal that ended the run.

    Raises UserError for everything that a user can mend.
    """
    out = Path(recipe.output.output_dir)
    check_trackers(recipe.output.report_to)
    found = checkpoint.find(out, recipe.output.resume_from_checkpoint)
    refuse_overwriting(out, found)
    checkpoint.sweep(out)

    engine = Engine(recipe.training.mixed_precision, allow_tf32=recipe.training.allow_tf32)
    progress = Progress(group=recipe.training.train_batch_size * engine.world)
    family, mode, objective = choose_family(recipe)
    told = {"family": family.name, "mode": mode}
    changes = []
    if found is not None:
        refuse_other_model(found, told)
        changes = changes_since(found, recipe, progress.group)
    inputs = gather(recipe, family, mode, world=engine.world, show_progress=engine.main)
    cache = open_cache(recipe, family, mode, inputs)
    parts = load_parts(recipe, family, engine.device, found and found / "transformer", encoders=cache is None)
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
    )
    ledger = ledger_of(recipe, inputs)
    if found is not None:
        progress = learner.load_state(found)
        if engine.main:
            ledger.load(found / "ledger.npz")

    accumulate = recipe.training.gradient_accumulation_steps
    total_steps = steps_of(recipe, micro_steps_per_epoch=len(inputs.plan(0)))
    rate = learner.rate_curve(total_steps)
    motion_ratio = recipe.loss.motion_sub_loss_ratio if recipe.loss.motion_sub_loss else None
    peak = peak_flops(engine.device, DTYPES[recipe.training.mixed_precision])
    flops = FlopCount(wanted=peak is not None)
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
        describe(out, recipe, {**told, **learner.counts})
    duties = Duties(out, recipe, engine, learner, validation, ledger, log)
    batches = stream(
        inputs.reader, progress, workers=recipe.data.dataloader_num_workers, rank=engine.rank, world=engine.world
    )
    with Interrupt() as interrupt, log, duties:
        duties.saved_step = progress.step  # step 0 needs no checkpoint, the resumed one has it
        duties.tell_start(found, [*inputs.scan.notices, *changes])
        if progress.step == 0 or is_due(recipe.validation.validation_steps, progress.step):
            duties.validate(progress)  # again, if a checkpoint of this step is where the run goes on
        while progress.step < total_steps and not engine.any(interrupt.code > 0):
            watch, losses, tokens, step_flops = Stopwatch(engine.device), [], 0, 0
            for micro in range(accumulate):
                batch, progress.epoch, progress.cursor = next(batches)
                shape = batch.draws[0].shape
                if engine.main and progress.step == micro == 0:
                    seen = pixels[progress.epoch, progress.cursor - 1, engine.rank, engine.world] if cache else batch
                    write_first_batch(seen, out / "first_batch", reference="ref" in family.needs[mode])
                duties.count(batch)
                watch.mark("data_s")
                encoded = setup.encode(batch)
                watch.mark("encode_s")
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
                learner.backward(loss.value / accumulate, last=micro == accumulate - 1)
                watch.mark("forward_backward_s")
                losses.append(engine.mean(loss.value))
                tokens += family.geometry.tokens(shape) * len(batch.draws) * engine.world
                step_flops += flops.known.get(shape, 0) * engine.world
                duties.check_finite(Step(progress.step, batch, loss))
            grad_norm = learner.step(progress.step, rate(progress.step))
            progress.step += 1
            watch.mark("optimizer_s")
            row = {
                "step": progress.step,
                "epoch": progress.epoch,
                "loss": torch.stack(losses).mean(),
                "grad_norm": grad_norm,
                "lr": rate(progress.step - 1),
                "shape": list(shape),
                "samples": recipe.training.train_batch_size * engine.world * accumulate,
                "tokens": tokens,
                "flops": step_flops,
                "peak_memory_bytes": engine.peak_memory_bytes(),
            }
            log.step(row, partial(watch.seconds, PARTS))
            if progress.step % recipe.output.checkpointing_steps == 0:
                duties.save(progress)
            if is_due(recipe.validation.validation_steps, progress.step):
                duties.validate(progress)
        duties.save(progress)
        if not interrupt.code:
            duties.validate(progress)
    return interrupt.code


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


class Duties:
    """What the loop does beside learning. Left (also by an error), it writes the ledger and the report."""

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        engine: Engine,
        learner: Learner,
        validation: Validation,
        ledger: Ledger,
        log: Log,
    ):
        self.out, self.recipe, self.engine, self.learner = out, recipe, engine, learner
        self.validation, self.ledger, self.log = validation, ledger, log
        self.unseen: Step | None = None
        self.saved_step = self.validated_step = -1

    def __enter__(self) -> Duties:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.flush()
        shares = self.engine.gather(self.ledger.share())
        if self.engine.main:
            summary = self.ledger.write(self.out, shares)
            left_out = f"{summary['left_out']} left out" if summary["left_out"] else "none left out"
            self.log.notice(
                f"{summary['entries']} entries: {summary['used']} used, {summary['held_out']} held out, "
                f"{summary['not_reached']} not reached, {left_out} (ledger.csv)"
            )
            self.log.flush()
            self.log.notice(f"report: {report.write(self.out)}")

    def tell_start(self, found: Path | None, notices: list[str]) -> None:
        for notice in notices:
            self.log.warn(notice)
        if found is not None:
            self.log.notice(f"goes on from {found}")
        elif self.recipe.output.resume_from_checkpoint is not None:
            self.log.notice(f"{self.out} has no complete checkpoint yet: a new run starts")

    def count(self, batch: Batch) -> None:
        """Into the ledger. Raises UserError if too many files broke since the scan."""
        self.ledger.count(batch.draws, batch.failures)
        for record, reason in batch.failures:
            path = self.ledger.train[record].path
            self.log.warn(f"{path} could not be read ({reason}); the next clip of its bucket stood in")
        problem = self.ledger.too_many_bad() if batch.failures else None
        if problem is not None:
            raise UserError("train_data_meta", problem)

    def check_finite(self, step: Step | None) -> None:
        """Looks at the loss of the micro-step before, which the device has done by now, and keeps this one's.

        Raises UserError for a loss that is not finite; what it was made of is written beside the checkpoints.
        """
        seen, self.unseen = self.unseen, step
        if seen is None or torch.isfinite(seen.loss.value).item():
            return
        record = self.out / f"non-finite-step-{seen.step}.json"
        per_sample = zip(seen.batch.draws, seen.loss.per_sample_B.tolist(), seen.loss.level_B.tolist(), strict=True)
        samples = [
            {"path": self.ledger.train[draw.record].path, "draw": asdict(draw), "loss": loss, "level": level}
            for draw, loss, level in per_sample
        ]
        record.write_text(json.dumps({"step": seen.step, "samples": samples}, indent=2) + "\n")
        last = next(reversed(checkpoint.complete(self.out)), None)
        raise UserError(
            "train",
            f"the loss of step {seen.step} is not finite; {record} says what it was made of; resume from "
            f"{last.name if last else 'the start'} with a smaller learning_rate or max_grad_norm",
        )

    def save(self, progress: Progress) -> None:
        """checkpoint-N, unless this step has one already."""
        if self.saved_step == progress.step:
            return
        self.check_finite(None)
        self.log.flush()
        shares = self.engine.gather(self.ledger.share())
        if self.engine.main:
            folder, seconds, size_bytes = checkpoint.save(
                self.out,
                progress,
                write_weights=self.learner.write_weights,
                optimizer_state=self.learner.state(),
                write_more=partial(self.write_more, shares),
                keep=self.recipe.output.checkpoints_total_limit,
            )
            self.log.save({"path": str(folder), "seconds": seconds, "bytes": size_bytes})
        self.saved_step = progress.step
        self.engine.wait()

    def write_more(self, shares: list[Share], folder: Path) -> None:
        self.ledger.save(folder / "ledger.npz", shares)
        (folder / "recipe.yaml").write_text(dump(self.recipe), encoding="utf-8")

    def validate(self, progress: Progress) -> None:
        """Held-out loss and previews, by the main process; training goes on as if there had been none."""
        if self.validated_step == progress.step:
            return
        self.validated_step = progress.step
        if self.engine.main:
            row = self.validation.run(self.learner.plain, progress.step)
            if row is not None:
                self.log.validation(row)
        self.engine.wait()
