"""Runs in several processes on one machine, over gloo, and how long they may be silent."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch

from reeltune import cli
from reeltune.config.recipe import Recipe
from reeltune.distributed import watchdog
from reeltune.families import MODULES
from reeltune.reporting import report
from reeltune.training import loop
from tests.flushing import flush_nothing

SILENCE_SECONDS = 300.0  # of a busy machine; the whole of a run may take as long as it needs
FOUND_SECONDS = 120.0  # silence after which a rank that is gone, late or lost must have been missed by the others
LOOK_SECONDS = 0.5  # between two looks at what is written
NAP_SECONDS = 0.01  # between two looks at whether it has ended: a processor has other things to do meanwhile
SHORT_NAP_SECONDS = 0.002  # between two looks at what is to be met under way; a save on a slow disk takes 0.05 at least


def wait(
    done: Callable[[], object],
    pulse: Callable[[], object],
    silence_seconds: float = SILENCE_SECONDS,
    nap_seconds: float = 0.0005,
) -> bool:
    """Until `done` is true; False if `pulse` was the same for `silence_seconds` before that."""
    last, heard, looked = pulse(), time.monotonic(), time.monotonic()
    while not done():
        now = time.monotonic()
        if now - looked > min(LOOK_SECONDS, silence_seconds / 4):
            looked, current = now, pulse()
            if current != last:
                last, heard = current, now
        if now - heard > silence_seconds:
            return False
        time.sleep(nap_seconds)
    return True


def changes(*folders: Path) -> set[tuple[str, int]]:
    """Every file below the folders, with its time of change: another set as soon as a line or a file is written."""
    found = set()
    for place, _, names in chain.from_iterable(map(os.walk, folders)):
        for name in names:
            path = os.path.join(place, name)
            with suppress(OSError):  # moved or removed in between
                found.add((path, os.stat(path).st_mtime_ns))
    return found


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """Without what a launcher around the tests may have left."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


@dataclass
class Launched:
    process: subprocess.Popen
    printed: IO[str]


def start(command: list[str], **more) -> Launched:
    """In a process group of its own, so that a kill takes all of it."""
    printed = TemporaryFile("w+")  # noqa: SIM115  # closed by `end`
    more = {"env": environment(), "stdout": printed, "stderr": subprocess.STDOUT, "text": True, **more}
    return Launched(subprocess.Popen(command, start_new_session=True, **more), printed)


def end(launched: Launched, silence_seconds: float = SILENCE_SECONDS) -> tuple[int, str]:
    """(exit code, what it printed). All of it is ended if it prints nothing for `silence_seconds`."""
    process, printed = launched.process, launched.printed

    def size_bytes() -> int:
        return os.fstat(printed.fileno()).st_size

    done = wait(lambda: process.poll() is not None, size_bytes, silence_seconds, NAP_SECONDS)
    if not done:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with printed:
        printed.seek(0)
        text = printed.read()
    assert done, f"silent for {silence_seconds} s after:\n{text}"
    return process.returncode, text


