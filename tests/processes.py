"""Runs in several processes on one machine, over gloo, each within a time limit."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reeltune.recipe import Recipe
from reeltune.settings import dump

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


def ranks(count: int, *words: str) -> list[subprocess.Popen]:
    """`python words` in so many processes that know of each other, as launchers start them."""
    port = str(free_port())
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}

    def one(rank: int) -> subprocess.Popen:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        return start([sys.executable, *words], env=environment(**meeting, **place))

    return [one(rank) for rank in range(count)]


def ends(processes: list[subprocess.Popen], limit_seconds: float = LIMIT_SECONDS) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each; all are ended if one is not done in time."""
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(lambda process: end(process, limit_seconds), processes))


def train(recipes: list[Recipe], count: int, folder: Path, limit_seconds: float = LIMIT_SECONDS) -> None:
    """Trains by one recipe after another in the same `count` processes."""
    script = str(Path(__file__).with_name("several_runs.py"))
    for code, told in ends(ranks(count, script, *written(recipes, folder)), limit_seconds):
        assert code == 0, told


def written(recipes: list[Recipe], folder: Path) -> list[str]:
    """A file for each."""
    files = []
    for recipe in recipes:
        files.append(str(folder / f"{Path(recipe.output.output_dir).name}.yaml"))
        Path(files[-1]).write_text(dump(recipe))
    return files
