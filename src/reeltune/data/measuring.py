"""Every file measured once: in parallel, within a time limit, and remembered until it changes.  (no torch)

What is limited is processor time, so that how busy the machine is decides about no file.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil

from reeltune.core.errors import UserError
from reeltune.core.files import whole_file
from reeltune.core.interrupt import unheard
from reeltune.data.camera import CameraError, read_poses
from reeltune.data.findings import content_of
from reeltune.data.media import DecodeCheck, Measure, MediaError, measure, measure_control, require_times

INDEX_VERSION = 2  # raise it when a Measure is found otherwise
KEYS = {"image": "image 2"}  # or, of one kind of file, what its keys begin with; 2: turned TIFFs
SAVE_SECONDS = 30.0  # between saves while measuring
START_SECONDS = 1200.0  # that a process may take to import what it needs: of a busy machine's share, hundreds
# In which a process that reads a file waits and does not compute at all: its disk or network share does not answer.
STILL_SECONDS = 60.0
ABSENT = [-1, -1]  # stamp of a file that is not there


class File(NamedTuple):
    path: str
    kind: Literal["video", "image", "camera", "keypoints"]
    clip: str = ""  # of key points: the clip that they are to be of, frame by frame


class Finding(NamedTuple):
    """What is known of a file: its Measure (None for a camera path), or why it cannot be used."""

    measure: Measure | None
    reason: str | None = None
    lasting: bool = True  # holds as long as the file's bytes do
    remedy: str = ""  # where there is more to say than to mend or replace the file
    poses: int = 0  # of a camera path
    content_of_path: int = 0  # of a camera path, see content_of

    @property
    def content(self) -> int:
        return self.measure.content if self.measure else self.content_of_path


def stamps(paths: Iterable[str]) -> np.ndarray:
    """int64 N,2: bytes and time of change in nanoseconds; ABSENT where there is no file."""
    return np.fromiter(_stamped(paths), np.int64).reshape(-1, 2)


def _stamped(paths: Iterable[str]) -> Iterator[int]:
    """Two numbers a file, and nothing that would be looked through for garbage."""
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            yield from ABSENT
        else:
            yield status.st_size
            # From 2262 on, nanoseconds since 1970 pass 64 bits; they are told apart all the same.
            yield (status.st_mtime_ns + 2**63) % 2**64 - 2**63


def _why_absent(path: str) -> str:
    try:
        os.stat(path)
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    return "was not there a moment ago"


def measure_files(
    files: Sequence[File],
    stamps_N2: np.ndarray,
    *,
    decode_check: DecodeCheck,
    index_dir: Path | None,
    workers: int,
    seconds_per_file: float,
    progress: Callable[[int, int], None] | None,
) -> list[Finding]:
    """A Finding for each file. Those in the index with the same stamp are not opened.

    A file that takes more processor time than `seconds_per_file`, stands still, or kills its process, is found
    unusable. `progress(done, total)`. Raises UserError if no process can be started.
    """
    index = _load_index(index_dir, decode_check)
    keys = [":".join(filter(None, (KEYS.get(file.kind, file.kind), file.path, file.clip))) for file in files]
    stamp_of = dict(zip((file.path for file in files), stamps_N2.tolist(), strict=True))
    findings: list[Finding | None] = []
    for file, key in zip(files, keys, strict=True):
        held, stamp = index.get(key), stamp_of[file.path]
        if stamp == ABSENT:
            findings.append(Finding(None, _why_absent(file.path)))
        else:
            findings.append(_remembered(held, stamp + stamp_of.get(file.clip, [])))
    missing = [number for number, finding in enumerate(findings) if finding is None]
    done, saved = len(files) - len(missing), time.monotonic()
    try:
        for number, finding in _run(files, missing, decode_check, max(workers, 1), seconds_per_file):
            findings[number] = finding
            if finding.lasting:
                file = files[number]
                index[keys[number]] = [stamp_of[file.path] + stamp_of.get(file.clip, []), _packed(finding)]
            done += 1
            if progress:
                progress(done, len(files))
            if time.monotonic() - saved > SAVE_SECONDS:
                _save_index(index_dir, decode_check, index)
                saved = time.monotonic()
    finally:
        if missing:
            _save_index(index_dir, decode_check, index)
    return [finding for finding in findings if finding is not None]


# The index: one JSON file a decode check, {kind:path: [[bytes, time], finding]}


def _index_path(index_dir: Path, decode_check: str) -> Path:
    return index_dir / f"files-{decode_check}-v{INDEX_VERSION}.json"


def _load_index(index_dir: Path | None, decode_check: str) -> dict[str, list]:
    if index_dir is None:
        return {}
    try:
        index = json.loads(_index_path(index_dir, decode_check).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):  # absent, or not ours: measure anew
        return {}
    return index if isinstance(index, dict) else {}


def _save_index(index_dir: Path | None, decode_check: str, index: dict[str, list]) -> None:
    if index_dir is not None:
        data = json.dumps(index, separators=(",", ":")).encode()
        with whole_file(_index_path(index_dir, decode_check), "wb") as file:
            file.write(data)


def _packed(finding: Finding) -> list:
    m = finding.measure
    measured = None if m is None else [m.kind, m.frames, m.fps, m.height, m.width, m.notes, m.content]
    of_path = [finding.content_of_path] if finding.poses else []
    return [measured, finding.reason, finding.remedy, finding.poses, *of_path]


def _remembered(held: Any, stamp: list[int]) -> Finding | None:
    """What the index says of a file with that stamp; None for nothing, and for what we did not write."""
    try:
        return _unpacked(held[1]) if held[0] == stamp else None
    except (TypeError, ValueError, LookupError):
        return None


def _unpacked(packed: list) -> Finding:
    measured, reason, remedy, poses, *of_path = packed
    if len(of_path) != bool(poses):  # as before 2026-11-27: a camera path is soon read again
        raise ValueError(of_path)
    if measured is not None:
        kind, frames, fps, height, width, notes, content = measured
        if kind not in ("video", "image") or not all(type(n) is int and n > 0 for n in (frames, height, width)):
            raise ValueError(kind)
        measured = Measure(kind, frames, float(fps), height, width, tuple(map(str, notes)), content)
    return Finding(measured, reason, remedy=remedy, poses=poses, content_of_path=sum(of_path))


# The processes


def _examine(file: File, decode_check: DecodeCheck) -> Finding:
    try:
        if file.kind == "camera":
            return Finding(None, poses=len(read_poses(file.path)), content_of_path=content_of(file.path))
        if file.kind == "keypoints":
            found = measure_control(file.path, "video")
            if file.clip:
                require_times(file.path, file.clip)
            return Finding(found)
        return Finding(measure(file.path, file.kind, decode_check))
    except CameraError as error:
        return Finding(None, str(error), lasting=os.path.exists(file.path))
    except MediaError as error:
        return Finding(None, str(error), error.lasting, error.remedy)
    except OSError as error:
        return Finding(None, f"cannot be read: {error.strerror}", lasting=False)


def _serve(link: Connection, decode_check: DecodeCheck, seconds: float) -> None:
    try:
        link.send(None)  # ready: imports do not count against a file
        while True:
            file = link.recv()
            end_after(seconds)
            link.send(_examine(file, decode_check))
    except (EOFError, ConnectionError):  # the parent is gone; reset where something that we sent was not read
        return


def end_after(seconds: float) -> None:
    """The system ends this process, by SIGXCPU, once it has computed for so long from now: no decoder prevents it."""
    most = math.ceil(time.process_time() + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # which that signal would write


class _Worker:
    """A process that can be killed when a decoder hangs, as a thread or a pool's process cannot."""

    def __init__(self, decode_check: DecodeCheck, seconds: float):
        self.seconds = seconds  # of processor time, of a file
        context = multiprocessing.get_context("spawn")  # the parent may hold threads and devices
        self.link, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, decode_check, seconds), daemon=True)
        with unheard():
            self.process.start()
        theirs.close()
        self.file: int | None = None
        self.computed_s = 0.0  # when it was last looked at
        self.look_at = time.monotonic() + START_SECONDS

    def receive(self) -> tuple[Finding | None, bool]:
        """(its finding, or None if it has only just started; whether it lives)."""
        try:
            return self.link.recv(), True
        except (EOFError, ConnectionError):
            self.process.join()
            if self.process.exitcode == -signal.SIGXCPU:
                reason = f"takes more than {self.seconds:g} s of processor time to decode"
            else:
                reason = "ends the process that decodes it"
            return Finding(None, reason, lasting=False), False

    def give(self, number: int, files: Sequence[File]) -> None:
        self.file = number
        with suppress(ConnectionError):  # it has died since: `receive` finds out
            self.link.send(files[number])
        self.computed_s, self.look_at = -1.0, time.monotonic() + STILL_SECONDS

    def stands_still(self) -> bool:
        """Whether it waits, and has not computed since it was last looked at; else it is looked at again later. A busy
        machine may give it no time to compute, but then it does not wait."""
        if self.file is None:  # it has not begun
            return True
        before = self.computed_s
        with suppress(psutil.NoSuchProcess):  # it has just ended: `receive` finds out
            process = psutil.Process(self.process.pid)
            times = process.cpu_times()
            self.computed_s = times.user + times.system
            if self.computed_s == before and process.status() != psutil.STATUS_RUNNING:
                return True
        self.look_at = time.monotonic() + STILL_SECONDS
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.link.close()


