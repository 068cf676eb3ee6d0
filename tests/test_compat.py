"""The guides' command lines, verbatim -> Recipes."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reeltune import compat
from reeltune.cli import recipe_of
from reeltune.errors import UserError
from reeltune.recipe import Recipe
from reeltune.settings import flat, settings

ROOT = Path(__file__).parents[1]
SCRIPT = "scripts/wan2.1_fun/train_control.py"
CHECKPOINT = "models/Diffusion_Transformer/Wan2.1-Fun-V1.1-14B-Control"
V1_1 = f"""
accelerate launch --mixed_precision="bf16" {SCRIPT} --config_path="config/wan2.1/wan_civitai.yaml"
  --pretrained_model_name_or_path={CHECKPOINT} --train_data_dir=datasets/internal_datasets/
  --train_data_meta=datasets/internal_datasets/metadata.json --image_sample_size=1024 --video_sample_size=256
  --token_sample_size=512 --video_sample_stride=2 --video_sample_n_frames=81 --train_batch_size=1 --video_repeat=1
  --gradient_accumulation_steps=1 --dataloader_num_workers=8 --num_train_epochs=100 --checkpointing_steps=50
  --learning_rate=2e-05 --lr_scheduler="constant_with_warmup" --lr_warmup_steps=100 --seed=42
  --output_dir="output_dir" --gradient_checkpointing --mixed_precision="bf16" --adam_weight_decay=3e-2
  --adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05 --random_hw_adapt --training_with_video_token_length
  --enable_bucket --uniform_sampling --low_vram --train_mode="control_ref" --control_ref_image="random"
  --add_full_ref_image_in_self_attention --trainable_modules "."
"""
COMMON = {
    "config_path": "config/wan2.1/wan_civitai.yaml",
    "train_data_dir": "datasets/internal_datasets/",
    "train_data_meta": "datasets/internal_datasets/metadata.json",
    "image_sample_size": 1024,
    "video_sample_size": 256,
    "token_sample_size": 512,
    "video_sample_stride": 2,
    "video_sample_n_frames": 81,
    "train_batch_size": 1,
    "video_repeat": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 8,
    "num_train_epochs": 100,
    "checkpointing_steps": 50,
    "learning_rate": 2e-5,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 100,
    "seed": 42,
    "output_dir": "output_dir",
    "gradient_checkpointing": True,
    "mixed_precision": "bf16",
    "adam_weight_decay": 0.03,
    "adam_epsilon": 1e-10,
    "vae_mini_batch": 1,
    "max_grad_norm": 0.05,
    "random_hw_adapt": True,
    "training_with_video_token_length": True,
    "enable_bucket": True,
    "uniform_sampling": True,
    "low_vram": True,
    "train_mode": "control_ref",
    "trainable_modules": (".",),
}


def words_of(command: str, env: dict[str, str] | None = None) -> list[str]:
    """What the script is given, as a shell would split it."""
    text = re.sub(r"\$(\w+)", lambda match: (env or {})[match[1]], command.replace("\\\n", " "))
    words = shlex.split(text)
    return words[words.index(SCRIPT) + 1 :]


def commands_in(guide: str) -> list[list[str]]:
    """The arguments of every whole training command of a guide's shell blocks."""
    found = []
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", guide, re.DOTALL):
        env = dict(re.findall(r'^export (\w+)="?([^"\n#]*)"?', block, re.MULTILINE))
        commands = re.findall(r"^accelerate launch(?:.*\\\n)*.*", block, re.MULTILINE)
        found += [words_of(command, env) for command in commands if SCRIPT in command and "..." not in command]
    return found


def test_the_v1_1_command_field_by_field():
    values = flat(compat.control_recipe(words_of(V1_1)))
    said = COMMON | {
        "pretrained_model_name_or_path": CHECKPOINT,
        "control_ref_image": "random",
        "add_full_ref_image_in_self_attention": True,
    }
    assert {name: values[name] for name in said} == said
    assert {name: value for name, value in values.items() if name not in said}.items() <= flat(Recipe()).items()


def test_camera_mode_by_its_original_name(caplog):
    argv = [*words_of(V1_1), "--train_mode=control_camera_ref", "--add_full_ref_image_in_self_attention=false"]
    recipe = compat.control_recipe([*argv, "--control_ref_image=first_frame"])
    assert (recipe.model.train_mode, recipe.model.control_ref_image) == ("control_ref_camera", "first_frame")
    assert "train_mode control_camera_ref means control_ref_camera" in caplog.messages


