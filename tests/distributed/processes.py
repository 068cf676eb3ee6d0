"""Runs in several processes on one machine, over gloo, each within a time limit."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from reeltune import cli
from reeltune.config.recipe import Recipe
from reeltune.distributed import watchdog
from reeltune.families import MODULES
from reeltune.reporting import report
from reeltune.training import loop

LIMIT_SECONDS = 240


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


def start(command: list[str], **more) -> subprocess.Popen:
    """In a process group of its own, so that a kill takes all of it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, **{**pipes, "env": environment(), **more})


def end(process: subprocess.Popen, limit_seconds: float = LIMIT_SECONDS) -> tuple[int, str]:
    """(exit code, what it printed)."""
    try:
        told, _ = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        told, _ = process.communicate()
        raise AssertionError(f"not done after {limit_seconds} s:\n{told}") from None
    return process.returncode, told


def ends(processes: list[subprocess.Popen], limit_seconds: float = LIMIT_SECONDS) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each; all are ended if one is not done in time."""
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda process: end(process, limit_seconds), processes))


# ---- forked from a process that has read the libraries, which takes longest

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["reeltune.training.loop", *MODULES.values(), *(["deepspeed"] if find_spec("deepspeed") else [])]
)


@dataclass
class Run:
    """One run in several processes."""

    forks: list
    told: list[Path]  # what each prints

    def kill(self, *ranks: int) -> None:
        """All, if none is named."""
        for rank in ranks or range(len(self.forks)):
            self.forks[rank].kill()

    def until(self, true: Callable[[], object], limit_seconds: float = LIMIT_SECONDS) -> None:
        deadline = time.monotonic() + limit_seconds
        while not true():
            assert time.monotonic() < deadline and self.forks[0].is_alive(), self.print()
            time.sleep(0.0005)

    def end(self, limit_seconds: float = LIMIT_SECONDS) -> list[int]:
        """Exit codes; all are ended if one is not done in time."""
        deadline = time.monotonic() + limit_seconds
        for fork in self.forks:
            fork.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, fork in enumerate(self.forks) if fork.is_alive()]
        self.kill()
        assert not late, f"ranks {late} were not done after {limit_seconds} s\n{self.print()}"
        return [fork.exitcode for fork in self.forks]

    def print(self) -> str:
        return "\n".join(f"---- rank {rank}\n{path.read_text()}" for rank, path in enumerate(self.told))


Work = Recipe | Callable[[], int]  # which returns an exit code


def forked(work: Sequence[Work], count: int, folder: Path, before: Callable[[int], None] | None = None) -> Run:
    """One thing after another in the same `count` processes, which print into files in `folder`.

    before: is called in each, with its rank; a function of a module's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    told = [folder / f"{port}-rank-{rank}.txt" for rank in range(count)]
    forks = [FORKS.Process(target=_one, args=(rank, count, port, work, told[rank], before)) for rank in range(count)]
    for fork in forks:
        fork.start()
    return Run(forks, told)


def _one(rank: int, count: int, port: int, work: Sequence[Work], told: Path, before: Callable | None) -> None:
    with told.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
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
