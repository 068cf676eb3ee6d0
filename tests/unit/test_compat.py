"""The guides' command lines, verbatim -> Recipes."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from reeltune import compat
from reeltune.cli import recipe_of
from reeltune.config.idle import idle_notices
from reeltune.config.parse import flat, settings
from reeltune.config.recipe import Recipe
from reeltune.config.unlikely import unlikely_notices
from reeltune.core.errors import UserError

ROOT = Path(__file__).parents[2]
WAN = "wan2.1_fun/train_control.py"
CHECKPOINT = "models/Diffusion_Transformer/Wan2.1-Fun-V1.1-14B-Control"
V1_1 = f"""
accelerate launch --mixed_precision="bf16" scripts/{WAN} --config_path="config/wan2.1/wan_civitai.yaml"
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


EASYANIMATE = COMMON | {
    "config_path": "config/easyanimate_video_v5.1_magvit_qwen.yaml",
    "pretrained_model_name_or_path": "models/Diffusion_Transformer/EasyAnimateV5.1-12b-zh-Control",
    "video_sample_stride": 3,
    "video_sample_n_frames": 49,
    "checkpointing_steps": 100,
    "adam_weight_decay": 0.005,
    "low_vram": False,
    "loss_type": "flow",
    "control_ref_image": "first_frame",
}
EASYANIMATE_V5 = EASYANIMATE | {
    "config_path": "config/easyanimate_video_v5_magvit_multi_text_encoder.yaml",
    "pretrained_model_name_or_path": "models/Diffusion_Transformer/EasyAnimateV5-12b-zh-Control",
    "loss_type": "ddpm",
    "train_mode": "control",
}
HUNYUAN = COMMON | {
    "config_path": None,
    "pretrained_model_name_or_path": "models/Diffusion_Transformer/HunyuanVideo",
    "image_sample_size": 640,
    "video_sample_size": 640,
    "token_sample_size": 640,
    "output_dir": "output_dir2",
    "train_mode": "normal",
}
HUNYUAN_I2V = HUNYUAN | {
    "pretrained_model_name_or_path": "models/Diffusion_Transformer/HunyuanVideo-I2V",
    "train_mode": "i2v",
}
COGVIDEOX = COMMON | {
    "config_path": None,
    "pretrained_model_name_or_path": "models/Diffusion_Transformer/CogVideoX-Fun-2b-InP",
    "video_sample_stride": 3,
    "video_sample_n_frames": 49,
    "train_batch_size": 4,
    "random_frame_crop": True,
    "use_came": True,
    "uniform_sampling": False,
    "low_vram": False,
    "train_mode": "inpaint",
    "resume_from_checkpoint": "latest",
}
OTHERS = {  # guide -> (script, what each of its commands says)
    "002_*": ("train_control.py", [EASYANIMATE, EASYANIMATE, EASYANIMATE_V5, EASYANIMATE_V5]),
    "003_*": ("hunyuanvideo/train.py", [HUNYUAN, HUNYUAN, HUNYUAN, HUNYUAN_I2V]),
    "004_*": ("train.py", [COGVIDEOX, COGVIDEOX]),
}


@dataclass(frozen=True)
class Command:
    launch: list[str]  # the words before the script
    script: str  # under scripts/
    argv: list[str]

    @property
    def deepspeed(self) -> bool:
        return "--use_deepspeed" in self.launch


def command_of(text: str, env: dict[str, str] | None = None) -> Command:
    """As a shell would split it."""
    words = shlex.split(re.sub(r"\$(\w+)", lambda match: (env or {})[match[1]], text.replace("\\\n", " ")))
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return Command(words[:place], words[place].removeprefix("scripts/"), words[place + 1 :])


def commands_in(guide: Path) -> list[Command]:
    """Every whole training command of a guide's shell blocks."""
    found = []
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL):
        env = dict(re.findall(r'^export (\w+)="?([^"\n#]*)"?', block, re.MULTILINE))
        texts = re.findall(r"^accelerate launch(?:.*\\\n)*.*", block, re.MULTILINE)
        found += [command_of(text, env) for text in texts if "..." not in text and "xxx.py" not in text]
    return found


WORDS = command_of(V1_1).argv


def test_the_v1_1_command_field_by_field():
    values = flat(compat.recipe_of(WAN, WORDS))
    said = COMMON | {
        "pretrained_model_name_or_path": CHECKPOINT,
        "control_ref_image": "random",
        "add_full_ref_image_in_self_attention": True,
    }
    assert {name: values[name] for name in said} == said
    assert {name: value for name, value in values.items() if name not in said}.items() <= flat(Recipe()).items()


