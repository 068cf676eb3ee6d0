"""The guides' plain Wan commands, as printed, on tiny checkpoints and real clips."""

import json
import math
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_compat import ROOT, SCRIPT, commands_in

SMALL = (  # later flags win
    "--image_sample_size=64 --video_sample_size=32 --token_sample_size=48 --video_sample_n_frames=9 "
    "--max_train_steps 2 --dataloader_num_workers 0 --report_to none --preview_count 0"
)
CAMERA = "--train_mode=control_ref_camera --control_ref_image=first_frame"  # as the first guide describes it
PLAIN = {  # name -> (guide, place among its commands, checkpoint, metadata, flags that the text asks for beside)
    "V1.1": ("000_*", 0, "control_v1.1", "metadata_control.json", ""),
    "V1.0": ("000_*", 3, "control_v1.0", "metadata_control.csv", ""),
    "chinese": ("001_*", 0, "control_v1.0", "metadata_control.json", ""),
    "camera": ("000_*", 3, "control_camera", "metadata_camera.json", CAMERA),
}
pytestmark = pytest.mark.golden


@pytest.fixture
def command(goldens, media, seeds, tmp_path):
    """name -> the script's arguments, and the checkpoint that they name."""

    def get(name):
        guide, place, variant, meta, more = PLAIN[name]
        checkpoint = goldens / "wan_fun" / "checkpoints" / variant
        if not checkpoint.is_dir():
            pytest.skip(f"no {variant} at {checkpoint.parent}")
        printed = commands_in(next(seeds.glob(guide)).read_text(encoding="utf-8"))[place]
        assert "--use_deepspeed" not in printed
        paths = [
            f"--pretrained_model_name_or_path={checkpoint}",
            f"--train_data_dir={media}",
            f"--train_data_meta={media / meta}",
            f"--output_dir={tmp_path / 'run'}",
        ]
        return [*printed, *paths, *shlex.split(more), *shlex.split(SMALL)], checkpoint

    return get


def assert_trained(out: Path, checkpoint: Path, entries: int):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in steps)
    assert json.loads((out / "checkpoint-2" / "progress.json").read_text())["step"] == 2
    trained = load_file(out / "checkpoint-2" / "transformer" / "diffusion_pytorch_model.safetensors")
    released = load_file(checkpoint / "diffusion_pytorch_model.safetensors")
    assert {name: w.shape for name, w in trained.items()} == {name: w.shape for name, w in released.items()}
    assert any(not torch.equal(trained[name], released[name].float()) for name in released)
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["entries"] == entries
    assert sum(ledger[name] for name in ("used", "not_reached", "held_out", "left_out")) == entries
    assert {"0_pixels.mp4", "0_reference.png", "0_text.txt"} <= {path.name for path in (out / "first_batch").iterdir()}
    assert (out / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", PLAIN)
def test_command(name, command, media, tmp_path, monkeypatch):
    argv, checkpoint = command(name)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *argv])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(SCRIPT, run_name="__main__")
    assert done.value.code == 0
    entries = 2 if name == "camera" else len(json.loads((media / "metadata_control.json").read_text()))
    assert_trained(tmp_path / "run", checkpoint, entries)
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["mode"] == ("control_ref_camera" if name == "camera" else "control_ref")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["script", "module"])
def test_through_accelerate_launch(way, command, media, tmp_path):
    argv, checkpoint = command("V1.1")
    target = [SCRIPT] if way == "script" else ["-m", "reeltune", "train"]
    launch = [Path(sys.executable).parent / "accelerate", "launch", "--mixed_precision=bf16", *target, *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(launch, cwd=ROOT, env=environment, check=True, timeout=300)
    assert_trained(tmp_path / "run", checkpoint, len(json.loads((media / "metadata_control.json").read_text())))


def test_an_unknown_flag_is_named_with_its_nearest(command, monkeypatch, capsys):
    argv, _ = command("V1.1")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *argv, "--random_hw_adpt"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(SCRIPT, run_name="__main__")
    assert done.value.code == 2
    assert "random_hw_adpt" in (told := capsys.readouterr().err)
    assert "nearest is random_hw_adapt" in told
