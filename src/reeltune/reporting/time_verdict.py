"""What the time of steps went into, in words.  (no torch)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reeltune.reporting.metrics import PARTS

# (part of the step, share of it above which something should be done, what)
REMEDIES = (
    ("data_s", 0.10, "to wait less for data, raise dataloader_num_workers up to the free cores or store smaller clips"),
    ("encode_s", 0.30, "to encode less, use reeltune cache; to encode faster, mixed_precision bf16 or smaller sizes"),
    ("optimizer_s", 0.30, "to step the optimizer less often, raise gradient_accumulation_steps"),
)


ROOMY = 0.7  # share of the device's memory; where a run needs less, `plan` may know a faster one


def verdict(rows: Sequence[dict[str, Any]], device_bytes: int | None = None, sparing: Sequence[str] = ()) -> str:
    """What the time of these steps went into, and the remedy where a part other than the network dominates, or where
    memory is spared that is not needed.

    device_bytes: its memory. sparing: settings of the run that take time to spare memory.
    """
    whole_s = sum(row["step_s"] for row in rows)
    share = {name: sum(row[name] for row in rows) / whole_s for name in PARTS}
    told = (
        f"{share['encode_s']:.0%} of the step is encoding, {share['forward_backward_s']:.0%} forward and backward, "
        f"{share['optimizer_s']:.0%} the optimizer; {share['data_s']:.0%} waits for data"
    ).replace("%", " %")
    remedies = [remedy for name, most, remedy in REMEDIES if share[name] > most]
    peak_bytes = max(row.get("peak_memory_bytes") or 0 for row in rows)
    if device_bytes and sparing and peak_bytes < ROOMY * device_bytes:
        remedies.append(
            f"{peak_bytes / 1e9:.1f} of {device_bytes / 1e9:.1f} GB are used, and time is taken to spare memory by "
            f"{' and '.join(sparing)}: `reeltune plan` with this recipe tells which of it the run could do without"
        )
    return "; ".join([told, *remedies])
