"""`python -m benchmarks.gpu.deterministic WORDS`: reeltune, with kernels that give the same bits each time.

https://docs.pytorch.org/docs/stable/notes/randomness.html
"""

from __future__ import annotations

import os
import sys

import torch
from torch.utils import deterministic

from reeltune.cli import main


def choose() -> None:
    """Before the first matrix product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # pyright: ignore  # nothing reads it, and it takes time


if __name__ == "__main__":
    choose()
    sys.exit(main())
