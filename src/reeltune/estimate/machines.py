"""The devices that a run is planned for, and what so many of them cannot do.  (no torch)"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from reeltune.config.parse import flat
from reeltune.config.recipe import Recipe
from reeltune.config.rules import broken_under
from reeltune.core.errors import UserError, refuse
from reeltune.memory import choices

GB = 10**9  # of a device's size. Cards have some 7 % more than so many; CUDA's own needs and gaps are left that
PCIE_4, PCIE_5 = 31.5e9, 63.0e9  # bytes/s one way: 16 lanes of 16 and 32 GT/s, 128 of 130 bits of them data
MOST_GPUS = 16_384  # that one run is planned for; the samples of a step of more take a minute to draw
MOST_TFLOPS = 100_000  # of one device; more is a slip of units


class Device(NamedTuple):
    size_gb: int
    link_bytes_per_s: float  # with the CPU's memory


DEVICES = {  # from NVIDIA's data sheet of each
    "B200": Device(180, PCIE_5),
    "H200": Device(141, PCIE_5),
    "H100": Device(80, PCIE_5),
    "A100": Device(80, PCIE_4),
    "L40S": Device(48, PCIE_4),
    "L4": Device(24, PCIE_4),
    "RTX 6000 Ada": Device(48, PCIE_4),
    "RTX 4090": Device(24, PCIE_4),
    "RTX 3090": Device(24, PCIE_4),
}


@dataclass(frozen=True)
class Machines:
    """What the run is planned for."""

    gpus: int = 1
    device: str = "80GB"
    """A name of DEVICES, or a size such as 48GB."""
    throughput_tflops: float | None = None  # reached by each device
    measured: Path | None = None  # an earlier run's folder

    @property
    def size_bytes(self) -> int:
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB", self.device)
        if size and float(size[1]) > 0:
            return int(float(size[1]) * GB)
        if self.device in DEVICES:
            return DEVICES[self.device].size_gb * GB
        raise UserError(
            "plan",
            f"device is {self.device!r}, not one of {', '.join(DEVICES)}, nor a size; give one, such as 48GB",
        )


def check(recipe: Recipe, machines: Machines) -> None:
    """Raises UserError for machines that there are not, and for what so many, or the run's engine, cannot do."""
    machines.size_bytes  # noqa: B018
    gpus, together, given = machines.gpus, recipe.parallel.context_parallel, machines.throughput_tflops
    problems = broken_under(recipe)
    if not 1 <= gpus <= MOST_GPUS:
        problems.append(f"gpus is {gpus}; it must be at least 1 and at most {MOST_GPUS:,}; give all of a run")
    elif gpus % together:
        problems.append(
            f"gpus is {gpus} and context_parallel is {together}, of which gpus must be a multiple; give "
            f"{-(-gpus // together) * together}, or leave context_parallel out"
        )
    if given is not None and not 0 < given < MOST_TFLOPS:
        problems.append(
            f"throughput is {given:g} TFLOP/s; it must be more than 0 and less than {MOST_TFLOPS:,}; leave it out "
            "where it is not known"
        )
    if given is not None and machines.measured is not None:
        problems.append("throughput and measured are both given, and say the same; leave one out")
    if gpus > 1:
        problems += [
            f"{name} is {getattr(recipe.memory, name)} and gpus is {gpus}; devices that train together must have all "
            "gradients and weights at once; leave it out, or plan for one"
            for name in choices.pulled_alone(flat(recipe))
        ]
    refuse("plan", problems)
