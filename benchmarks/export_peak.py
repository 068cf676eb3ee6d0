"""`python -m benchmarks.export_peak WARM CHECKPOINT OUT SIZE`: exports in shards of SIZE: seconds and peak memory.

In a process of its own, which must not have held tensors before: what small ones leave free is not given back to the
system, unless MALLOC_MMAP_THRESHOLD_ says so (tensors above 32 MiB always are). WARM is a small checkpoint that is
exported first, for what is loaded at first use is not the export's. The forward pass, which holds the whole network, is
left out.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.peak import Peak
from reeltune.export.main import export

NOWHERE = "nowhere"  # without its model, no forward pass: the files alone


def main(warm: str, checkpoint: str, out: str, size: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        list(export(Path(warm), Path(name) / "warm"))
    begin = time.perf_counter()
    with Peak() as peak:
        lines = list(export(Path(checkpoint), Path(out), max_shard_size=size, pretrained_model_name_or_path=NOWHERE))
    print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": peak.bytes, "told": lines}))


if __name__ == "__main__":
    main(*sys.argv[1:])
