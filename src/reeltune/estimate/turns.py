"""What it takes that two experts change places on the device: how often they do, how much is sent, for how long."""

from __future__ import annotations

from dataclasses import dataclass

from reeltune.estimate.machines import DEVICES, PCIE_4
from reeltune.estimate.remedies import PCIE_BYTES_PER_S
from reeltune.estimate.result import StepEstimate
from reeltune.estimate.sharding import ENGINES, OF_A_NETWORK

REACHED = PCIE_BYTES_PER_S / PCIE_4  # of a link's rate at least, in practice


@dataclass(frozen=True)
class Changes:
    """Changes of place at the steps of a run in which both learn; those for previews and held-out losses are left
    out."""

    count: int
    sent_bytes: int  # by each device at each of them, there and back, one after the other
    seconds: tuple[float, float] | None  # of all, at least and at most; None: the device's link is not known


def changes_in(steps: int, share: float, step: StepEstimate, engine: str, device: str) -> Changes | None:
    """How often two experts change places in so many steps, and what that takes; None where nothing is sent, as shards
    stay. share: of the levels of both, the first one's. device: as of Machines.

    The expert with the smaller share has each of its turns alone (training/turns.py), so that two changes go with it.
    """
    kind, phase = ENGINES[engine], next(iter(step.peaks))
    if kind.own_copies:
        return None
    parts = kind.share(step, phase, 1)
    comes = sum(parts.get(part, 0) for part in OF_A_NETWORK)
    leaves = comes - parts.get("still", 0)  # which is in the CPU's memory too, and does not change
    count = round(2 * min(share, 1 - share) * steps)
    sent = comes + leaves
    if device not in DEVICES:
        return Changes(count, sent, None)
    least = count * sent / DEVICES[device].link_bytes_per_s
    return Changes(count, sent, (least, least / REACHED))
