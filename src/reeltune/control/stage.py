"""`reeltune control`: a control for every clip of a list, and the list with them.

Any number of processes may run it, together or one after another: each claims the next control that is not there, and
leaves those that others have claimed to them until nothing else is left.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from reeltune.cache.progress import ProgressBar
from reeltune.control.entries import Entry, entries_of, require_apart
from reeltune.control.kind import Detector, Kind, Settings
from reeltune.control.kinds import kind_named
from reeltune.control.records import Claims, Made, Records, claims, hash_of, key_of, size_of
from reeltune.control.source import source_of
from reeltune.control.writing import make_control
from reeltune.core.errors import UserError, refuse
from reeltune.core.interrupt import Interrupt
from reeltune.core.reading import MOST_NAME_BYTES
from reeltune.core.shown import printable
from reeltune.core.types import Kind as MediaKind
from reeltune.data.findings import MediaError, content_of, require_file

notices = logging.getLogger(__name__)  # without a handler, Python prints its warnings bare on stderr
LOOK_AGAIN_S = 0.2  # while other processes make the rest


@dataclass(frozen=True)
class Order:
    """What is asked for."""

    meta: Path
    data_dir: Path
    kinds: tuple[str, ...]
    detectors: Mapping[str, Path]  # by kind
    settings: Settings

    @cached_property
    def entries(self) -> list[Entry]:
        return entries_of(self.meta, self.data_dir)

    def opened(self) -> dict[str, Detector]:
        """Raises UserError with the problems of all kinds, each beside the file that it is of."""
        found, problems = {}, []
        for name in self.kinds:
            try:
                found[name] = kind_named(name).open(self.detectors.get(name), self.settings)
            except UserError as error:
                problems += [f"{error.where}: {problem}" for problem in error.problems]
        refuse("control", problems)
        return found


class Job(NamedTuple):
    kind: Kind
    clip: str
    media: MediaKind
    control: str


def jobs_of(order: Order) -> list[Job]:
    """Each file once for each kind. Raises UserError."""
    found: dict[Job, None] = {}
    for kind in map(kind_named, order.kinds):
        require_apart(order.entries, kind, order.meta)
        found |= dict.fromkeys(
            Job(kind, entry.inside, entry.media, entry.control(kind)) for entry in order.entries if entry.inside
        )
    return list(found)


class Maker:
    """Makes controls, one at a time."""

    def __init__(self, order: Order, detectors: Mapping[str, Detector]):
        self.data_dir, self.detectors = order.data_dir, detectors
        self.records = Records(order.data_dir)
        self.contents: dict[str, int] = {}  # by clip
        self.unread: dict[Job, str] = {}  # why, of what may be readable another time

    def key(self, job: Job) -> str | None:
        """The key of a job's control; None if its clip is not there."""
        if job.clip not in self.contents:
            try:
                path = str(self.data_dir / job.clip)
                require_file(path)
                self.contents[job.clip] = content_of(path)
            except MediaError as error:
                self.unread[job] = str(error)
                return None
        return key_of(job.kind.name, self.detectors[job.kind.name].digest, self.contents[job.clip], job.control)

    def is_done(self, job: Job) -> bool:
        key = self.key(job)
        made = self.records.get(job.kind.name, job.control)
        return job in self.unread or (key is not None and made is not None and self.records.is_whole(made, key))

    def make(self, job: Job) -> None:
        """Raises CannotWriteError; what is wrong with the clip is recorded."""
        key, detector = self.key(job), self.detectors[job.kind.name]
        assert key is not None  # or it would count as done
        path, control = self.data_dir / job.clip, self.data_dir / job.control
        before = self.records.get(job.kind.name, job.control)
        if not self.records.may_go(job.control, before):
            if before is None or not before.bytes:
                self.unread[job] = f"{job.control} is there and was not made by reeltune control; move it away"
                return
            aside = self.records.set_aside(job.control)
            told = f"{printable(job.control)} had been changed since it was made: it is kept as {printable(aside)}"
            notices.warning("%s, and is made again", told)
        if (length := len(os.fsencode(control.name))) > MOST_NAME_BYTES:
            self.unread[job] = f"would have a control whose name has {length} bytes, and {MOST_NAME_BYTES} are allowed"
            return
        begun = Made(key, job.kind.name, job.clip, job.control, detector.digest)
        self.records.put(begun)
        try:
            source = source_of(path, job.media)
            quality = make_control(detector, job.kind.form, path, job.media, source, control)
        except MediaError as error:
            control.unlink(missing_ok=True)  # of another detector, or of what the clip was
            reason = f"{error}. {error.remedy}" if error.remedy else str(error)
            if error.lasting:
                self.records.put(Made(**{**vars(begun), "reason": reason}))
            else:
                self.unread[job] = reason
            return
        facts = {name: float(value) for name, value in quality.facts.items()}
        found = {"frames": len(source.times_s), "score": float(quality.score), "facts": facts}
        if quality.reason:
            control.unlink(missing_ok=True)
            found |= {"reason": quality.reason}
        else:
            found |= {"bytes": size_of(control), "blake2b": hash_of(control)}
        self.records.put(Made(**{**vars(begun), **found}))


