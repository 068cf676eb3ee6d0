"""Compiled blocks by every engine that can: the run of uncompiled ones, with torch's operators in place of compiled
code."""

import importlib.util
import json

import pytest
import torch

from tests.distributed.processes import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set, recipe

with_deepspeed = importlib.util.find_spec("deepspeed") is not None
WAYS = {
    "ddp": {"engine": "ddp", "gradient_checkpointing": True},
    "fsdp": {"engine": "fsdp", "gradient_checkpointing": "attention_kept", "use_ema": True},
    "zero2": {"engine": "zero2"},
}


def operators(rank):
    """In place of the compiler's code."""
    from torch._dynamo import lookup_backend

    from reeltune.memory import compiled

    compiled.inductor = lookup_backend("aot_eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("engines")
    (folder / "model").mkdir()
    model, data = tiny_checkpoint(folder / "model", "control_v1.1"), data_set(tmp_path_factory.mktemp("data"), clips=4)
    settings = {"train_mode": "control", "max_train_steps": 2, "mixed_precision": "bf16", "fix_sample_size": (32, 64)}
    recipes = [
        recipe(model, data, folder / f"{name}-{how}", compile=how, **settings, **way)
        for name, way in WAYS.items()
        for how in ("none", "blocks")
        if with_deepspeed or name != "zero2"
    ]
    train(recipes, 2, folder, before=operators)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_run_of_uncompiled_blocks(way, folder):
    if way == "zero2" and not with_deepspeed:
        pytest.skip("DeepSpeed is not installed; pip install 'reeltune[zero]'")

    def lines(how):
        return [*map(json.loads, (folder / f"{way}-{how}" / "metrics.jsonl").read_text().splitlines())]

    steps = {how: [row for row in lines(how) if row["kind"] == "step"] for how in ("none", "blocks")}
    for ours, plain in zip(steps["blocks"], steps["none"], strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
    notices = [row["text"] for row in lines("blocks") if row["kind"] == "notice"]
    (told,) = [text for text in notices if "blocks are compiled" in text or "was compiled anew" in text]
    assert told.startswith("the network's blocks are compiled: 1 compilation for")
