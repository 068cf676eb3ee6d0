"""The commands of the LoRA guides on tiny checkpoints and real clips."""

import json
import math
import runpy
import shlex
import sys
from dataclasses import dataclass

import pytest
from safetensors.torch import load_file

from tests.runs.test_guides import SMALL
from tests.unit.test_compat import ROOT
from tests.unit.test_compat_lora import COMMANDS

RANK, ALPHA = 4, 2  # as the guides' 64 and 32; tiny layers have no rank of 64
pytestmark = pytest.mark.golden


@dataclass(frozen=True)
class Run:
    command: str  # of COMMANDS
    checkpoint: str  # under the goldens
    meta: str
    mode: str
    layers: set[str]  # what the names of layers end in, numbers left out
    script: str = ""  # another that takes the same flags
    more: str = ""  # flags that the guide describes and its command has not


WAN = {"self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q", "cross_attn.k", "cross_attn.v", "ffn.0", "ffn.2"}
FEED_FORWARD = {"ff.net.0.proj", "ff.net.2"}
EASYANIMATE = {
    *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"{part}.{name}" for part in ("ff", "txt_ff") for name in ("net.0.proj", "net.2")),
    *(f"norm{place}.linear" for place in (1, 2)),
}
RUNS = {
    "Wan control": Run("Wan control", "wan_fun/checkpoints/control_v1.1", "metadata_control.json", "control_ref", WAN),
    "Wan": Run(
        "Wan", "wan_fun/checkpoints/inp", "metadata.json", "inpaint", WAN - {"ffn.2"}, more="--lora_skip_name=ffn.2"
    ),
    "CogVideoX-Fun": Run(
        "CogVideoX-Fun",
        "multi/CogVideoX-Fun-2b-InP",
        "metadata.json",
        "inpaint",
        {"attn1.to_q", "attn1.to_k", "attn1.to_v", *FEED_FORWARD},
    ),
    "HunyuanVideo": Run(
        "HunyuanVideo",
        "multi/HunyuanVideo",
        "metadata.json",
        "normal",
        {"attn.to_q", "attn.to_k", "attn.to_v", *FEED_FORWARD, *(f"ff_context{name[2:]}" for name in FEED_FORWARD)},
    ),
    "EasyAnimate control": Run(
        "EasyAnimate",
        "multi/EasyAnimateV5.1-Control",
        "metadata_control.json",
        "control_ref",
        EASYANIMATE,
        "train_control_lora.py",
    ),
}


@pytest.fixture
def start(goldens, media, tmp_path, monkeypatch, measured_here):
    """Runs a command with our paths and small sizes, by its script, in this process; gives its exit code."""

    def go(run: Run, *more: str) -> int:
        if not (checkpoint := goldens / run.checkpoint).is_dir():
            pytest.skip(f"no {checkpoint.name} at {checkpoint.parent}")
        asked, _ = COMMANDS[run.command]
        ours = {
            "pretrained_model_name_or_path": checkpoint,
            "train_data_dir": media,
            "train_data_meta": media / run.meta,
            "output_dir": tmp_path / "run",
            "train_mode": run.mode,
            "rank": RANK,
            "network_alpha": ALPHA,
        }
        script = run.script or asked.script
        words = [
            *asked.argv,
            *(f"--{name}={value}" for name, value in ours.items()),
            *shlex.split(SMALL),
            *shlex.split(run.more),
            *more,
        ]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(f"scripts/{script}", run_name="__main__")
        return done.value.code

    return go


QUICK = ("Wan control",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_command(name, start, tmp_path):
    run = RUNS[name]
    assert start(run) == 0

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in steps)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["mode"] == run.mode
    folder = tmp_path / "run" / "checkpoint-2"
    assert not (folder / "transformer").exists()
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    ends = (".lora_A.weight", ".lora_B.weight", ".alpha")
    layers = {key.removeprefix("diffusion_model.").removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])}
    assert tensors.keys() == {f"diffusion_model.{layer}{end}" for layer in layers for end in ends}
    for layer in layers:
        A_RI, B_OR, alpha = (tensors[f"diffusion_model.{layer}{end}"] for end in ends)
        assert A_RI.shape[0] == B_OR.shape[1] == RANK and alpha == ALPHA
        assert B_OR.count_nonzero() > 0, f"{layer} did not learn"
    assert {layer for layer in layers if not layer.endswith(tuple(run.layers))} == set()
    assert {end for end in run.layers if not any(layer.endswith(f".{end}") for layer in layers)} == set()


def test_what_cannot_be_followed_is_refused(start, tmp_path, capsys):
    assert start(RUNS["Wan"], "--train_mode=normal", "--rank=64") == 2
    assert "cannot do; it can do inpaint and i2v; set train_mode to inpaint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert start(RUNS["Wan"], "--target_name=q,kk") == 2
    assert "target_name has 'kk'" in capsys.readouterr().err