@pytest.mark.golden
def test_every_command_of_the_guides(goldens, caplog):
    guides = goldens.parent / "seeds"
    if not guides.is_dir():
        pytest.skip(f"no guides at {guides}")
    counts = []
    for file in sorted(guides.glob("00[01]_*.txt")):
        commands = commands_in(file.read_text(encoding="utf-8"))
        counts.append(len(commands))
        for argv in commands:
            caplog.clear()
            values = flat(compat.control_recipe(argv))
            assert {name: values[name] for name in COMMON} == COMMON
            v1_1 = values["pretrained_model_name_or_path"] == CHECKPOINT
            assert v1_1 or values["pretrained_model_name_or_path"] == CHECKPOINT.replace("-V1.1", "")
            assert values["control_ref_image"] == ("random" if v1_1 else "first_frame")
            assert values["add_full_ref_image_in_self_attention"] == v1_1
            notices = "\n".join(caplog.messages)
            assert ("--use_deepspeed" in argv) == ("--use_deepspeed changes nothing here" in notices)
            assert ("--train_mode=control_object" in argv) == ("control_object means control_ref" in notices)
    assert counts == [6, 1]


def test_without_a_mode_the_script_trains_control_with_reference():
    argv = [word for word in words_of(V1_1) if not word.startswith("--train_mode")]
    assert compat.control_recipe(argv) == compat.control_recipe(words_of(V1_1))


def test_flags_without_effect_are_known_to_the_script_alone(caplog):
    argv = words_of(V1_1)
    with pytest.raises(UserError, match="use_deepspeed is no setting"):
        recipe_of([*argv, "--use_deepspeed"], "train")
    idle = [f"--{name}" for name in compat.ACCEPTED]
    assert compat.control_recipe([*argv, *idle]) == compat.control_recipe(argv)
    assert caplog.messages == [f"--{name} changes nothing here: {why}" for name, why in compat.ACCEPTED.items()]


def test_flags_that_ours_cannot_follow_say_what_to_do():
    asked = ["--scale_lr", "--train_sampling_steps=500", "--vae_path", "vae.pth", "stray"]
    with pytest.raises(UserError) as told:
        compat.control_recipe([*words_of(V1_1), *asked])
    stray, *lines = told.value.problems
    assert stray == "stray belongs to no flag; flags begin with --"
    assert [line.partition(";")[0] for line in lines] == [
        "scale_lr is true",
        "train_sampling_steps is 500",
        "vae_path is vae.pth",
    ]
    assert "vae_subpath in the yaml of config_path" in lines[2]


def test_every_flag_is_known_in_one_place():
    assert not compat.ACCEPTED.keys() & compat.REFUSED.keys()
    assert not settings().keys() & (compat.ACCEPTED.keys() | compat.REFUSED.keys())


def test_an_unknown_flag_names_the_nearest():
    with pytest.raises(UserError, match="video_sample_frames is no setting; the nearest is video_sample_n_frames"):
        compat.control_recipe([*words_of(V1_1), "--video_sample_frames=81"])


def test_the_script_hands_its_flags_over(monkeypatch):
    handed = []
    monkeypatch.setattr(compat, "train_control", lambda: handed.append(sys.argv[1:]) or 0)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *words_of(V1_1)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")
    assert ended.value.code == 0 and handed == [words_of(V1_1)]
    runpy.run_path(str(ROOT / SCRIPT), run_name="__mp_main__")  # as the processes that decode clips do
    assert len(handed) == 1


def test_the_config_paths_of_the_guides_exist_and_say_what_is_found_anyway():
    from reeltune import families
    from reeltune.families.wan_fun.layout import RELEASED, SUBPATHS

    paths = [ROOT / "config/wan2.1/wan_civitai.yaml", ROOT / "config/wan2.1_fun/wan_civitai.yaml"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    said = families._settings(paths[0])
    for part, (section, key) in SUBPATHS.items():
        assert os.path.normpath(said[section][key]) == os.path.normpath(RELEASED[part])


@pytest.mark.slow
def test_accelerate_launches_script_and_module(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--mixed_precision=bf16",
        "--num_processes=1",
        "--cpu",
    ]
    for target in ([str(ROOT / SCRIPT)], ["-m", "reeltune", "train"]):
        ran = subprocess.run([*launch, *target, "--lerning_rate=1"], capture_output=True, text=True, cwd=tmp_path)
        assert ran.returncode != 0
        assert "lerning_rate is no setting; the nearest is learning_rate" in ran.stderr
