"""A command that hangs: in a reader of clips, or in what is computed without Python."""

import hashlib
import multiprocessing
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import torch

from reeltune import cli
from reeltune.data import loader

SIGNS = "hung"  # folder with a file for each process that hangs, named by its number


def run(argv, folder: Path, place: str):
    """place: "read", or the path of a function that computes for hours instead of what it does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is born without
    os.setsid()  # Ctrl-C comes to all of a terminal's processes
    multiprocessing.set_start_method("fork", force=True)  # of readers, as outside of tests
    torch.set_num_threads(1)
    with (folder / "err").open("wb") as err:
        os.dup2(err.fileno(), 2)
    hang = in_a_file if place == "read" else in_arithmetic

    def hung(*_, **__):
        (folder / SIGNS / str(os.getpid())).touch()
        hang(folder)

    if place == "read":
        loader.read_frames = hung
    else:
        module, *owner, name = place.split(":")
        holder = getattr(import_module(module), owner[0]) if owner else import_module(module)
        assert hasattr(holder, name), f"{place} is nowhere"
        setattr(holder, name, hung)
    sys.exit(cli.main(argv))


def in_a_file(folder: Path):
    os.open(folder / "fifo", os.O_RDONLY)  # which nobody writes to, as on a file server that is gone


def in_arithmetic(_: Path):
    """Hours in which no handler of Python is called."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
