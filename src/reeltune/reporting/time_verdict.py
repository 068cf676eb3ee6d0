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


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """What the time of these steps went into, and the remedy where a part other than the network dominates."""
    whole_s = sum(row["step_s"] for row in rows)
    share = {name: sum(row[name] for row in rows) / whole_s for name in PARTS}
    told = (
        f"{share['encode_s']:.0%} of the step is encoding, {share['forward_backward_s']:.0%} forward and backward, "
        f"{share['optimizer_s']:.0%} the optimizer; {share['data_s']:.0%} waits for data"
    ).replace("%", " %")
    return "; ".join([told, *(remedy for name, most, remedy in REMEDIES if share[name] > most)])
