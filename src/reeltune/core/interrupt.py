"""Ctrl-C and SIGTERM: finish the step, save, leave with a clear code. A second Ctrl-C leaves at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPED = "stopped by Ctrl-C\n"
GRACE_SECONDS = 5.0  # after SIGTERM, for what must be removed; half of what container runtimes give
END = b"\0"  # the number of no signal
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar has hidden


class Interrupt:
    """While entered, remembers the first signal instead of dying of it.

    `code` is 0 until then, and 128 + the signal's number afterwards (130 for Ctrl-C, 143 for SIGTERM). ends: what comes
    before the end, in words; the first signal is answered with them.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, ends: str = "") -> None:
        self.code, self.ends = 0, ends

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:
            leave(128 + number)
        if not self.code and self.ends:
            _tell(f"{self.ends}; Ctrl-C again leaves at once\n".encode())
        self.code = self.code or 128 + number


def ends_at_once() -> None:
    """From here on Ctrl-C ends this process with a line, for nothing is under way yet that it could leave half done.
    Where it is ignored, as behind nohup, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    _tell(STOPPED.encode())
    os._exit(128 + number)


def ends_in_order() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as Python has it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def unheard() -> Iterator[None]:
    """Within, processes are started that hear no Ctrl-C, not even while they import; whoever starts them ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def second_leaves() -> Iterator[None]:
    """Within, a second Ctrl-C ends this process and its workers, whatever the main thread waits for or computes.

    Python's own handlers run between two of that thread's instructions, which a slow file or network may keep apart for
    minutes. Here a thread reads the signals that the system's handler writes into a pipe. Of the main thread alone;
    elsewhere it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    thread = threading.Thread(target=_count, args=(ours,), name="interrupt", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(theirs, END)  # closing it would not tell the thread, for workers may have it open too
        thread.join()
        os.close(theirs)
        os.close(ours)


@contextmanager
def terminates() -> Iterator[None]:
    """Within, SIGTERM ends this process with 143 once what it has begun is removed, or after GRACE_SECONDS within
    `second_leaves`. Of one process alone: several are ended by their launcher, and may wait for each other."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _count(pipe: int) -> None:
    seen = 0
    late = threading.Timer(GRACE_SECONDS, leave, [128 + signal.SIGTERM])
    late.daemon = True
    while END not in (numbers := os.read(pipe, 64)):
        seen += numbers.count(signal.SIGINT)
        if seen > 1:
            leave(128 + signal.SIGINT)
        if signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) is _terminate and late.ident is None:
            late.start()
    late.cancel()
    if late.ident is not None:
        late.join()


def _have_own_signals() -> None:
    """A forked process does not write its signals into its parent's pipe, which would end that, and ends at once."""
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_have_own_signals)


def leave(code: int) -> None:
    """Ends this process and its workers now. They ignore Ctrl-C, and one that hangs would not see that its parent has
    gone."""
    # Imported by whoever started workers; to import it here could wait for the main thread, and slows every start.
    multiprocessing = sys.modules.get("multiprocessing")
    for worker in multiprocessing.active_children() if multiprocessing else ():
        worker.kill()
    if sys.stderr is not None and sys.stderr.isatty():
        _tell(SHOW_CURSOR + b"\n")
    os._exit(code)


def _tell(words: bytes) -> None:
    """Past Python's buffers, which the interrupted thread may hold."""
    with suppress(OSError):
        os.write(2, words)
