"""The command lines of the LoRA guides -> Recipes."""

import pytest

from reeltune import compat
from reeltune.config.idle import idle_notices
from reeltune.config.parse import flat
from reeltune.config.recipe import Recipe
from reeltune.config.unlikely import unlikely_notices
from reeltune.core.errors import UserError
from tests.unit.test_compat import Command, command_of

SHARED = """
  --train_data_dir=datasets/internal_datasets/ --train_data_meta=datasets/internal_datasets/metadata.json
  --train_batch_size=1 --video_repeat=1 --gradient_accumulation_steps=1 --dataloader_num_workers=8
  --num_train_epochs=100 --learning_rate=1e-04 --seed=42 --gradient_checkpointing --mixed_precision="bf16"
  --adam_epsilon=1e-10 --vae_mini_batch=1 --max_grad_norm=0.05 --random_hw_adapt --training_with_video_token_length
  --enable_bucket --low_vram
"""
SAID = {
    "train_data_dir": "datasets/internal_datasets/",
    "train_data_meta": "datasets/internal_datasets/metadata.json",
    "train_batch_size": 1,
    "video_repeat": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 8,
    "num_train_epochs": 100,
    "learning_rate": 1e-4,
    "seed": 42,
    "gradient_checkpointing": True,
    "mixed_precision": "bf16",
    "adam_epsilon": 1e-10,
    "vae_mini_batch": 1,
    "max_grad_norm": 0.05,
    "random_hw_adapt": True,
    "training_with_video_token_length": True,
    "enable_bucket": True,
    "low_vram": True,
}


def sizes(image: int, video: int, token: int, stride: int, frames: int) -> tuple[str, dict[str, int]]:
    said = {
        "image_sample_size": image,
        "video_sample_size": video,
        "token_sample_size": token,
        "video_sample_stride": stride,
        "video_sample_n_frames": frames,
    }
    return " ".join(f"--{name}={value}" for name, value in said.items()), said


def command(script: str, model: str, size: tuple[str, dict[str, int]], more: str) -> Command:
    """As the guide of that script prints it."""
    launch = f'accelerate launch --mixed_precision="bf16" scripts/{script}'
    path = f"--pretrained_model_name_or_path=models/Diffusion_Transformer/{model}"
    return command_of(f"{launch} {path} {SHARED} {size[0]} {more}".replace("\n", " "))


