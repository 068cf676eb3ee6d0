"""What the page sets going: commands that a user could type, as processes of their own, and the signal that ends a run.

A process that was started here outlives the server; what it prints goes into a file in `logs`.  (no torch)
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from reeltune.core.errors import UserError
from reeltune.core.files import writing
from reeltune.page import live
from reeltune.reporting import report

LOG_BYTES = 8_000  # of the end of a log that is shown


def resume_command(run: Path) -> list[str]:
    """What goes on with a run from its latest checkpoint."""
    return ["reeltune", "train", str(run / "recipe.yaml"), "--resume_from_checkpoint", "latest"]


def shown(command: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(command)


def stop(run: Path) -> None:
    """Asks the process that writes into the folder to finish its step, save and end. Raises UserError for none."""
    pid = live.holder(run)
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
    """`reeltune ...` by this very Python. Returns the log, which is told first what was started."""
    stem = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:80]
    log = logs / f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}.log"
    with writing(log):
        logs.mkdir(parents=True, exist_ok=True)
        file = log.open("wb")
    with file:
        file.write(f"$ {shown(command)}\n".encode())
        file.flush()
        subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C here does not end it
        )
    return log


def end_of(log: Path) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - LOG_BYTES, 0))
        return file.read().decode("utf-8", "replace")
