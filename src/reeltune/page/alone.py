"""One change of a folder's files at a time, whichever tab or server asks for it.  (no torch)"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_threads = threading.Lock()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until nobody else is within for this folder: no thread, and no server on this machine."""
    with _threads:
        handle = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
