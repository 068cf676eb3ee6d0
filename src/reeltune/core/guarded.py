"""Where every command ends: an exit code, and in words what is not our own mistake.  (no torch)"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable

from reeltune.core.errors import UserError
from reeltune.core.files import REFUSED, refusal
from reeltune.core.interrupt import STOPPED, ends_in_order, second_leaves, terminates


def guarded(act: Callable[[], int]) -> int:
    """act(), with what the user can mend printed without a traceback, and so what the system refuses wherever it is
    asked: a path too long, a folder that may not be entered, a full disk behind `>`. Our own mistakes keep theirs. A
    second Ctrl-C leaves at once, and SIGTERM once what was begun is removed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may have letters that this terminal's encoding has not
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        logging.getLogger("reeltune").setLevel(logging.ERROR)  # one process gives notices
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # diffusers imports it; it misses kernels nobody uses
    try:
        ends_in_order()
        _refuse_lost_folders()
        with second_leaves(), terminates():
            code = act()
        sys.stdout.flush()
        return code
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(STOPPED)
        return 130
    except BrokenPipeError:  # of `| head`
        _print_no_more()
        return 141  # 128 + SIGPIPE, as shells tell it
    except OSError as refused:
        if refused.errno not in REFUSED:
            raise
        if refused.filename is None:
            _print_no_more()
        sys.stderr.write(f"{refusal(refused)}\n")
        return 2


def _print_no_more() -> None:
    """Python would try to write what is left when it ends, and end in a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse_lost_folders() -> None:
    """Raises UserError where the working folder is gone, or no temporary file can be made: without either torch's
    libraries do not even load."""
    try:
        os.getcwd()
    except FileNotFoundError as gone:
        raise UserError(
            "reeltune", "the folder that this was started in has been removed; cd to one that is there"
        ) from gone
    try:
        tempfile.gettempdir()
    except FileNotFoundError as nowhere:
        raise UserError(
            "reeltune", "no temporary file can be made in TMPDIR, /tmp or /var/tmp; set TMPDIR to a folder with room"
        ) from nowhere