def test_camera_mode_by_its_original_name(caplog):
    argv = [*WORDS, "--train_mode=control_camera_ref", "--add_full_ref_image_in_self_attention=false"]
    recipe = compat.recipe_of(WAN, [*argv, "--control_ref_image=first_frame"])
    assert (recipe.model.train_mode, recipe.model.control_ref_image) == ("control_ref_camera", "first_frame")
    assert "train_mode control_camera_ref means control_ref_camera" in caplog.messages


@pytest.mark.golden
def test_every_command_of_the_wan_guides(seeds, caplog):
    counts = []
    for file in sorted(seeds.glob("00[01]_*.txt")):
        commands = commands_in(file)
        counts.append(len(commands))
        for command in commands:
            caplog.clear()
            recipe = compat.recipe_of(command.script, command.argv)
            assert idle_notices(recipe) == unlikely_notices(recipe) == []
            values = flat(recipe)
            assert {name: values[name] for name in COMMON} == COMMON
            v1_1 = values["pretrained_model_name_or_path"] == CHECKPOINT
            assert v1_1 or values["pretrained_model_name_or_path"] == CHECKPOINT.replace("-V1.1", "")
            assert values["control_ref_image"] == ("random" if v1_1 else "first_frame")
            assert values["add_full_ref_image_in_self_attention"] == v1_1
            notices = "\n".join(caplog.messages)
            assert ("--use_deepspeed" in command.argv) == ("--use_deepspeed changes nothing here" in notices)
            assert ("--train_mode=control_object" in command.argv) == ("control_object means control_ref" in notices)
    assert counts == [6, 1]


@pytest.mark.golden
@pytest.mark.parametrize("guide", OTHERS)
def test_every_command_of_the_other_guides_field_by_field(guide, seeds):
    script, said = OTHERS[guide]
    (file,) = seeds.glob(guide)
    commands = commands_in(file)
    assert [command.script for command in commands] == [script] * len(said)
    for command, expected in zip(commands, said, strict=True):
        recipe = compat.recipe_of(script, command.argv)
        assert flat(recipe) == flat(Recipe()) | expected
        assert idle_notices(recipe) == unlikely_notices(recipe) == []


@pytest.mark.parametrize("script", compat.SCRIPTS)
def test_without_a_mode_each_script_has_its_own(script):
    argv = [word for word in WORDS if not word.startswith(("--train_mode", "--add_full"))]
    own = {"wan2.1_fun/train_control": "control_ref", "train_control": "control"}
    own |= {"wan2.2_fun/train_control": "control_ref", "wan2.2_fun/train": "inpaint"}
    mode = own.get(script.removesuffix(".py").removesuffix("_lora"), "normal")
    assert compat.recipe_of(script, argv) == compat.recipe_of(script, [*argv, f"--train_mode={mode}"])


def test_guidance_scale_is_of_previews_but_for_hunyuan_video():
    with pytest.raises(UserError, match="guidance_scale is 4; there it is what the network is told in training"):
        compat.recipe_of("hunyuanvideo/train.py", [*WORDS, "--guidance_scale=4"])
    assert compat.recipe_of(WAN, [*WORDS, "--guidance_scale=4"]).validation.guidance_scale == 4


def test_flags_without_effect_are_known_to_the_script_alone(caplog):
    with pytest.raises(UserError, match="use_deepspeed is no setting"):
        recipe_of([*WORDS, "--use_deepspeed"], "train")
    idle = [f"--{name}" for name in compat.ACCEPTED]
    assert compat.recipe_of(WAN, [*WORDS, *idle]) == compat.recipe_of(WAN, WORDS)
    assert caplog.messages == [f"--{name} changes nothing here: {why}" for name, why in compat.ACCEPTED.items()]


def test_flags_that_ours_cannot_follow_say_what_to_do():
    asked = ["--scale_lr", "--train_sampling_steps=500", "--vae_path", "vae.pth", "stray"]
    with pytest.raises(UserError) as told:
        compat.recipe_of(WAN, [*WORDS, *asked])
    stray, *lines = told.value.problems
    assert stray == "stray belongs to no flag; flags begin with --"
    assert [line.partition(";")[0] for line in lines] == [
        "scale_lr is true",
        "train_sampling_steps is 500",
        "vae_path is vae.pth",
    ]
    assert lines[2].endswith("name it in config_path's yaml")


