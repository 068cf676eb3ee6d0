"""Deaths and full disks at each change that an operation makes to a folder; and a flipped bit.

Python tells of every file that it opens, renames or removes (sys.addaudithook, PEP 578), whichever library asks for it;
LIBRARIES open theirs without Python. Each fault is tried in a forked process of its own:

killed      it ends at once, before the change; files that were not flushed to the disk by then lose their second half
full        files that are written from there on take LEAST_BYTES and no more (RLIMIT_FSIZE, which all libraries meet)
no room     no file or folder can be made from there on (ENOSPC)
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reeltune.core.errors import UserError

KILLED = 9  # exit code
REFUSED = 2
LEAST_BYTES = 20
FAULTS = ("killed", "full", "no room")
PATHS = {"open": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1}  # event -> how many paths it has
LIBRARIES = (
    *(("torch", "save"), ("reeltune.families.weights", "save_file"), ("reeltune.adapters.saved", "save_file")),
    ("av", "open"),
)


@dataclass(frozen=True)
class Operation:
    """seen: what a reader finds in the folder; it raises where something damaged is taken for whole. allows: whether
    that may be found between `before` and `after`; only these two may, if it is not given."""

    act: Callable[[Path], object]
    seen: Callable[[Path], Any]
    prepare: Callable[[Path], object] = lambda folder: None
    allows: Callable[[Any, Any, Any], bool] = lambda before, found, after: found in (before, after)


class Fault:
    """Armed, it counts the changes below a folder, and strikes at one of them (0: at none)."""

    def __init__(self, folder: Path, kind: str = "", at: int = 0):
        self.folder, self.kind, self.at = str(folder), kind, at
        self.changes: list[str] = []
        self.flushed: set[int] = set()  # inodes

    def arm(self) -> None:
        """For the rest of this process."""
        self.flushed = {path.stat().st_ino for path in Path(self.folder).rglob("*")}
        os.fsync = lambda file: self.flushed.add(os.fstat(file).st_ino)  # to flush truly would take longest
        for module, name in LIBRARIES:
            owner = sys.modules[module]
            setattr(owner, name, self._told(getattr(owner, name)))
        sys.addaudithook(self._hear)

    def _told(self, write: Callable) -> Callable:
        def telling(*words, **more):
            path = next((word for word in (*words, *more.values()) if isinstance(word, str | os.PathLike)), None)
            if path is not None and (write.__module__ != "av.container.core" or "w" in words):
                self._change("library", path)
            return write(*words, **more)

        return telling

    def _hear(self, event: str, words: tuple) -> None:
        if event not in PATHS or (event == "open" and not words[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        folder = words[-1] if event in ("os.mkdir", "os.remove", "os.rmdir") else -1
        beside = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else ""
        for path in words[: PATHS[event]]:
            if isinstance(path, str | os.PathLike) and self._change(event, os.path.join(beside, path)):
                return

    def _change(self, event: str, path: str | os.PathLike) -> bool:
        """Whether it is one of the folder's."""
        where = os.path.abspath(path)
        if not where.startswith(self.folder + os.sep):
            return False
        self.changes.append(event)
        if self.at and len(self.changes) >= self.at:
            self._strike(event)
        return True

    def _strike(self, event: str) -> None:
        if self.kind == "killed":
            for path in Path(self.folder).rglob("*"):
                if path.is_file() and path.stat().st_ino not in self.flushed:
                    os.truncate(path, path.stat().st_size // 2)
            os._exit(KILLED)
        if self.kind == "no room" and event in ("open", "library", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (LEAST_BYTES, LEAST_BYTES))


def attempt(act: Callable[[], object], fault: Fault) -> tuple[int, Mapping[str, Any]]:
    """(exit code, what was told) of a process that does it, with the fault."""
    ours, theirs = os.pipe()
    process = os.fork()
    if not process:
        code, told = 1, ""
        try:
            torch.set_num_threads(1)
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # what pytest gives is a file
            fault.arm()
            act()
            code = 0
        except UserError as error:
            code, told = REFUSED, str(error)
        except BaseException:  # noqa: BLE001  # whatever it is, the test is to hear of it
            told = traceback.format_exc()
        finally:
            os.write(theirs, json.dumps({"told": told[-20_000:], "changes": fault.changes}).encode())
            os._exit(code)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return code, json.loads(said) if said else {}


def partial(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith(".partial"))


def sweep(operation: Operation, folder: Path, every: int = 1) -> int:
    """Each fault at every so-manieth change: whatever is found then is old or new, and the operation done again ends as
    if nothing had been. Returns how many faults were tried."""
    before, work = folder / "before", folder / "work"
    before.mkdir(parents=True)
    operation.prepare(before)

    def restore() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(before, work, symlinks=True)

    restore()
    old = operation.seen(work)
    code, said = attempt(lambda: operation.act(work), Fault(work))
    assert code == 0, said["told"]
    new, changes = operation.seen(work), said["changes"]
    assert new != old and not partial(work)
    tried = 0
    for kind in FAULTS:
        for at, event in enumerate(changes, 1):
            if at % every or (kind != "killed" and event not in ("open", "library", "os.mkdir")):
                continue
            restore()
            where = f"{kind} at change {at} of {len(changes)}, {event}"
            code, said = attempt(lambda: operation.act(work), Fault(work, kind, at))
            check_end(kind, code, said, where, work, event)
            found = operation.seen(work)
            assert operation.allows(old, found, new), (where, found)
            operation.act(work)
            assert operation.seen(work) == new, where
            tried += 1
    return tried


def check_end(kind: str, code: int, said: Mapping, where: str, work: Path, event: str) -> None:
    if kind == "killed":
        assert code == KILLED, (where, code, said)
        return
    need_not_fail = kind == "full" or event == "os.mkdir"  # what fits in LEAST_BYTES, and a folder that is there
    ends = (0, REFUSED) if need_not_fail else (REFUSED,)
    assert code in ends, f"{where}: {said.get('told', code)}"
    if code == REFUSED:
        told = said["told"]
        assert str(work) in told and " GB free" in told, f"{where}: {told}"
        assert told.count("\n") == 1, f"{where}: {told}"
        assert not partial(work), where


def flip(path: Path, place: float = 0.5) -> None:
    """One bit, that far into the file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0x40
    path.write_bytes(content)
