"""Runs whose attention FlashAttention 4 computes, with a stand-in for what a GPU would compute."""

import json

import pytest
import torch
from torch._dynamo import lookup_backend

from reeltune.checkpoint.folder import progress_of
from reeltune.memory import attention, attention_trial, compiled, flash_4
from reeltune.training import attention_choice
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.same_run import StopAfter, assert_same_end, rows
from tests.runs.small_run import recipe
from tests.unit.flash_4_stand_in import stand_in  # noqa: F401

IN_A_STEP = 2 * 3  # blocks, of which each looks at the clip, the caption and the picture
SETTINGS = {
    "max_train_steps": 3,
    "mixed_precision": "bf16",
    "gradient_checkpointing": "attention_kept",
    "video_sample_n_frames": 1,  # of one size
}


def told(out, begins):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["text"] for line in lines if line["kind"] == "notice" and line["text"].startswith(begins)]


@pytest.mark.slow
def test_it_is_found_sooner_and_a_resume_of_the_compiled_run_takes_it(data, tmp_path, stand_in, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    sooner = {"flash": 2.0, "flash_4": 1.0}
    monkeypatch.setitem(attention.CANDIDATES, "cpu", ("flash",))
    monkeypatch.setattr(attention_trial, "_pass_s", lambda calls, kernels: sooner[kernels[0]])
    monkeypatch.setattr(compiled, "inductor", lookup_backend("aot_eager"))
    wan = tiny_checkpoint(tmp_path / "wan", "control_v1.1")
    unbroken, ours, plain = (tmp_path / name for name in ("unbroken", "ours", "plain"))
    settings = {**SETTINGS, "compile": "blocks"}
    assert train(recipe(wan, data, unbroken, **settings)) == 0
    assert progress_of(unbroken / "checkpoint-3").attention == "flash_4"
    assert told(unbroken, "attention is auto")[0].startswith("attention is auto: flash_4 computes it; ")
    assert stand_in["backward"] == 1 + (1 + 3) * IN_A_STEP  # on trial; warming up, and in steps
    with StopAfter(2):
        assert train(recipe(wan, data, ours, **settings)) == 143
    monkeypatch.setattr(attention_choice, "_trial", None)
    assert train(recipe(wan, data, ours, **settings, resume_from_checkpoint="latest")) == 0
    assert_same_end(ours, unbroken, step=3)
    stand_in.clear()
    assert train(recipe(wan, data, plain, **SETTINGS, attention="flash_4")) == 0
    assert stand_in["backward"] == 1 + 3 * IN_A_STEP  # when it is looked for, and in steps
    assert told(plain, "the network's attention")[0].endswith("flash-attn-4 4.0.0's kernel flash_4, and no other")
    for a, b in zip(*(rows(out, ("step", "validation")) for out in (plain, unbroken)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
    monkeypatch.setattr(flash_4, "installed", lambda: None)
    assert train(recipe(wan, data, ours, **{**settings, "max_train_steps": 4}, resume_from_checkpoint="latest")) == 0
    assert (
        "the checkpoint says flash_4, and a process has no such kernel on cpu; flash" in told(ours, "attention is")[-1]
    )
