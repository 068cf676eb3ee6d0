"""Ctrl-C and SIGTERM: finish the step, save, leave with a clear code. A second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Interrupt:
    """While entered, remembers the first signal instead of dying of it.

    `code` is 0 until then, and 128 + the signal's number afterwards (130 for Ctrl-C, 143 for SIGTERM).
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.code = 0

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:
            os._exit(128 + number)
        self.code = self.code or 128 + number