WAN = (
    '--config_path="config/wan2.1/wan_civitai.yaml" --checkpointing_steps=50 --adam_weight_decay=3e-2 '
    "--uniform_sampling --rank=64 --network_alpha=32 "
    '--target_name="q,k,v,ffn.0,ffn.2" --use_peft_lora '
)
WAN_SAID = {
    "config_path": "config/wan2.1/wan_civitai.yaml",
    "checkpointing_steps": 50,
    "adam_weight_decay": 0.03,
    "uniform_sampling": True,
    "rank": 64,
    "network_alpha": 32,
    "target_name": ("q", "k", "v", "ffn.0", "ffn.2"),
}
SIZES_640, SIZES_512, SIZES_1024 = (
    sizes(640, 640, 640, 2, 81),
    sizes(512, 512, 512, 3, 49),
    sizes(1024, 256, 512, 3, 49),
)
COMMANDS = {  # name -> (command, what it says beside SAID)
    "Wan control": (
        command(
            "wan2.1_fun/train_control_lora.py",
            "Wan2.1-Fun-V1.1-14B-Control",
            SIZES_640,
            f'{WAN} --output_dir="output_dir_wan2.1_fun_control_lora" --train_mode="control_ref" '
            '--control_ref_image="random" --add_full_ref_image_in_self_attention',
        ),
        WAN_SAID
        | SIZES_640[1]
        | {
            "pretrained_model_name_or_path": "models/Diffusion_Transformer/Wan2.1-Fun-V1.1-14B-Control",
            "output_dir": "output_dir_wan2.1_fun_control_lora",
            "train_mode": "control_ref",
            "control_ref_image": "random",
            "add_full_ref_image_in_self_attention": True,
        },
    ),
    "Wan": (
        command(
            "wan2.1_fun/train_lora.py",
            "Wan2.1-Fun-V1.1-14B-InP",
            SIZES_640,
            f'{WAN} --output_dir="output_dir_wan2.1_fun_lora" --train_mode="inpaint"',
        ),
        WAN_SAID
        | SIZES_640[1]
        | {
            "pretrained_model_name_or_path": "models/Diffusion_Transformer/Wan2.1-Fun-V1.1-14B-InP",
            "output_dir": "output_dir_wan2.1_fun_lora",
            "train_mode": "inpaint",
        },
    ),
    "CogVideoX-Fun": (
        command(
            "cogvideox_fun/train_lora.py",
            "CogVideoX-Fun-2b-InP",
            SIZES_512,
            '--output_dir="output_dir_cogvideox_fun_lora" --checkpointing_steps=50 --adam_weight_decay=3e-2 --rank=64 '
            '--network_alpha=32 --target_name="to_q,to_k,to_v,ff.0,ff.2" --use_peft_lora --train_mode="inpaint"',
        ),
        SIZES_512[1]
        | {
            "pretrained_model_name_or_path": "models/Diffusion_Transformer/CogVideoX-Fun-2b-InP",
            "output_dir": "output_dir_cogvideox_fun_lora",
            "checkpointing_steps": 50,
            "adam_weight_decay": 0.03,
            "rank": 64,
            "network_alpha": 32,
            "target_name": ("to_q", "to_k", "to_v", "ff.net.0.proj", "ff.net.2"),
            "train_mode": "inpaint",
        },
    ),
    "HunyuanVideo": (
        command(
            "hunyuanvideo/train_lora.py",
            "HunyuanVideo",
            SIZES_640,
            '--output_dir="output_dir_hunyuanvideo_lora" --checkpointing_steps=50 --adam_weight_decay=3e-2 '
            "--uniform_sampling --rank=64 --network_alpha=32 "
            '--target_name="to_q,to_k,to_v,ff.0,ff.2,ff_context.0,ff_context.2" --use_peft_lora --train_mode="normal"',
        ),
        SIZES_640[1]
        | {
            "pretrained_model_name_or_path": "models/Diffusion_Transformer/HunyuanVideo",
            "output_dir": "output_dir_hunyuanvideo_lora",
            "checkpointing_steps": 50,
            "adam_weight_decay": 0.03,
            "uniform_sampling": True,
            "rank": 64,
            "network_alpha": 32,
            "target_name": (
                "to_q to_k to_v ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2".split()  # noqa: SIM905
            ),
            "train_mode": "normal",
        },
    ),
    "EasyAnimate": (
        command(
            "train_lora.py",
            "EasyAnimateV5.1-12b-zh-InP",
            SIZES_1024,
            '--config_path "config/easyanimate_video_v5.1_magvit_qwen.yaml" --output_dir="output_dir" '
            '--checkpointing_steps=100 --adam_weight_decay=5e-3 --loss_type="flow" --uniform_sampling '
            '--train_mode="inpaint"',
        ),
        SIZES_1024[1]
        | {
            "pretrained_model_name_or_path": "models/Diffusion_Transformer/EasyAnimateV5.1-12b-zh-InP",
            "config_path": "config/easyanimate_video_v5.1_magvit_qwen.yaml",
            "output_dir": "output_dir",
            "checkpointing_steps": 100,
            "adam_weight_decay": 0.005,
            "loss_type": "flow",
            "uniform_sampling": True,
            "rank": 128,
            "network_alpha": 64,
            "train_mode": "inpaint",
        },
    ),
}
LORA_SCRIPTS = [name for name, script in compat.SCRIPTS.items() if script.trains_adapters]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_field_by_field(name):
    asked, said = COMMANDS[name]
    recipe = compat.recipe_of(asked.script, asked.argv)
    assert idle_notices(recipe) == unlikely_notices(recipe) == []
    told = flat(Recipe()) | SAID | said
    assert flat(recipe) == told | {"target_name": tuple(told["target_name"])}


def test_layers_that_the_original_misses_are_taken_with_a_notice(caplog):
    asked, _ = COMMANDS["CogVideoX-Fun"]
    compat.recipe_of(asked.script, asked.argv)
    assert caplog.messages == [
        "target_name ff.0 means ff.net.0.proj: no layer has the first name",
        "target_name ff.2 means ff.net.2: no layer has the first name",
        "--use_peft_lora changes nothing here: adapters are always PEFT's",
    ]


@pytest.mark.parametrize("script", LORA_SCRIPTS)
def test_rank_and_alpha_of_each_script_and_names_in_lists(script, caplog):
    argv = command_of(f"scripts/x.py --pretrained_model_name_or_path=m {SHARED}").argv
    alone = compat.recipe_of(script, argv).adapter
    assert (alone.rank, alone.network_alpha, alone.target_name) == (128, 64, ())
    assert caplog.messages == []
    more = ["--rank=4", "--network_alpha=2", "--target_name", "q, k,", "v", "--lora_skip_name=blocks.0,blocks.1"]
    asked = compat.recipe_of(script, [*argv, *more]).adapter
    assert (asked.rank, asked.network_alpha, asked.target_name) == (4, 2, ("q", "k", "v"))
    assert asked.lora_skip_name == ("blocks.0", "blocks.1")
    assert caplog.messages == [
        "--use_peft_lora was not given: target_name has whole parts of layers' names all the same"
    ]


def test_text_encoders_are_frozen():
    asked, _ = COMMANDS["Wan"]
    with pytest.raises(UserError, match="train_text_encoder is true; text encoders do not learn here; leave it out"):
        compat.recipe_of(asked.script, [*asked.argv, "--train_text_encoder"])
