"""Recomputing all but attention, by every engine that can, also with clips shared: the bits of full recomputation."""

import importlib.util
import json

import pytest
import torch

from tests.distributed.processes import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set, recipe

with_deepspeed = importlib.util.find_spec("deepspeed") is not None
WAYS = {
    "ddp": {"engine": "ddp"},
    "adapters": {"engine": "ddp", "rank": 4, "base_weights": "int8"},
    "shared": {"engine": "ddp", "context_parallel": 2},
    "fsdp": {"engine": "fsdp"},
    "zero2": {"engine": "zero2"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("engines")
    (folder / "model").mkdir()
    model, data = tiny_checkpoint(folder / "model", "control_v1.1"), data_set(tmp_path_factory.mktemp("data"), clips=4)
    settings = {"train_mode": "control", "max_train_steps": 2, "mixed_precision": "bf16", "fix_sample_size": (32, 64)}
    recipes = [
        recipe(model, data, folder / f"{name}-{recomputed}", gradient_checkpointing=recomputed, **settings, **way)
        for name, way in WAYS.items()
        for recomputed in (True, "attention_kept")
        if with_deepspeed or name != "zero2"
    ]
    train(recipes, 2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_run_of_full_recomputation(way, folder):
    if way == "zero2" and not with_deepspeed:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")

    def steps(recomputed):
        lines = map(json.loads, (folder / f"{way}-{recomputed}" / "metrics.jsonl").read_text().splitlines())
        return [(row["loss"], row["grad_norm"]) for row in lines if row["kind"] == "step"]

    assert len(steps(True)) == 2
    assert steps("attention_kept") == steps(True)
