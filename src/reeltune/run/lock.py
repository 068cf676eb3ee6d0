"""One run at a time writes into an output_dir."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from reeltune.core.errors import UserError
from reeltune.core.files import writing

NAME = ".lock"


@contextmanager
def locked(output_dir: Path) -> Iterator[str | None]:
    """Holds the folder, which is made, until it is left; the system lets it go when the process ends, however it does.
    A folder that was made for it and in which nothing was written goes again.

    Gives a notice where the file system has no locks. Raises UserError that names the process which holds it.
    """
    was_there = output_dir.exists()
    try:
        with _held(output_dir) as notice:
            yield notice
    finally:
        if not was_there and [path.name for path in output_dir.glob("*")] == [NAME]:
            with suppress(OSError):  # another process of the run may be writing there
                (output_dir / NAME).unlink()
                output_dir.rmdir()


@contextmanager
def _held(output_dir: Path) -> Iterator[str | None]:
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / NAME).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as busy:
            file.seek(0)
            raise UserError(
                "output_dir",
                f"{str(output_dir)!r} is being written by another run{_holder(file.read())}; wait until it ends, stop "
                "it, or give another output_dir",
            ) from busy
        except OSError as without:  # ENOLCK, EOPNOTSUPP: some network file systems
            yield f"{output_dir} has no locks ({without.strerror}): a second run that writes there is not noticed"
            return
        file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"process": os.getpid(), "machine": platform.node(), "since": since}
        file.write(json.dumps(about) + "\n")
        file.flush()
        yield None


def _holder(text: str) -> str:
    try:
        about = json.loads(text)
        return f", process {about['process']} on {about['machine']} since {about['since']}"
    except (ValueError, KeyError, TypeError):  # it has locked and not yet written
        return ""
