"""The guides' commands, as printed, on tiny checkpoints and real clips."""

import json
import math
import re
import runpy
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from reeltune.families import weights
from tests.distributed import processes
from tests.unit.test_compat import ROOT, Command, commands_in

SMALL = (  # later flags win
    "--image_sample_size=64 --video_sample_size=32 --token_sample_size=48 --video_sample_n_frames=9 "
    "--max_train_steps 2 --dataloader_num_workers 0 --report_to none --preview_count 0"
)
CAMERA = "--train_mode=control_ref_camera --control_ref_image=first_frame"  # as the first guide describes it
MORE = (  # flags that the guides describe and give in other commands
    "--use_came --random_frame_crop --random_ratio_crop --motion_sub_loss --low_vram --report_model_info "
    "--resume_from_checkpoint=latest"
)


@dataclass(frozen=True)
class Run:
    guide: str
    place: int  # among the guide's commands
    checkpoint: str  # under the goldens
    meta: str
    mode: str
    more: str = ""  # flags that the guide's text asks for beside
    script: str = ""  # another that takes the same flags


WAN = "wan_fun/checkpoints/control"
RUNS = {
    "V1.1": Run("000_*", 0, f"{WAN}_v1.1", "metadata_control.json", "control_ref"),
    "V1.0": Run("000_*", 3, f"{WAN}_v1.0", "metadata_control.csv", "control_ref"),
    "chinese": Run("001_*", 0, f"{WAN}_v1.0", "metadata_control.json", "control_ref"),
    "camera": Run("000_*", 3, f"{WAN}_camera", "metadata_camera.json", "control_ref_camera", CAMERA),
    "EasyAnimate V5.1": Run("002_*", 0, "multi/EasyAnimateV5.1-Control", "metadata_control.json", "control_ref"),
    "EasyAnimate more": Run("002_*", 0, "multi/EasyAnimateV5.1-Control", "metadata_control.csv", "control_ref", MORE),
    "EasyAnimate V5": Run("002_*", 2, "multi/EasyAnimateV5-Control", "metadata_control.json", "control"),
    "HunyuanVideo": Run("003_*", 0, "multi/HunyuanVideo", "metadata.json", "normal"),
    "HunyuanVideo more": Run("003_*", 0, "multi/HunyuanVideo", "metadata.json", "normal", MORE),
    "HunyuanVideo, flags of FSDP's": Run("003_*", 2, "multi/HunyuanVideo", "metadata.json", "normal"),
    "HunyuanVideo-I2V": Run("003_*", 3, "multi/HunyuanVideo-I2V", "metadata.json", "i2v"),
    "CogVideoX-Fun 2b": Run("004_*", 0, "multi/CogVideoX-Fun-2b-InP", "metadata.json", "inpaint"),
    "CogVideoX-Fun 5b": Run("004_*", 0, "multi/CogVideoX-Fun-V1.1-5b-InP", "metadata.json", "inpaint"),
    "CogVideoX-Fun V1.5": Run("004_*", 0, "multi/CogVideoX-Fun-V1.5-5b-InP", "metadata.json", "inpaint"),
}
RUNS["CogVideoX-Fun moved"] = replace(RUNS["CogVideoX-Fun 2b"], script="cogvideox_fun/train.py")
pytestmark = pytest.mark.golden


@pytest.fixture
def command(goldens, media, seeds, tmp_path):
    """name -> the command with our paths and small sizes, and the checkpoint that it names."""

    def get(name: str) -> tuple[Command, Path]:
        run = RUNS[name]
        checkpoint = goldens / run.checkpoint
        if not checkpoint.is_dir():
            pytest.skip(f"no {checkpoint.name} at {checkpoint.parent}")
        (guide,) = seeds.glob(run.guide)
        printed = commands_in(guide)[run.place]
        assert not printed.deepspeed
        paths = [
            f"--pretrained_model_name_or_path={checkpoint}",
            f"--train_data_dir={media}",
            f"--train_data_meta={media / run.meta}",
            f"--output_dir={tmp_path / 'run'}",
        ]
        argv = [*printed.argv, *paths, *shlex.split(run.more), *shlex.split(SMALL)]
        return replace(printed, script=run.script or printed.script, argv=argv), checkpoint

    return get


@pytest.fixture
def start(monkeypatch, reports, measured_here):
    """Runs a command's script in this process, with the words and the environment that accelerate launch would give
    it; gives its exit code."""

    def run(command: Command, *more: str) -> int:
        monkeypatch.chdir(ROOT)
        words = [*command.launch[2:], f"scripts/{command.script}", *command.argv, *more]
        told, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        (python, *argv), environ = prepare_simple_launcher_cmd_env(told)
        assert python == sys.executable
        for name in environ.keys() - {"PYTHONPATH"}:
            monkeypatch.setenv(name, environ[name])
        monkeypatch.setattr(sys, "argv", argv)
        with reports(curves=False), pytest.raises(SystemExit) as done:
            runpy.run_path(argv[0], run_name="__main__")
        return done.value.code

    return run


