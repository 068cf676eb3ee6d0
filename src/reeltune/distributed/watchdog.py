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
from typing import Any

import torch.distributed as dist

from reeltune.core.errors import UserError

BEAT_SECONDS = 2.0
LOST_SECONDS = 60.0  # without a sign of life; longer than any library is known to keep Python from running threads
BROKEN_SECONDS = 10.0  # the same, once the connection to some process has broken
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may well succeed
# What a process can be at; once saved, it waits for others' saves.
DOING = ("start", "validate", "data", "encode", "forward", "step", "save", "saved", "end")


class Watch:
    """While entered, `doing` is told to the others. One process alone has nobody to watch.

    Left by an error, it tells the others, who stop. Raises UserError, naming the process, where the error is that the
    connection to another has broken.
    """

    def __init__(self, rank: int, world: int, patience_seconds: float):
        self.rank, self.world, self.patience_seconds = rank, world, patience_seconds
        self._doing = ("start", 0, 0, time.monotonic())
        self._over, self._left = threading.Event(), threading.Event()
        self._thread = None if world == 1 else threading.Thread(target=self._beat, name="watch", daemon=True)
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (its last beat, when it came)

    def doing(self, what: str, step: int) -> None:
        """`what`: one of DOING. All processes come to the same ones in the same order."""
        self._doing = (what, step, self._doing[2] + 1, time.monotonic())

    @property
    def now(self) -> tuple[str, int]:
        """(one of DOING, step) of this process."""
        return self._doing[:2]

    def __enter__(self) -> Watch:
        if self._thread is not None:
            # A connection of its own, for one that waits is locked.
            self._store = dist.distributed_c10d._get_default_store().clone()
            self._say(0)
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
                self._tell(error)
        finally:
            self._left.set()

    def _tell(self, error: BaseException) -> None:
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
                self._say(count)
                verdict = self._verdict()
            except dist.DistError as broken:
                verdict = f"rank 0, where all processes meet, is gone ({str(broken).splitlines()[0]})"
            if verdict is not None and not self._over.is_set():
                self._stop(verdict)

    def _say(self, count: int) -> None:
        what, step, moves, since = self._doing
        seconds = time.monotonic() - since
        told = {"beat": count, "what": what, "step": step, "place": (moves, _exchanges()), "seconds": seconds}
        self._store.set(f"watch/{self.rank}", json.dumps(told))

    def _verdict(self) -> str | None:
        """Why all must stop, if they must. Rank 0 looks after all, the others after rank 0."""
        if self._store.check(["watch/verdict"]):
            return self._store.get("watch/verdict").decode()
        told = self._listen(range(self.world) if self.rank == 0 else [0])
        verdict = self._lost(told, LOST_SECONDS) or (self._late(told) if self.rank == 0 else None)
        if verdict is not None:
            self._announce(verdict)
        return verdict

    def _listen(self, ranks) -> dict[int, dict]:
        told = {rank: json.loads(self._store.get(f"watch/{rank}")) for rank in ranks}
        now = self._answered = time.monotonic()
        for rank, one in told.items():
            if rank not in self._heard or self._heard[rank][0] != one["beat"]:
                self._heard[rank] = (one["beat"], now)
        return told

    def _lost(self, told: dict[int, dict], seconds: float) -> str | None:
        now = time.monotonic()
        lost = [rank for rank in told if rank != self.rank and now - self._heard[rank][1] > seconds]
        return f"no sign of life for {seconds:g} s: {_named(lost, told)}" if lost else None

    def _late(self, told: dict[int, dict]) -> str | None:
        """The processes furthest behind, once none has come to another thing for too long.

        Of those that are at the same, the late one has begun fewer exchanges than those that wait for it in one.
        """
        if min(one["seconds"] for one in told.values()) <= self.patience_seconds:
            return None
        last = min(one["place"] for one in told.values())
        behind = [rank for rank, one in told.items() if one["place"] == last]
        if len(behind) == len(told):
            one = told[0]
            return (
                f"all processes have been at step {one['step']}, {one['what']}, for more than rank_timeout_seconds = "
                f"{self.patience_seconds:g}"
            )
        return f"others wait for more than rank_timeout_seconds = {self.patience_seconds:g}: {_named(behind, told)}"

    def _announce(self, verdict: str) -> None:
        """Once rank 0 is gone nobody can be told, and all find out by themselves."""
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
                told = self._listen(range(self.world))
            except dist.DistError:
                return f"rank 0, where all processes meet, is gone; {REMEDY}"
            if lost := self._lost(told, BROKEN_SECONDS):
                return f"{lost}; {REMEDY}"
            self._say(-int(time.monotonic()))
            time.sleep(BEAT_SECONDS)
        return None


REMEDY = "run again with resume_from_checkpoint latest"


def _exchanges() -> int:
    """How many exchanges with others this process has begun, in all its groups."""
    return sum(group._get_sequence_number_for_group() for group in list(dist.distributed_c10d._world.pg_map))


def _named(ranks: list[int], told: dict[int, dict]) -> str:
    shown = [f"rank {rank} at step {told[rank]['step']}, {told[rank]['what']}" for rank in ranks[:8]]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return "; ".join(shown) + more
