"""A run that may be going on, read from its files alone: it is told nothing, and waits for nobody.  (no torch)"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

from reeltune.core.errors import UserError
from reeltune.page.found import METRICS
from reeltune.reporting.metrics import Metrics, take_row
from reeltune.run import lock

LOOKS_S = 1.0  # between two looks at a run's files
SILENCE_S = 15.0  # after which a line is sent that says nothing, by which a browser that has gone is noticed
LEAST_PAUSE_S = 2.0  # between two drawings of a run
PAUSE_FACTOR = 10  # drawing takes a tenth of one core's time at most, however many watch
COMPARED_BYTES = 64  # before the place up to which the file was read, to know it by
LOCKS = Path("/proc/locks")
T = TypeVar("T")


class Tail:
    """metrics.jsonl as it grows. A last line without its end is read once it has one; a file that was cut, as a resumed
    run does, or replaced, is read anew."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._begin(())

    def _begin(self, inode: tuple[int, ...]) -> None:
        self._metrics, self._inode, self._offset, self._before, self._lines = Metrics(), inode, 0, b"", 0

    def read(self) -> Metrics:
        """All rows so far, empty where there is no file yet. Raises UserError for a line that no run has written,
        and for what cannot be read."""
        with self._lock:
            try:
                file = self.path.open("rb")
            except FileNotFoundError:
                self._begin(())
                return Metrics()
            except OSError as refused:
                reason = f"cannot be read ({refused.strerror}); look at what is there, and at its rights"
                raise UserError(str(self.path), reason) from refused
            with file:
                status = os.fstat(file.fileno())
                inode = status.st_dev, status.st_ino
                file.seek(max(self._offset - COMPARED_BYTES, 0))
                if inode != self._inode or file.read(len(self._before)) != self._before:
                    self._begin(inode)
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    try:
                        take_row(self._metrics, line, self.path, self._lines + 1)
                    except UserError:
                        self._begin(())  # a part of it may have been taken
                        raise
                    self._lines += 1
                    self._offset += len(line)
                    self._before = (self._before + line)[-COMPARED_BYTES:]
            rows = self._metrics  # which grows at the next read
            columns = {name: list(values) for name, values in rows.steps.items()}
            return Metrics(columns, *map(list, (rows.validations, rows.obedience, rows.notices, rows.saves)))


def signature(run: Path) -> tuple[Hashable, Hashable]:
    """(of what is drawn, of the clips): each changes when there is something new to see."""
    drawn = tuple(_stamp(run / name) for name in (METRICS, "ledger.json", "run.json"))
    return (*drawn, holder(run)), previews_stamp(run)


def previews_stamp(run: Path) -> Hashable:
    folders = sorted((run / "previews").glob("step-*"))
    return tuple((folder.name, _stamp(folder)) for folder in folders)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_size


def holder(run: Path) -> int | None:
    """The process on this machine that writes into the run's folder now, None for none.

    Told by the system's table of locks (proc_locks(5)), for to try the lock would keep a run from starting.
    """
    held = run / lock.NAME
    try:
        about = json.loads(held.read_text(encoding="utf-8"))
        pid, machine = about["process"], about["machine"]
        status = held.stat()
        locks = LOCKS.read_text(encoding="ascii")
    except (OSError, ValueError, KeyError, TypeError):  # no lock, not yet written, or another system
        return None
    for line in locks.splitlines():
        fields = line.split()  # number, FLOCK, ADVISORY, WRITE, process, major:minor:inode, ...
        if fields[1] == "FLOCK" and fields[4] == str(pid) and fields[5].rpartition(":")[2] == str(status.st_ino):
            return pid if machine == platform.node() and _has_open(pid, status) else None
    return None


def _has_open(pid: int, file: os.stat_result) -> bool:
    """Whether the process has the file open: where children of one that was killed live on, the table has the number
    that it had, which may be another's by now."""
    try:
        opened = [Path(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    except PermissionError:  # another user's; a signal would be refused, too
        return True
    except OSError:
        return False
    return any(os.path.samestat(one.stat(), file) for one in opened if one.exists())


async def changes(run: Path, pause_s: Callable[[], float]) -> AsyncIterator[bytes]:
    """Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html): "drawn" and "clips" as one
    of them has changed, each first at once."""
    sent: list[Hashable] = [None, None]
    sent_at, spoke_at = [-1e9, -1e9], time.monotonic()
    yield b"retry: 2000\n\n"
    while True:
        now = await asyncio.to_thread(signature, run)
        for i, event in enumerate(("drawn", "clips")):
            if now[i] != sent[i] and time.monotonic() - sent_at[i] > pause_s():
                sent[i], sent_at[i], spoke_at = now[i], time.monotonic(), time.monotonic()
                yield f"event: {event}\ndata: {event}\n\n".encode()
        if time.monotonic() - spoke_at > SILENCE_S:
            spoke_at = time.monotonic()
            yield b": still here\n\n"
        await asyncio.sleep(LOOKS_S)


class Drawn(Generic[T]):
    """What takes long to draw, once for all who watch: anew when it is `of` something else, and not too often."""

    def __init__(self, draw: Callable[[], T], of: Callable[[], Hashable]):
        self._draw, self._of = draw, of
        self._lock = threading.Lock()
        self._kept: tuple[T, Hashable, float] | None = None  # with what it is of, and when it was drawn
        self.pause_s = LEAST_PAUSE_S

    def get(self) -> T:
        with self._lock:
            kept, started = self._kept, time.monotonic()
            # Half the pause: who is told of news after a pause gets them.
            if kept is None or (started - kept[2] > self.pause_s / 2 and kept[1] != self._of()):
                of, busy_s = self._of(), time.thread_time()
                value = self._draw()
                self.pause_s = max(LEAST_PAUSE_S, PAUSE_FACTOR * (time.thread_time() - busy_s))
                self._kept = kept = value, of, time.monotonic()
            return kept[0]