def assert_trained(out: Path, checkpoint: Path, run: Run, media: Path):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in steps)
    assert json.loads((out / "checkpoint-2" / "progress.json").read_text())["step"] == 2
    trained = weights.read(out / "checkpoint-2" / "transformer")
    inside = checkpoint / "transformer"
    released = weights.read(inside if inside.is_dir() else checkpoint)
    assert {name: w.shape for name, w in trained.items()} == {name: w.shape for name, w in released.items()}
    assert any(not torch.equal(trained[name], released[name].float()) for name in released)
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["entries"] == len(json.loads((media / run.meta).with_suffix(".json").read_text()))
    assert sum(ledger[name] for name in ("used", "not_reached", "held_out", "left_out")) == ledger["entries"]
    files = {path.name for path in (out / "first_batch").iterdir()}
    assert {"0_pixels.mp4", "0_text.txt"} <= files
    assert "0_reference.png" in files or run.mode in ("normal", "control", "inpaint")
    assert ("0_control.mp4" in files) == (run.mode in ("control", "control_ref"))
    assert (out / "report.html").stat().st_size > 10_000
    assert json.loads((out / "run.json").read_text())["mode"] == run.mode


QUICK = ("V1.1",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_command(name, command, start, media, tmp_path):
    ours, checkpoint = command(name)
    assert start(ours) == 0
    assert_trained(tmp_path / "run", checkpoint, RUNS[name], media)


@pytest.mark.slow
def test_through_accelerate_launch(command, media, tmp_path):
    """The launcher is one for all scripts, and test_command gives each what it would. That `-m reeltune train` is begun
    too is seen in tests/unit/test_compat.py."""
    run = "V1.1"
    ours, checkpoint = command(run)
    launch = [Path(sys.executable).parent / "accelerate", *ours.launch[1:], f"scripts/{ours.script}", *ours.argv]
    code, printed = processes.end(processes.start(launch, cwd=ROOT))
    assert code == 0, printed
    assert_trained(tmp_path / "run", checkpoint, RUNS[run], media)


def test_an_unknown_flag_is_named_with_its_nearest(command, start, capsys):
    ours, _ = command("V1.1")
    assert start(ours, "--random_hw_adpt") == 2
    assert "random_hw_adpt" in (told := capsys.readouterr().err)
    assert "nearest is random_hw_adapt" in told


CONTRADICTIONS = {  # name of the run, flags -> what is said
    ("EasyAnimate V5.1", "--loss_type=ddpm"): r"loss_type is 'ddpm', but a checkpoint of \S+ was trained with flow",
    ("EasyAnimate V5", "--loss_type=flow"): r"loss_type is 'flow', but a checkpoint of \S+ was trained with ddpm",
    ("EasyAnimate V5.1", "--train_mode=control"): "it can do control_ref; set train_mode to control_ref",
    ("EasyAnimate V5", "--train_mode=control_ref"): "it can do control; set train_mode to control",
    ("EasyAnimate V5", "--config_path=config/easyanimate_video_v5.1_magvit_qwen.yaml"): (
        r"enable_multi_text_encoder is False, but \S+ is easyanimate/v5_control, where it is True"
    ),
    ("HunyuanVideo", "--train_mode=inpaint"): "it can do normal; set train_mode to normal",
    ("HunyuanVideo-I2V", "--train_mode=normal"): "it can do i2v; set train_mode to i2v",
    ("CogVideoX-Fun 2b", "--loss_type=flow"): r"loss_type is 'flow', but a checkpoint of \S+ was trained with ddpm",
    ("CogVideoX-Fun 2b", "--train_mode=normal"): "it can do inpaint; set train_mode to inpaint",
}


@pytest.mark.parametrize("name, flag", CONTRADICTIONS)
def test_what_contradicts_the_checkpoint_is_refused(name, flag, command, start, capsys):
    ours, _ = command(name)
    assert start(ours, flag) == 2
    assert re.search(CONTRADICTIONS[name, flag], capsys.readouterr().err)


OLDER = {
    "V4": ({"_class_name": "HunyuanTransformer3DModel"}, {"_class_name": "AutoencoderKLMagvit"}),
    "V3": ({"_class_name": "Transformer3DModel"}, {"slice_compression_vae": True}),
    "V2": ({"_class_name": "Transformer3DModel"}, {"slice_mag_vae": True}),
    "V1": ({"_class_name": "Transformer3DModel"}, {"_class_name": "AutoencoderKL"}),
}


@pytest.mark.parametrize("version", OLDER)
def test_older_easyanimate_is_refused_by_name(version, command, start, tmp_path, capsys):
    ours, _ = command("EasyAnimate V5")
    for name, said in zip(("transformer", "vae"), OLDER[version], strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(said))
    yaml = tmp_path / "v5.yaml"  # what the checkpoint says of itself counts before this
    yaml.write_text("vae_kwargs: {vae_type: AutoencoderKLMagvit, slice_compression_vae: false}\n")
    asked = {"pretrained_model_name_or_path": tmp_path, "config_path": yaml, "loss_type": "sigma"}
    assert start(ours, *(f"--{name}={value}" for name, value in asked.items())) == 2
    assert f"an EasyAnimate {version} checkpoint; supported are EasyAnimate V5.1 and V5" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