def make_all(order: Order, maker: Maker, workers: int) -> int:
    """Every control is made or told why not, by this process, `workers` - 1 that it starts, and any others. Returns 0,
    or 128 + the signal that ended it. Raises UserError."""
    jobs = jobs_of(order)
    with claims(order.data_dir) as held:
        left = [job for job in jobs if not maker.is_done(job)]
        crew = _start(order, min(workers, len(left)) - 1)
        try:
            with (
                Interrupt("ends after this clip") as interrupt,
                ProgressBar(len(left), shown=True, title="control") as bar,
            ):
                there = Counter(job.kind.name for job in set(jobs).difference(left, maker.unread))
                for name, count in sorted(there.items()):
                    bar.say(f"{name}: {count} were there")
                for job, reason in maker.unread.items():
                    bar.say(_left_out(job, reason))
                _work(left, maker, held, interrupt, bar)
                return interrupt.code
        finally:
            for process in crew:
                process.terminate()  # a clip that is being made is finished
            for process in crew:
                process.join()


def _start(order: Order, count: int) -> list:
    context = multiprocessing.get_context("spawn")  # the parent may hold threads and devices
    crew = [context.Process(target=_help, args=(order,), daemon=True) for _ in range(count)]
    for process in crew:
        process.start()
    return crew


def _help(order: Order) -> None:
    """The work of a process that was started: what it cannot do, the one that started it does and tells."""
    with suppress(UserError):  # the disk is full: the other meets it too
        maker = Maker(order, order.opened())
        with claims(order.data_dir) as held, Interrupt() as interrupt:
            _work(jobs_of(order), maker, held, interrupt, None)


def _work(jobs: Sequence[Job], maker: Maker, held: Claims, interrupt: Interrupt, bar: ProgressBar | None) -> None:
    left = list(jobs)
    while left and not interrupt.code:
        others = []
        for job in left:
            if interrupt.code:
                return
            with held.claimed(job.control) as ours:
                if not ours:
                    others.append(job)
                    continue
                if not maker.is_done(job):
                    maker.make(job)
            if bar is not None:
                _tell(job, maker, bar)
        if len(others) == len(left):
            if bar is None:  # the process that started this one waits for the rest
                return
            time.sleep(LOOK_AGAIN_S)
        left = others


def _tell(job: Job, maker: Maker, bar: ProgressBar) -> None:
    made = maker.records.get(job.kind.name, job.control)
    reason = maker.unread.get(job) or (made.reason if made else "")
    if reason:
        bar.say(_left_out(job, reason))
    bar.advance()


def _left_out(job: Job, reason: str) -> str:
    return f"left out: {printable(job.clip)} {reason}"
