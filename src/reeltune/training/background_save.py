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
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from reeltune.checkpoint import folder as checkpoint
from reeltune.config.parse import dump
from reeltune.core.errors import UserError
from reeltune.core.types import Progress
from reeltune.distributed.sharded_io import Piece
from reeltune.memory.host import room_bytes
from reeltune.memory.size import size_bytes
from reeltune.reporting.ledger import Share
from reeltune.training.run import Run

# Memory wanted, over the size of the copy. Writing it took 0.4 % more (measured, 2026-11); the rest is for what else
# goes on, such as reading clips.
SPARE = 1.2

Written = tuple[Path, int] | None  # what checkpoint.save returns, where this process did it


@dataclass
class UnderWay:
    done: Future[tuple[Written, float]]  # with the seconds from the call of `save` until the checkpoint was whole
    step: int
    waits: bool  # whether training waits until it is done
    blocked_seconds: float = 0.0
    is_logged: bool = False


class Saving:
    """All processes call `save` and `finish` together; at most one checkpoint is under way.

    What goes wrong in the writing of one process is raised by the next `finish` of all, UserError for a full disk;
    `save` begins with it. Where the memory of a machine has no room for the copies, or the recipe wants none, or no
    more training follows (`last`), `save` ends with it too.
    """

    def __init__(self, run: Run):
        self.out, self.recipe, self.engine, self.watchdog = run.out, run.recipe, run.engine, run.watchdog
        self.turns, self.ledger, self.log = run.turns, run.ledger, run.log
        self.step = -1  # that has a checkpoint, or has one under way
        self.under_way: UnderWay | None = None
        self.has_logged_no_room = False

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
            work = self._work(replace(progress), contents if waits else copied(contents), shares)
            self.under_way = UnderWay(_begin(work, asked, self.engine.device), progress.step, waits)
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
        error = self._error()
        self.under_way = None
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
        needed = int(SPARE * sum(_copied_bytes(leaf) for leaf in tree_leaves(contents)))
        memory = self.engine.gather((platform.node(), needed, room_bytes()))
        for machine in {name for name, _, _ in memory}:
            needed = sum(needed for name, needed, _ in memory if name == machine)
            room = min(room for name, _, room in memory if name == machine)
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


def copied(contents: Any) -> Any:
    """A copy of the tree, whose tensors are in the host's memory."""
    return tree_map(_copied, contents)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Piece):
        return replace(leaf, values_N=_copied(leaf.values_N))
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf


def _copied_bytes(leaf: Any) -> int:
    return size_bytes(leaf.values_N if isinstance(leaf, Piece) else leaf)
