"""Where a detector's networks run."""

from __future__ import annotations

import torch

from reeltune.core.errors import UserError


def require_device(device: str) -> None:
    """Raises UserError for one that torch has not."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError("device", f"--device {device} cannot be used ({reason}); give cpu") from error
