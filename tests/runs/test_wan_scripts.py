"""The original scripts of Wan2.1 and Wan2.2, with their flags, on tiny checkpoints."""

import json

import pytest

from reeltune import compat
from reeltune.config.parse import build, read
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set

SMALL = (
    "--image_sample_size=64 --video_sample_size=32 --token_sample_size=48 --video_sample_n_frames=5 "
    "--video_sample_stride=1 --max_train_steps=2 --dataloader_num_workers=0 --report_to=none --preview_count=0 "
    "--mixed_precision=no --learning_rate=1e-3 --random_hw_adapt --training_with_video_token_length --enable_bucket"
)
CONTROL = (
    "--train_mode=control_ref --control_ref_image=random --add_full_ref_image_in_self_attention --add_inpaint_info"
)
CASES = {  # script, variant, its own flags, what the run's recipe then says
    "T2V": ("wan2.1/train.py", "t2v", "", {"train_mode": "normal"}),
    "I2V": ("wan2.1/train.py", "inp", "--train_mode=i2v", {"train_mode": "i2v"}),
    "T2V-A14B": (
        *("wan2.2/train.py", "2.2_a14b_t2v"),
        *("--boundary_type=high --uniform_sampling", {"expert": "high", "train_mode": "normal"}),
    ),
    "TI2V-5B": (
        *("wan2.2/train.py", "2.2_5b_ti2v"),
        *("--boundary_type=full --train_mode=ti2v", {"expert": None, "train_mode": "ti2v"}),
    ),
    "Fun-A14B-InP": ("wan2.2_fun/train.py", "2.2_a14b_inp", "", {"expert": "low", "train_mode": "inpaint"}),
    "Fun-5B-InP": (
        *("wan2.2_fun/train_lora.py", "2.2_5b_inp"),
        *("--train_mode=inpaint --rank=2 --network_alpha=1", {"rank": 2, "train_mode": "inpaint"}),
    ),
    "Fun-A14B-Control": ("wan2.2_fun/train_control.py", "2.2_a14b_control", CONTROL, {"expert": "low"}),
    "Fun-A14B-Camera": (
        *("wan2.2_fun/train_control.py", "2.2_a14b_control_camera"),
        *("--train_mode=control_camera_ref --boundary_type=high", {"train_mode": "control_ref_camera"}),
    ),
    "Fun-5B-Control": (
        *("wan2.2_fun/train_control_lora.py", "2.2_5b_control"),
        *(f"{CONTROL} --boundary_type=full --rank=2 --network_alpha=1", {"expert": None, "rank": 2}),
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"), clips=4, stills=0)


QUICK = ("T2V", "I2V")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_script_trains_its_models(case, data, tmp_path, measured_here):
    script, variant, flags, said = CASES[case]
    meta = "metadata_camera.json" if "camera" in flags else "metadata_control.json"
    model, out = tiny_checkpoint(tmp_path / "model", variant), tmp_path / "out"
    paths = [f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", f"--output_dir={out}"]
    argv = [*SMALL.split(), *flags.split(), *paths, f"--train_data_meta={data / meta}"]
    assert compat.train(script, argv) == 0
    made = build(read(out / "recipe.yaml"))
    values = {name: value for section in vars(made).values() for name, value in vars(section).items()}
    assert {name: values[name] for name in said} == said
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if row["kind"] == "step"] == [1, 2]
    assert json.loads((out / "run.json").read_text())["family"] == f"wan_fun/{variant}"