def test_every_flag_is_known_in_one_place():
    assert not compat.ACCEPTED.keys() & compat.REFUSED.keys()
    assert not settings().keys() & (compat.ACCEPTED.keys() | compat.REFUSED.keys())


def test_an_unknown_flag_names_the_nearest():
    with pytest.raises(UserError, match="video_sample_frames is no setting; the nearest is video_sample_n_frames"):
        compat.recipe_of(WAN, [*WORDS, "--video_sample_frames=81"])


@pytest.mark.parametrize("script", compat.SCRIPTS)
def test_a_script_hands_its_name_and_flags_over(script, monkeypatch):
    handed = []
    monkeypatch.setattr(compat, "train", lambda name: handed.append((name, sys.argv[1:])) or 0)
    monkeypatch.setattr(sys, "argv", [script, *WORDS])
    path = str(ROOT / "scripts" / script)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 0 and handed == [(script, WORDS)]
    runpy.run_path(path, run_name="__mp_main__")  # as the processes that decode clips do
    assert len(handed) == 1


def test_the_wan_yamls_exist_and_say_what_is_found_anyway():
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
    for target in ([str(ROOT / "scripts" / WAN)], ["-m", "reeltune", "train"]):
        ran = subprocess.run([*launch, *target, "--lerning_rate=1"], capture_output=True, text=True, cwd=tmp_path)
        assert ran.returncode != 0
        assert "lerning_rate is no setting; the nearest is learning_rate" in ran.stderr


# ---- models of two networks

NEXT = "wan2.2_fun/train_control.py"


def with_model(folder: Path, *more: str) -> list[str]:
    kept = [word for word in WORDS if not word.startswith("--pretrained_model_name_or_path")]
    return [*kept, f"--pretrained_model_name_or_path={folder}", "--add_inpaint_info", *more]


@pytest.mark.parametrize(("asked", "expert"), [("high", "high"), ("low", "low"), (None, "low")])
def test_boundary_type_is_the_expert(asked, expert, tmp_path, caplog):
    (tmp_path / "low_noise_model").mkdir()
    recipe = compat.recipe_of(NEXT, with_model(tmp_path, *([f"--boundary_type={asked}"] if asked else [])))
    assert recipe.model.expert == expert
    assert ("--boundary_type was not given: low" in caplog.text) == (asked is None)
    assert "--add_inpaint_info changes nothing here" in caplog.text
    assert "--uniform_sampling was not given" not in caplog.text


def test_both_networks_learn_by_our_own_word(tmp_path, caplog):
    (tmp_path / "low_noise_model").mkdir()
    assert compat.recipe_of(NEXT, with_model(tmp_path, "--expert=both")).model.expert == "both"
    assert "boundary_type was not given" not in caplog.text
    with pytest.raises(UserError, match="expert is both and boundary_type is low"):
        compat.recipe_of(NEXT, with_model(tmp_path, "--expert=both", "--boundary_type=low"))
    with pytest.raises(UserError, match="boundary_type is full, which are one setting; leave boundary_type out"):
        compat.recipe_of(NEXT, with_model(tmp_path, "--expert=both", "--boundary_type=full"))


def test_what_the_original_does_in_silence_is_said(tmp_path, caplog):
    (tmp_path / "high_noise_model").mkdir()
    without = [word for word in with_model(tmp_path, "--boundary_type=high") if word != "--uniform_sampling"]
    assert compat.recipe_of(NEXT, without).model.expert == "high"
    assert "without which the original ignores boundary_type" in caplog.text


def test_boundary_type_of_one_network_and_of_all_levels(tmp_path, caplog):
    assert compat.recipe_of(NEXT, with_model(tmp_path, "--boundary_type=full")).model.expert is None
    assert not [line for line in caplog.messages if "boundary_type" in line]
    assert compat.recipe_of(NEXT, with_model(tmp_path, "--boundary_type=low")).model.expert is None
    assert "the original leaves some of them out" in caplog.text
    (tmp_path / "low_noise_model").mkdir()
    for value, words in (
        ("full", "trains low_noise_model at all noise levels"),
        ("none", "expected low, high or full"),
    ):
        with pytest.raises(UserError, match=words):
            compat.recipe_of(NEXT, with_model(tmp_path, f"--boundary_type={value}"))
    with pytest.raises(UserError, match="boundary_type"):
        compat.recipe_of(WAN, [*WORDS, "--boundary_type=low"])
