"""Work beside the requests.  (no torch)"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from reeltune.core.errors import UserError
from reeltune.core.files import REFUSED, refusal

THREAD = "judge"  # name of those that work
KEPT = 8  # results; those of a long list are large


class Jobs:
    """What takes long, each once, one after another beside the requests. The server does not wait for it to end."""

    def __init__(self):
        self._jobs: dict[Any, Future[Any]] = {}
        self._lock, self._one_at_a_time = threading.Lock(), threading.Lock()

    def begin(self, key: Any, act: Callable[[], Any]) -> None:
        """Unless it has begun."""
        with self._lock:
            if key in self._jobs:
                return
            done = [key for key, job in self._jobs.items() if job.done()]  # oldest first
            for old in done[: max(len(done) - KEPT + 1, 0)]:
                del self._jobs[old]
            self._jobs[key] = future = Future()
        threading.Thread(target=self._run, args=(future, act), name=THREAD, daemon=True).start()

    def _run(self, future: Future[Any], act: Callable[[], Any]) -> None:
        with self._one_at_a_time:
            try:
                future.set_result(act())
            except UserError as error:
                future.set_exception(error)
            except OSError as error:
                if error.errno not in REFUSED or error.filename is None:
                    raise
                future.set_exception(refusal(error))
            finally:
                if not future.done():  # a mistake of ours, which Python tells on stderr
                    future.set_exception(UserError("page", "it broke; the terminal of reeltune serve tells how"))

    def busy(self) -> bool:
        return any(not job.done() for job in list(self._jobs.values()))

    def begun(self, key: Any) -> bool:
        return key in self._jobs

    def forget(self, key: Any) -> None:
        with self._lock:
            self._jobs.pop(key, None)

    def result(self, key: Any) -> tuple[Any, UserError | None]:
        """(what came of it, what was wrong); neither before it is done."""
        job = self._jobs.get(key)
        if job is None or not job.done():
            return None, None
        error = job.exception()
        return (None, error) if isinstance(error, UserError) else (job.result(), None)
