"""Checkpoints written in the background: from a copy in the host's memory, while training goes on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reeltune.checkpoint import folder as checkpoint
from reeltune.config.parse import dump
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.types import Progress
from reeltune.memory.host import room_bytes
from reeltune.reporting.ledger import Share
from reeltune.training.host_copies import HostCopies, copied_bytes
from reeltune.training.run import Run
from reeltune.training.turns import Turn

# Memory wanted, over the size of the copy. Writing it took 0.4 % more (measured, 2026-11); the rest is for what else
# goes on, such as reading clips.
SPARE = 1.2

Written = tuple[Path, int] | None  # what checkpoint.save returns, where this process did it


@dataclass
class UnderWay:
    done: Future[tuple[Written, float]]  # with the seconds from the call of `save` until the checkpoint was whole
    step: int
    waits: bool  # whether training waits until it is done
    contents: Any  # which it reads; copies, unless training waits
    blocked_seconds: float = 0.0
    is_logged: bool = False


class Saving:
    """All processes call `prepare`, `save` and `finish` together; at most one checkpoint is under way.

    What goes wrong in the writing of one process is raised by the next `finish` of all, UserError for a full disk;
    `save` begins with it. Where the memory of a machine has no room for the copies, or the recipe wants none, or no
    more training follows (`last`), `save` ends with it too, and the copies' memory, which is kept from one save to the
    next, is given back.
    """

    def __init__(self, run: Run):
        self.out, self.recipe, self.engine, self.watchdog = run.out, run.recipe, run.engine, run.watchdog
        self.turns, self.ledger, self.log = run.turns, run.ledger, run.log
        self.step = -1  # that has a checkpoint, or has one under way
        self.under_way: UnderWay | None = None
        self.copies = HostCopies()
        self.unstepped = {turn.expert for turn in run.turns.each}  # networks whose optimizer may have no state yet
        self.total_steps = run.total_steps
        self.has_logged_no_room = False

    def prepare(self, turn: Turn, step: int) -> None:
        """Once each network has learnt in a step, reserves the memory for copies, if any are to be made.

        turn: the network that learnt in the step before. step: how many steps were taken.
        """
        if not self.unstepped:
            return
        self.unstepped.discard(turn.expert)
        if not self.unstepped and saves_in_background(self.recipe, step, self.total_steps):
            contents = self._contents()
            if self._has_room(contents):
                self.copies.reserve(contents)

    def save(self, progress: Progress, *, last: bool = False) -> None:
        """checkpoint-N, unless this step has one already."""
        asked = time.perf_counter()
        self.watchdog.doing("save", progress.step)
        if self.step != progress.step:
            self.finish()
            self.watchdog.doing("save", progress.step)  # again
            self.log.flush()  # a run killed later then has every line up to this step
            shares = self.engine.of_samples(self.ledger.share())
            contents = self._contents()
            waits = last or not self._has_room(contents)
            if waits:
                self.copies.let_go()
            else:
                contents = self.copies.copied(contents)
            work = self._work(replace(progress), contents, shares)
            self.under_way = UnderWay(_begin(work, asked, self.engine.device), progress.step, waits, contents)
            self.step = progress.step
        if self.under_way is None:
            return
        if last or self.under_way.waits:
            wait([self.under_way.done])
        self.under_way.blocked_seconds += time.perf_counter() - asked
        if last or self.under_way.waits:
            self.finish()

    def has_failed(self) -> bool:
        """Whether writing has failed in this process. If the checkpoint is whole by now, that is logged."""
        if self.under_way is None or not self.under_way.done.done():
            return False
        return self._error() is not None

    def finish(self) -> None:
        """Waits for what is under way. Raises what went wrong in any process."""
        if self.under_way is None:
            return
        error, done, self.under_way = self._error(), self.under_way, None
        if not done.waits:
            self.copies.give_back(done.contents)
        if error is not None and not isinstance(error, UserError):
            raise error  # the others are told by the watchdog
        self.watchdog.doing("saved", self.watchdog.now[1])
        errors = [one for one in self.engine.gather(error) if one is not None]
        if errors:
            raise errors[0]

    def settle(self) -> None:
        """Waits for this process's part of what is under way, and tells how it went; for a run that ends by an error
        of its own."""
        if self.under_way is not None and (error := self._error()) is not None:
            self.log.warn(str(error))
        self.under_way = None
        self.copies.let_go()

    def _error(self) -> BaseException | None:
        """The error of the checkpoint under way, once it is done; None if it is whole, which is then logged."""
        assert self.under_way is not None
        error = self.under_way.done.exception()
        if error is None and not self.under_way.is_logged:
            self.under_way.is_logged = True
            written, seconds = self.under_way.done.result()
            if written is not None:
                folder, size_bytes = written
                row = {"step": self.under_way.step, "path": str(folder), "bytes": size_bytes, "seconds": seconds}
                self.log.save({**row, "blocked_seconds": self.under_way.blocked_seconds})
        return error

    # ---- what is written

    def _contents(self) -> Any:
        """Expert (None: the only network) -> what this process writes of it: plain values, and tensors (not copies)."""
        learners = {turn.expert: turn.learner for turn in self.turns.each}
        if self.engine.sharded:
            return {expert: (list(one.pieces()), one.scalars()) for expert, one in learners.items()}
        return {expert: (one.weights(), one.state()) for expert, one in learners.items() if self.engine.main}

    def _work(self, progress: Progress, contents: Any, shares: list[Share]) -> Callable[[], Written]:
        """The function that writes the checkpoint. contents: as `_contents` gives it, or a copy of that."""
        keep, write_more = self.recipe.output.checkpoints_total_limit, partial(self._write_more, shares)
        if self.engine.sharded:
            group = self.engine.cpu_group
            assert group is not None  # several processes have one

            def write_outline_and_more(folder: Path) -> None:
                for turn in self.turns.each:
                    turn.learner.write_outline(checkpoint.part_in(folder, turn.expert), contents[turn.expert][1])
                write_more(folder)

            pieces = {expert: kept for expert, (kept, _) in contents.items()}
            save_shares = partial(checkpoint.save_shares, self.out, progress, pieces, group)
            return partial(save_shares, write_more=write_outline_and_more, keep=keep)
        if not self.engine.main:
            return lambda: None

        def write_networks(folder: Path) -> None:
            for turn in self.turns.each:
                own, (weights, state) = checkpoint.part_in(folder, turn.expert), contents[turn.expert]
                turn.learner.write_weights(weights, state["average"], own)
                checkpoint.write_state(own, state)

        return partial(
            checkpoint.save, self.out, progress, write_networks=write_networks, write_more=write_more, keep=keep
        )

    def _write_more(self, shares: list[Share], folder: Path) -> None:
        self.ledger.save(folder / "ledger.npz", shares)
        (folder / "recipe.yaml").write_text(dump(self.recipe), encoding="utf-8")

    def _has_room(self, contents: Any) -> bool:
        """Whether a copy is wanted, and every machine has memory for the copies of all its processes."""
        if not self.recipe.output.save_in_background:
            return False
        needed = int(SPARE * copied_bytes(contents))
        held = self.copies.held_bytes()  # before room_bytes(), which would count as room what is reserved and not there
        memory = self.engine.gather((platform.node(), needed, held, room_bytes()))
        for machine in {name for name, *_ in memory}:
            needed = sum(needed for name, needed, _, _ in memory if name == machine)
            held = sum(held for name, _, held, _ in memory if name == machine)
            room = held + min(room for name, _, _, room in memory if name == machine)
            if needed > room:
                self._log_no_room(machine, needed, room)
                return False
        return True

    def _log_no_room(self, machine: str, needed: int, room: int) -> None:
        if not self.has_logged_no_room:
            self.log.notice(
                f"training waits while a checkpoint is written: to go on meanwhile it needs {needed / 2**30:.2f} GiB "
                f"of memory for a copy, and {machine} has {room / 2**30:.2f} GiB left"
            )
        self.has_logged_no_room = True


def saves_in_background(recipe: Recipe, step: int, total_steps: int) -> bool:
    """Whether the checkpoint of this step or of a later one is written in the background: any but the run's last."""
    every = recipe.output.checkpointing_steps
    return recipe.output.save_in_background and -(-step // every) * every < total_steps


def _begin(work: Callable[[], Written], asked: float, device: torch.device) -> Future[tuple[Written, float]]:
    """Runs the work in a thread of its own. asked: time.perf_counter() when the save was asked for."""

    def timed() -> tuple[Written, float]:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread begins on the first one
        written = work()
        return written, time.perf_counter() - asked

    writer = ThreadPoolExecutor(1, "save")
    done = writer.submit(timed)
    writer.shutdown(wait=False)
    return done
