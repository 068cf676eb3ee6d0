"""Where a detector's networks run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reeltune.core.errors import UserError


def require_device(device: str) -> None:
    """Raises UserError for one that torch has not."""
    try:
        torch.zeros(1, device=device).item()  # of torch's device meta there is nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError("device", f"--device {device} cannot be used ({reason}); give cpu") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets a CPU compute with one thread: with more, a network's last bits depend on how many there are, and so on the
    machine and on what else runs there. More cores are used by more processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
