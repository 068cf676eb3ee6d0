"""Most memory of its own that this process held meanwhile: neither shared with others nor mapped from files."""

from __future__ import annotations

import threading
from pathlib import Path

LOOK_SECONDS = 0.001


class Peak:
    """`bytes` is known once it is left: over what was held when it was entered. Linux's RssAnon, looked at often."""

    def __enter__(self) -> Peak:
        self._over, self._before = threading.Event(), own_bytes()
        self._most = self._before
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            self._most = max(self._most, own_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.bytes = self._most - self._before


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
