"""What the page sets going: commands that a user could type, as processes of their own, and the signal that ends a run.

A process that was started here outlives the server; what it prints goes into a file in `logs`.  (no torch)
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reeltune.core.errors import UserError
from reeltune.core.files import writing
from reeltune.page import live
from reeltune.reporting import report

LOG_BYTES = 8_000  # of the end of a log that is shown


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes]
    log: Path


_started: dict[tuple[Path, str], Started] = {}  # by folder of logs and name: the last one that this server has started
_one_at_a_time = threading.Lock()  # two tabs ask for the same


def resume_command(run: Path) -> list[str]:
    """What goes on with a run from its latest checkpoint."""
    return ["reeltune", "train", str(run / "recipe.yaml"), "--resume_from_checkpoint", "latest"]


def shown(command: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(command)


def stop(run: Path, logs: Path, name: str) -> None:
    """Asks the process that writes into the folder, or was started here to do so, to finish its step, save and end.
    Raises UserError for none."""
    pid = live.holder(run) or going_on(logs, name)
    if pid is None:
        raise UserError("stop", "no process on this machine writes into this run's folder now; it has ended already")
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        raise UserError("stop", f"process {pid} belongs to another user; ask them to stop it") from None
    except ProcessLookupError:
        raise UserError("stop", f"process {pid} has ended already") from None


def resume(run: Path, logs: Path, name: str) -> Path:
    """Starts the run again from its latest checkpoint. Returns the log. Raises UserError where it cannot."""
    if (pid := live.holder(run)) is not None:
        raise UserError("resume", f"the run is going on, as process {pid}; stop it first")
    if not (run / "recipe.yaml").is_file():
        raise UserError("resume", "the folder has no recipe.yaml, so that nothing is known to go on with")
    processes = report.table_of(run / "run.json").get("processes", 1)
    command = resume_command(run)
    if processes != 1:
        several = ["torchrun", "--nproc_per_node", str(processes), "-m", *command]
        raise UserError("resume", f"the run had {processes} processes, and here one is started; type: {shown(several)}")
    return start(command, logs, name)


def start(command: Sequence[str], logs: Path, name: str) -> Path:
    """`reeltune ...` by this very Python. Returns the log, which is told first what was started.

    Raises UserError while what was started before under that name goes on.
    """
    with _one_at_a_time:
        if (pid := going_on(logs, name)) is not None:
            raise UserError("start", f"it was started here before, and goes on as process {pid}; stop it first")
        log = _new_log(logs, name)
        with log.open("ab") as file:
            file.write(f"$ {shown(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C here does not end it
            )
        _started[logs, name] = Started(process, log)
    return log


def going_on(logs: Path, name: str) -> int | None:
    """The process that was started here under that name and has not ended; it may not have come to its folder yet."""
    last = _started.get((logs, name))
    return last.process.pid if last is not None and last.process.poll() is None else None


def latest_log(logs: Path, name: str) -> Path | None:
    """What this server has started last, whatever the clock said; else the last by name."""
    if (last := _started.get((logs, name))) is not None and last.log.is_file():
        return last.log
    return max(logs.glob(f"*-{_stem(name)}.log"), default=None)


def _new_log(logs: Path, name: str) -> Path:
    """An empty file that no other server writes into."""
    now = time.strftime("%Y%m%d-%H%M%S")
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            log = logs / f"{now}{f'.{number}' if number else ''}-{_stem(name)}.log"
            try:
                log.open("xb").close()
                return log
            except FileExistsError:
                number += 1


def _stem(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:80]


def end_of(log: Path) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - LOG_BYTES, 0))
        return file.read().decode("utf-8", "replace")