def _not_started(code: int | None) -> UserError:
    return UserError(
        "scan",
        f"none of the processes that measure files has begun: each ended first (the last with exit code {code}), or "
        f"took more than {START_SECONDS:g} s; see that the machine has memory left and is not overloaded, and start "
        "again",
    )


def _run(
    files: Sequence[File], numbers: list[int], decode_check: DecodeCheck, workers: int, seconds: float
) -> Iterator[tuple[int, Finding]]:
    """(number, finding) as they come. Processes that do not start are done without. Raises UserError if all do not."""
    todo = iter(numbers)
    left = len(numbers)
    crew = [_Worker(decode_check, seconds) for _ in range(min(workers, left))]
    try:
        while left:
            timeout = max(min(worker.look_at for worker in crew) - time.monotonic(), 0)
            wait([worker.link for worker in crew], timeout)
            for worker in list(crew):
                if worker.link.poll():
                    finding, alive = worker.receive()
                elif time.monotonic() >= worker.look_at and worker.stands_still():
                    reason = f"stands still: nothing of it has come for {STILL_SECONDS:g} s"
                    remedy = "see that its disk or network share answers"
                    finding, alive = Finding(None, reason, lasting=False, remedy=remedy), False
                else:
                    continue
                given = worker.file
                if given is not None and finding is not None:
                    yield given, finding
                    left -= 1
                number = next(todo, None) if alive else None
                if number is not None:
                    worker.give(number, files)
                    continue
                worker.close()
                crew.remove(worker)
                if given is not None and not alive and left:
                    crew.append(_Worker(decode_check, seconds))
                if left and not crew:
                    raise _not_started(worker.process.exitcode)
    finally:
        for worker in crew:
            worker.close()
