"""How much of the machine's memory this process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS = {  # where Linux keeps control groups -> files of one: its limit, what it uses, and a line of memory.stat
    "sys/fs/cgroup": ("memory.max", "memory.current", "inactive_file"),
    "sys/fs/cgroup/memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
}


def room_bytes(root: Path = Path("/")) -> int:
    """What can be had without another program losing its own: the system's estimate or, where it is less, what is left
    of the limits of its control groups (a container's, a batch job's), in which files not used lately count as free.
    """
    return min([psutil.virtual_memory().available, *_of_groups(root)])


def _of_groups(root: Path) -> Iterator[int]:
    groups = root / "proc/self/cgroup"
    lines = groups.read_text().splitlines() if groups.is_file() else []  # number:controllers:path
    own = [Path(line.split(":", 2)[2].lstrip("/")) for line in lines]
    for mount, (limit, used, unused) in GROUPS.items():
        for group in {above for path in own for above in (path, *path.parents)}:
            folder = root / mount / group
            most = (folder / limit).read_text().strip() if (folder / limit).is_file() else "max"
            if most != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int(most) - int((folder / used).read_text()) + int(stat[unused])
