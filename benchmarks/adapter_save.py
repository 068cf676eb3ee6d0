"""A checkpoint of an adapter beside one of the whole network: `python -m benchmarks.adapter_save`.

Blocks as wide as Wan2.1-Fun-1.3B's, rank 32 in every linear layer, AdamW's state in both: the shares are those of all
of its 30 blocks, as most of a checkpoint is blocks. One step is trained, and its save waited for.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set, recipe

SIZE = {"width": 1536, "heads": 12, "layers": 4}
RUNS = {"whole": {}, "adapter": {"rank": 32, "network_alpha": 32}}


def save_of(model: Path, data: Path, out: Path, **changes) -> dict:
    """The row of its metrics.jsonl that tells bytes and seconds."""
    settings = {"max_train_steps": 1, "train_batch_size": 1, "held_out_share": 0.0, "save_in_background": False}
    assert train(recipe(model, data, out, **settings, **changes)) == 0
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return next(row for row in rows if row["kind"] == "save")


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = data_set(folder / "data", clips=2, stills=0)
        model = tiny_checkpoint(folder / "model", "control_v1.1", **SIZE)
        rows = {kind: save_of(model, data, folder / kind, **changes) for kind, changes in RUNS.items()}
    for kind, row in rows.items():
        print(f"a checkpoint of {kind}: {row['bytes'] / 1e6:,.1f} MB in {row['seconds']:.2f} s")
    return {f"adapter_save_{what}": rows["whole"][what] / rows["adapter"][what] for what in ("bytes", "seconds")}


if __name__ == "__main__":
    main()