def ends(launched: list[Launched], silence_seconds: float = SILENCE_SECONDS) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each."""
    with ThreadPoolExecutor(len(launched)) as pool:
        return list(pool.map(lambda one: end(one, silence_seconds), launched))


# ---- forked from a process that has read the libraries, which takes longest

# What they import when they are first used, and with it torch's whole compiler: 1.2 s of an engine's start, 0.5 of an
# adapter's (measured, 2026-11-27).
USED_LATER = {
    "bitsandbytes": ("bitsandbytes",),
    "deepspeed": (
        *("deepspeed", "deepspeed.ops", "deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer"),
        *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.superoffload.superoffload_stage3"),
    ),
}
FORKS = multiprocessing.get_context("forkserver")  # a session has one, for all tests: who tells it last is heard
FORKS.set_forkserver_preload(
    [
        "tests.distributed.libraries",
        *("reeltune.training.loop", "reeltune.cache.fill", "reeltune.sampling.sample", "reeltune.export.main"),
        *("reeltune.estimate.page", "reeltune.estimate.check", *MODULES.values()),
        *(module for library, used in USED_LATER.items() if find_spec(library) for module in used),
        *("tests.distributed.gathered", "tests.families.every_family"),  # what tests tell their forks to do is beside
        "tests.distributed.warmed",
        "tests.distributed.frozen",  # last
    ]
)


@dataclass
class Run:
    """One run in several processes."""

    forks: list
    told: list[Path]  # what each prints
    folders: Sequence[Path] = ()  # where they write beside

    def kill(self, *ranks: int) -> None:
        """All, if none is named."""
        for rank in ranks or range(len(self.forks)):
            self.forks[rank].kill()

    def _wait(self, done: Callable[[], object], silence_seconds: float, nap_seconds: float) -> bool:
        folders = {path.parent for path in self.told}.union(self.folders)
        return wait(done, lambda: changes(*folders), silence_seconds, nap_seconds)

    def until(self, true: Callable[[], object], silence_seconds: float = SILENCE_SECONDS) -> None:
        """AssertionError, and an end to all, if rank 0 ends before, or if none writes for `silence_seconds`."""
        self._wait(lambda: true() or not self.forks[0].is_alive(), silence_seconds, SHORT_NAP_SECONDS)
        if not true():
            self.kill()
            raise AssertionError(self.print())

    def end(self, silence_seconds: float = SILENCE_SECONDS) -> list[int]:
        """Exit codes; all are ended if none writes a line or a file for `silence_seconds`."""
        self._wait(lambda: not any(fork.is_alive() for fork in self.forks), silence_seconds, NAP_SECONDS)
        late = [rank for rank, fork in enumerate(self.forks) if fork.is_alive()]
        self.kill()
        for fork in self.forks:
            fork.join()
        assert not late, f"ranks {late} were silent for {silence_seconds} s\n{self.print()}"
        return [fork.exitcode for fork in self.forks]

    def print(self) -> str:
        return "\n".join(f"---- rank {rank}\n{path.read_text()}" for rank, path in enumerate(self.told))


Work = Recipe | Callable[[], int]  # which returns an exit code


def forked(
    work: Sequence[Work],
    count: int,
    folder: Path,
    before: Callable[[int], None] | None = None,
    *,
    flushed: bool = False,
) -> Run:
    """One thing after another in the same `count` processes, which print into files in `folder`.

    before: is called in each, with its rank; a function of a module's own. flushed: what is written is on the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    told = [folder / f"{port}-rank-{rank}.txt" for rank in range(count)]
    given = [(rank, count, port, work, told[rank], before, flushed) for rank in range(count)]
    forks = [FORKS.Process(target=_one, args=one) for one in given]
    for fork in forks:
        fork.start()
    return Run(forks, told, [folder, *(Path(one.output.output_dir) for one in work if isinstance(one, Recipe))])


def _one(
    rank: int, count: int, port: int, work: Sequence[Work], told: Path, before: Callable | None, flushed: bool = False
) -> None:
    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    if not flushed:
        flush_nothing()
    if before is not None:
        before(rank)
    for one in work:
        code = cli.guarded(partial(_train, one) if isinstance(one, Recipe) else one)
        if code:
            raise SystemExit(code)


def _train(recipe: Recipe) -> int:
    report.write = lambda out: out / "report.html"  # has tests of its own, and takes longer than a tiny run
    return loop.train(recipe)


def train(work: Sequence[Work], count: int, folder: Path, before: Callable[[int], None] | None = None) -> Run:
    """As `forked`, to the end."""
    run = forked(work, count, folder, before)
    assert run.end() == [0] * count, run.print()
    return run


def hasty(rank: int) -> None:
    """For `before`: whoever is gone is missed after two seconds, not ten."""
    watchdog.BEAT_SECONDS, watchdog.BROKEN_SECONDS = 0.2, 2.0
