"""No process waits for ever for another: each tells the others what it is doing, and all stop if one is late or gone.

A thread beside the training tells and looks, over the processes' store: what they met at when the run was launched.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Literal

import torch.distributed as dist

from reeltune.core.errors import UserError

BEAT_SECONDS = 2.0
LOST_SECONDS = 60.0  # without a sign of life; longer than any library is known to keep Python from running threads
BROKEN_SECONDS = 10.0  # the same, once the connection to some process has broken
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
# What a process can be at; once saved, it waits for others' saves.
Doing = Literal["start", "validate", "data", "encode", "forward", "step", "save", "saved", "end"]


class Watchdog:
    """While entered, `doing` is told to the others. One process alone has nobody to watch.

    Left by an error, it tells the others, who stop. Raises UserError, naming the process, where the error is that the
    connection to another has broken.
    """

    def __init__(self, rank: int, world: int, patience_seconds: float):
        self.rank, self.world, self.patience_seconds = rank, world, patience_seconds
        self._doing: tuple[Doing, int, int, float] = ("start", 0, 0, time.monotonic())
        self._over, self._left = threading.Event(), threading.Event()
        self._thread = None if world == 1 else threading.Thread(target=self._beat, name="watch", daemon=True)
        self._last_beats: dict[int, tuple[int, float]] = {}  # rank -> (its last beat, when it came)

    def doing(self, what: Doing, step: int) -> None:
        """All processes come to the same things in the same order."""
        self._doing = (what, step, self._doing[2] + 1, time.monotonic())

    @property
    def now(self) -> tuple[Doing, int]:
        """(what, step) of this process."""
        return self._doing[:2]

    def __enter__(self) -> Watchdog:
        if self._thread is not None:
            # A connection of its own, for one that waits is locked.
            store: Any = dist.distributed_c10d._get_default_store()  # torch's type stubs know no clone
            self._store = store.clone()
            self._report(0)
            dist.barrier()
            self._answered = time.monotonic()
            self._thread.start()
            threading.Thread(target=self._guard, name="guard", daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        try:
            if error is not None:
                self._announce_error(error)
        finally:
            self._left.set()

    def _announce_error(self, error: BaseException) -> None:
        what, step = self.now
        if isinstance(error, RuntimeError) and (lost := self._lost_after_a_break()):
            self._announce(lost)
            raise UserError("processes", lost) from error
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        with suppress(dist.DistError):  # rank 0 may have stopped already, by the same error
            self._announce(f"rank {self.rank} stopped at step {step}, {what}: {first}")

    # ---- the threads

    def _guard(self) -> None:
        """Questions to a store whose machine has gone without a word are never answered, nor do they time out."""
        while not self._left.wait(BEAT_SECONDS):
            if time.monotonic() - self._answered > LOST_SECONDS:
                self._stop(f"no answer for {LOST_SECONDS:g} s from rank 0, where all processes meet")

    def _beat(self) -> None:
        count = 0
        while not self._over.wait(BEAT_SECONDS):
            count += 1
            try:
                self._report(count)
                verdict = self._verdict()
            except dist.DistError as broken:
                verdict = f"rank 0, where all processes meet, is gone ({str(broken).splitlines()[0]})"
            if verdict is not None and not self._over.is_set():
                self._stop(verdict)

    def _report(self, count: int) -> None:
        what, step, moves, since = self._doing
        seconds = time.monotonic() - since
        status = {"beat": count, "what": what, "step": step, "place": (moves, _exchanges()), "seconds": seconds}
        self._store.set(f"watch/{self.rank}", json.dumps(status))

    def _verdict(self) -> str | None:
        """Why all must stop, if they must. Rank 0 looks after all, the others after rank 0."""
        if self._store.check(["watch/verdict"]):
            return self._store.get("watch/verdict").decode()
        statuses = self._listen(range(self.world) if self.rank == 0 else [0])
        verdict = self._lost(statuses, LOST_SECONDS) or (self._late(statuses) if self.rank == 0 else None)
        if verdict is not None:
            self._announce(verdict)
        return verdict

    def _listen(self, ranks) -> dict[int, dict]:
        statuses = {rank: json.loads(self._store.get(f"watch/{rank}")) for rank in ranks}
        now = self._answered = time.monotonic()
        for rank, one in statuses.items():
            if rank not in self._last_beats or self._last_beats[rank][0] != one["beat"]:
                self._last_beats[rank] = (one["beat"], now)
        return statuses

    def _lost(self, statuses: dict[int, dict], seconds: float) -> str | None:
        now = time.monotonic()
        lost = [rank for rank in statuses if rank != self.rank and now - self._last_beats[rank][1] > seconds]
        return f"no sign of life for {seconds:g} s: {_named(lost, statuses)}" if lost else None

    def _late(self, statuses: dict[int, dict]) -> str | None:
        """The processes furthest behind, once none has come to another thing for too long.

        Of those that are at the same, the late one has begun fewer exchanges than those that wait for it in one.
        """
        if min(one["seconds"] for one in statuses.values()) <= self.patience_seconds:
            return None
        last = min(one["place"] for one in statuses.values())
        behind = [rank for rank, one in statuses.items() if one["place"] == last]
        if len(behind) == len(statuses):
            one = statuses[0]
            return (
                f"all processes have been at step {one['step']}, {one['what']}, for more than rank_timeout_seconds = "
                f"{self.patience_seconds:g}"
            )
        return f"others wait for more than rank_timeout_seconds = {self.patience_seconds:g}: {_named(behind, statuses)}"

    def _announce(self, verdict: str) -> None:
        """Tells the others why all stop; once rank 0 is gone nobody can be told, and all find out by themselves."""
        with contextlib.suppress(dist.DistError):
            if not self._store.check(["watch/verdict"]):
                self._store.set("watch/verdict", verdict)

    def _stop(self, verdict: str) -> None:
        """The process ends here, for its own thread may wait for ever."""
        sys.stderr.write(f"rank {self.rank} stops: {verdict}; {REMEDY}\n")
        sys.stderr.flush()
        if f"rank {self.rank} " in verdict:
            faulthandler.dump_traceback(all_threads=True)
        if self.rank == 0:
            time.sleep(2 * BEAT_SECONDS)  # the others hear why from here
        os._exit(EXIT_CODE)

    def _lost_after_a_break(self) -> str | None:
        """Who is gone, if anybody is, or what another process said before it went."""
        until = time.monotonic() + BROKEN_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < until:
            try:
                if self._store.check(["watch/verdict"]):
                    return f"{self._store.get('watch/verdict').decode()}; {REMEDY}"
                statuses = self._listen(range(self.world))
            except dist.DistError:
                return f"rank 0, where all processes meet, is gone; {REMEDY}"
            if lost := self._lost(statuses, BROKEN_SECONDS):
                return f"{lost}; {REMEDY}"
            self._report(-int(time.monotonic()))
            time.sleep(BEAT_SECONDS)
        return None


REMEDY = "run again with resume_from_checkpoint latest"


def _exchanges() -> int:
    """How many exchanges with others this process has begun, in all its groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _named(ranks: list[int], statuses: dict[int, dict]) -> str:
    shown = [f"rank {rank} at step {statuses[rank]['step']}, {statuses[rank]['what']}" for rank in ranks[:8]]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return "; ".join(shown) + more
