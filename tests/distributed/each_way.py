"""Small runs of two processes in several ways, each way with every value of a setting.

They read their clips from a cache: what differs is how the network is computed.
"""

import importlib.util
import json

import pytest
import torch

from reeltune.cache.fill import fill
from tests.distributed.processes import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set, recipe

WITH_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
SETTINGS = {
    "train_mode": "control",
    "max_train_steps": 2,
    "mixed_precision": "bf16",
    "fix_sample_size": (32, 64),
    "cache_variants": 1,
}


def run_each(ways, setting, values, tmp_path_factory, before=None, of_one_size=False):
    """ways: name -> what its recipes say beside SETTINGS. before: as of processes.train. of_one_size: without stills.
    Returns the folder of all."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("engines")
    (folder / "model").mkdir()
    model, data = tiny_checkpoint(folder / "model", "control_v1.1"), data_set(tmp_path_factory.mktemp("data"), clips=4)
    listed = data / "metadata_control.json"
    if of_one_size:
        clips = [row for row in json.loads(listed.read_text()) if row["type"] == "video"]
        listed = data / "clips.json"
        listed.write_text(json.dumps(clips))
    settings = {**SETTINGS, "cache_folder": str(folder / "cache"), "train_data_meta": str(listed)}
    recipes = [
        recipe(model, data, folder / f"{name}-{value}", **{setting: value}, **settings, **way)
        for name, way in ways.items()
        for value in values
        if WITH_DEEPSPEED or name != "zero2"
    ]
    assert fill(recipes[0]) == 0
    train(recipes, 2, folder, before=before)
    return folder


def rows_of(folder, way, value, kind):
    """Of metrics.jsonl; skips a way that was not run."""
    if way == "zero2" and not WITH_DEEPSPEED:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")
    lines = map(json.loads, (folder / f"{way}-{value}" / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]
