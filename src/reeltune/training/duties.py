"""What the loop does beside learning: the account, the checkpoints, the validation, and what to say of an error."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from reeltune.checkpoint import folder as checkpoint
from reeltune.core.errors import UserError, lacks_memory
from reeltune.core.files import CannotWriteError, whole_file
from reeltune.core.types import Batch, Shape
from reeltune.diffusion.loss import Loss
from reeltune.memory import attention
from reeltune.reporting import report
from reeltune.reporting.first_batch import write_first_batch
from reeltune.reporting.ledger import in_words
from reeltune.run.folder import describe
from reeltune.training.attention_choice import choose_attention
from reeltune.training.background_save import Saving
from reeltune.training.out_of_memory import explained
from reeltune.training.run import Run
from reeltune.training.warm_up import warm_up


@dataclass(frozen=True)
class Step:
    """A micro-step, kept until its loss has been looked at."""

    step: int
    batch: Batch
    loss: Loss
    mean: Tensor  # of the losses of all processes


class Duties:
    """What the loop does beside learning. Left (also by an error), it writes the ledger and the report."""

    def __init__(self, run: Run):
        self.run, self.log, self.engine, self.out = run, run.log, run.engine, run.out
        self.saving = Saving(run)
        self.unseen: tuple[Step, Tensor, torch.cuda.Event | None] | None = None
        self.shape: Shape | None = None  # that memory was last asked for
        self.validated_step = -1
        networks = [turn.learner.network for turn in run.turns.each]
        self.compiled = [network.compiled for network in networks if network.compiled is not None]
        self.compilations = 0

    def __enter__(self) -> Duties:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if kind is not None:
            self.saving.settle()
        try:
            self.account(kind)
        except CannotWriteError as broken:
            if kind is None:
                raise
            self.log.warn(f"ledger.csv and the report are not written: {broken}")
        if isinstance(error, Exception) and not isinstance(error, UserError) and lacks_memory(error):
            run = self.run
            held_bytes = run.turns.now.learner.held_bytes()
            raise explained(error, *run.watchdog.now, self.shape, held_bytes, run.recipe) from error

    def account(self, kind: type | None) -> None:
        """Writes ledger and report, of what all processes did. kind: class of the error that ended the run, or None."""
        self._tell_compilations()
        self.log.flush()
        if kind is not None and self.engine.world > 1:
            self.log.notice("ledger.csv and the report are not written: what the other processes did is not known")
            return
        shares = self.engine.of_samples(self.run.ledger.share())
        if self.engine.main:
            summary = self.run.ledger.write(self.out, shares)
            self.log.notice(in_words(summary, self.run.recipe.data.validation_data_meta))
            self.log.flush()
            self.log.notice(f"report: {report.write(self.out)}")
        self.engine.wait()  # or a launcher would see others end, and end this one

    def begin(self) -> None:
        """Says how the run begins, and validates what it begins with."""
        run, step = self.run, self.run.progress.step
        self.saving.step = step  # step 0 needs no checkpoint, the resumed one has it
        for notice in run.notices:
            self.log.warn(notice)
        for turn in run.turns.each:
            self.log.notice(turn.summary)
        run.watchdog.doing("forward", step)
        kernel = self._choose_attention()
        if self.engine.main:
            describe(self.out, run.recipe, {**run.facts, "attention_kernel": kernel})
        if self.compiled:
            self.log.notice(warm_up(run, self.compiled))
            self.compilations = self.compiled[0].count
        if run.resumed_from is not None:
            self.log.notice(f"goes on from {run.resumed_from}")
            if step >= run.total_steps:
                self.log.notice(
                    f"it is of step {step}, and the run is to have {run.total_steps}: nothing is left to train; raise "
                    "max_train_steps or num_train_epochs to go on"
                )
        elif run.recipe.output.resume_from_checkpoint is not None:
            self.log.notice(f"{self.out} has no complete checkpoint yet: a new run starts")
        if step == 0 or not run.compares or is_due(run.recipe.validation.validation_steps, step):
            self.validate()  # again, if a checkpoint of this step is where the run goes on

    def _choose_attention(self) -> str | None:
        """Returns the kernel, if it is one for all shapes."""
        asked = self.run.recipe.training.attention
        if asked != attention.AUTO:
            return asked
        chosen = choose_attention(self.run)
        self.run.progress.attention = chosen.kernel if chosen.kernel and chosen.is_kept else ""
        self.log.notice(chosen.told)
        return chosen.kernel

    def count(self, batch: Batch) -> None:
        """Counts the batch in the ledger; writes the run's first one to first_batch/.

        Raises UserError if too many files broke since the scan.
        """
        if self.engine.main and self.run.progress.step == 0 and self.shape is None:
            self._show(batch)
        self._tell_compilations()
        self.shape = batch.draws[0].shape
        self.run.ledger.count(batch.draws, batch.failures)
        for record, reason in batch.failures:
            path = self.run.ledger.train[record].path
            self.log.warn(f"{path} could not be read ({reason}); the next clip of its bucket stood in")
        problem = self.run.ledger.too_many_bad() if batch.failures else None
        if problem is not None:
            raise UserError("train_data_meta", problem)

    def _tell_compilations(self) -> None:
        """Warns if blocks were compiled anew in the pass before."""
        if self.compiled and self.shape is not None and self.compiled[0].count > self.compilations:
            self.compilations = self.compiled[0].count
            F, H, W = self.shape
            self.log.warn(f"{F}x{H}x{W} was compiled anew, in its step; that makes {self.compilations} compilations")

    def _show(self, batch: Batch) -> None:
        """Writes the batch to first_batch/. Its pixels are read again where it comes from a cache, which has none."""
        run, (rank, world) = self.run, self.engine.place
        if run.pixel_reader is not None:
            place = rank * run.split.passes, world * run.split.passes
            batch = run.pixel_reader[run.progress.epoch, run.progress.cursor - 1, *place]
        reference = "ref" in run.setup.family.needs[run.setup.mode]
        write_first_batch(batch, self.out / "first_batch", reference=reference)

    def check_finite(self, step: Step | None) -> None:
        """Looks at the loss of the micro-step before, which has come to the host by now, and sends this one's there.

        Raises UserError, in all processes, for a loss that is not finite in any of them; what it was made of is
        written beside the checkpoints.
        """
        sent, self.unseen = self.unseen, None if step is None else (step, *_sent(step.mean))
        if sent is None:
            return
        seen, mean, is_there = sent
        if is_there is not None:
            is_there.synchronize()  # to look at the device's own would wait for all that it was told since
        if torch.isfinite(mean).item():
            return
        self.saving.settle()
        self.engine.wait()
        last = next(reversed(checkpoint.complete(self.out)), None)
        remedy = (
            f"resume from {last.name if last else 'the start'} with a smaller learning_rate or max_grad_norm"
            if seen.step
            else "nothing was learnt before it: see whether the weights that it began with are finite, which reeltune "
            "export tells, and whether mixed_precision is one that the model bears"
        )
        raise UserError("train", f"the loss of step {seen.step} is not finite{self._write_non_finite(seen)}; {remedy}")

    def _write_non_finite(self, seen: Step) -> str:
        """What a loss that is not finite was made of, where this process had it. Returns where that is told."""
        if torch.isfinite(seen.loss.value).item():
            return " in another process"
        rank = f"-rank-{self.engine.rank}" if self.engine.rank else ""
        record = self.out / f"non-finite-step-{seen.step}{rank}.json"
        per_sample = zip(seen.batch.draws, seen.loss.per_sample_B.tolist(), seen.loss.level_B.tolist(), strict=True)
        samples = [
            {"path": self.run.ledger.train[draw.record].path, "draw": asdict(draw), "loss": loss, "level": level}
            for draw, loss, level in per_sample
        ]
        with whole_file(record) as file:
            file.write(json.dumps({"step": seen.step, "samples": samples}, indent=2) + "\n")
        return f"; {record} says what it was made of"

    def save(self, *, last: bool = False) -> None:
        """checkpoint-N, unless this step has one already; with `last` it is whole at the end of this."""
        progress = self.run.progress
        if self.saving.step != progress.step:
            self.check_finite(None)
        self.saving.save(progress, last=last)

    def validate(self) -> None:
        """Held-out loss and previews, by the main process, or by all alike where the network answers only to all;
        training goes on as if there had been none."""
        run, step = self.run, self.run.progress.step
        if self.validated_step == step:
            return
        self.validated_step = step
        run.prefetcher.wait()
        run.watchdog.doing("validate", step)
        if self.engine.main or self.engine.runs_together:
            checked = run.validation.run(run.turns.now.learner.plain, step, write=self.engine.main)
            if checked.held_out is not None:
                self.log.validation(checked.held_out)
            if checked.obedience is not None:
                self.log.obedience(checked.obedience)
            for notice in checked.notices:
                self.log.notice(notice)
        self.engine.wait()


def _sent(value: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """(the value on its way to the host, the event after which it is there; None if it was on the host already)."""
    if not value.is_cuda:
        return value, None
    copy, is_there = value.to("cpu", non_blocking=True), torch.cuda.Event()
    is_there.record()
    return copy, is_there


def is_due(steps: int | None, step: int) -> bool:
    return steps is not None and step % steps == 0
