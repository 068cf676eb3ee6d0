"""The original tools' command lines -> a Recipe. Their flags are fields of ours; the few that are not stand here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reeltune.cli import REQUIRED, printed
from reeltune.config.flags import flags
from reeltune.config.parse import build
from reeltune.config.places import places_told
from reeltune.config.recipe import Recipe, TrainMode
from reeltune.core.guarded import guarded
from reeltune.core.options import Options, utf8_path
from reeltune.distributed.launcher_settings import adopted
from reeltune.export.command import exported, size

notices = logging.getLogger(__name__)


@dataclass(frozen=True)
class Script:
    """What one original script has of its own."""

    train_mode: TrainMode  # where its flags name none
    refused: Mapping[str, str] = field(default_factory=dict)  # flags that mean another thing there -> what to do
    trains_adapters: bool = False
    layers: Mapping[str, str] = field(default_factory=dict)  # names in its guide that no layer has -> those meant
    experts: bool = False  # it trains models of two networks, by boundary_type


FEED_FORWARD = {  # diffusers' FeedForward has its linear layers one level deeper
    f"{part}.{place}": f"{part}.net.{name}" for part in ("ff", "ff_context") for place, name in ((0, "0.proj"), (2, 2))
}
TOLD_GUIDANCE = {
    "guidance_scale": "there it is what the network is told in training; here that is 6; leave it out",
}
NORMAL = Script("normal")
SCRIPTS = {  # by their paths under scripts/
    "wan2.1_fun/train_control.py": Script("control_ref"),  # its own default, control, ends in a NameError
    "train_control.py": Script("control"),  # EasyAnimate
    "train.py": NORMAL,  # EasyAnimate, and CogVideoX-Fun before it moved
    "cogvideox_fun/train.py": NORMAL,
    "hunyuanvideo/train.py": Script("normal", TOLD_GUIDANCE),
    "wan2.1_fun/train_control_lora.py": Script("control_ref", trains_adapters=True),
    "wan2.1_fun/train_lora.py": Script("normal", trains_adapters=True),
    "wan2.1/train.py": NORMAL,
    "wan2.1/train_lora.py": Script("normal", trains_adapters=True),
    "wan2.2/train.py": Script("normal", experts=True),
    "wan2.2/train_lora.py": Script("normal", trains_adapters=True, experts=True),
    "wan2.2_fun/train.py": Script("inpaint", experts=True),  # its own default, normal, fits none of its models
    "wan2.2_fun/train_lora.py": Script("inpaint", trains_adapters=True, experts=True),
    "wan2.2_fun/train_control.py": Script("control_ref", experts=True),
    "wan2.2_fun/train_control_lora.py": Script("control_ref", trains_adapters=True, experts=True),
    "train_control_lora.py": Script("control", trains_adapters=True),  # EasyAnimate, which has train_lora.py alone
    "train_lora.py": Script("normal", trains_adapters=True),  # EasyAnimate
    "cogvideox_fun/train_lora.py": Script("normal", trains_adapters=True, layers=FEED_FORWARD),
    "hunyuanvideo/train_lora.py": Script("normal", TOLD_GUIDANCE, trains_adapters=True, layers=FEED_FORWARD),
}
LORA = {"rank": 128, "network_alpha": 64}  # where the flags of a script that trains adapters give none, as there
LAUNCHER = "accelerate launch decides how processes share the work"
NEVER_READ = "the original script takes it and never reads it"
FOLDER = "the checkpoint is a folder, taken as it is"
TWO_NETWORKS = ("high_noise_model", "low_noise_model", "transformer_2")  # folders of a model that has them
ACCEPTED = {  # flags that ask for nothing of a run that it does not do anyway -> what is said
    "add_inpaint_info": "networks that take a mask and a kept clip beside control are always given them",
    "use_deepspeed": LAUNCHER,
    "use_fsdp": LAUNCHER,
    "local_rank": "accelerate launch gives it to each process",
    "enable_xformers_memory_efficient_attention": "attention is torch's own, which needs no more memory",
    "enable_text_encoder_in_dataloader": "captions are encoded in the training process",
    "multi_stream": "frozen networks run on the stream that trains",
    "report_model_info": "metrics.jsonl has the gradient norm of every step",
    "logging_dir": "trackers write into output_dir",
    "cache_dir": NEVER_READ,
    "hub_model_id": NEVER_READ,
    "hub_token": NEVER_READ,
    "image_repeat_in_forward": NEVER_READ,
    "input_perturbation": NEVER_READ,
    "max_train_samples": NEVER_READ,
    "noise_offset": NEVER_READ,
    "non_ema_revision": NEVER_READ,
    "prediction_type": NEVER_READ,
    "push_to_hub": NEVER_READ,
    "random_flip": NEVER_READ,
    "revision": FOLDER,
    "save_state": "a checkpoint has all that a run needs to go on",
    "snr_loss": "only the sigma loss, of EasyAnimate V3 to V1, has it",
    "use_peft_lora": "adapters are always PEFT's",
    "variant": FOLDER,
}
REFUSED = {  # flags that would change a run in a way that ours has not -> what to do
    "auto_tile_batch_size": "a clip is not repeated within a step; leave it out, or set gradient_accumulation_steps",
    "image_embed_interleave": "the picture is read as the checkpoint was trained to; leave it out",
    "noise_share_in_frames": "every frame has noise of its own; leave it out",
    "noise_share_in_frames_ratio": "every frame has noise of its own; leave it out",
    "num_hidden_layers_to_skip": "captions are read as the checkpoint was trained to; leave it out",
    "scale_lr": "the rate is used as it is written; give learning_rate times processes, batch and accumulation",
    "tokenizer_max_length": "captions are cut at the length that the checkpoint was trained with; leave it out",
    "selective_ac": "set gradient_checkpointing and gradient_checkpointing_share, the share of blocks, in its place",
    "train_text_encoder": "text encoders do not learn here; leave it out",
    "train_sampling_steps": "the schedule is the checkpoint's; for Wan, give num_train_timesteps in config_path's yaml",
    "vae_path": "the VAE is the checkpoint's; put another in its place there; for Wan, name it in config_path's yaml",
    "validation_epochs": "previews are made by steps; give validation_steps",
}


def train(script: str, argv: Sequence[str] | None = None) -> int:
    """scripts/<script>, one of SCRIPTS. Returns the exit code."""

    def act() -> int:
        recipe = recipe_of(script, sys.argv[1:] if argv is None else argv)

        from reeltune.training.loop import train

        with places_told(recipe):
            return train(recipe)

    return guarded(act)


def zero_to_bf16(argv: Sequence[str] | None = None) -> int:
    """scripts/zero_to_bf16.py. Returns the exit code."""
    parser = Options("zero_to_bf16.py", "A checkpoint's weights in bf16, as safetensors.")
    parser.add_argument("checkpoint_dir", type=utf8_path, help="a checkpoint-N folder, whichever engine wrote it")
    parser.add_argument("output_dir", type=utf8_path, help="the folder to write")
    parser.add_argument("--max_shard_size", type=size, default="5GB", help="one file up to this, else shards [5GB]")
    parser.add_argument("--safe_serialization", action="store_true", help="always so; without it a notice says so")
    parser.add_argument("-d", "--debug", action="store_true", help="changes nothing")

    def act() -> int:
        options = parser.read(argv)
        if not options.safe_serialization:
            notices.warning("--safe_serialization was not given: weights are written as safetensors all the same")
        return printed(exported(options.checkpoint_dir, options.output_dir, max_shard_size=options.max_shard_size))

    return guarded(act)


def recipe_of(script: str, argv: Sequence[str]) -> Recipe:
    """The flags of one of SCRIPTS. Raises UserError with everything that is wrong with them."""
    original = SCRIPTS[script]
    refused = {**REFUSED, **original.refused}
    words, given, problems = flags(argv)
    problems += [f"{word} belongs to no flag; flags begin with --" for word in words]
    if original.trains_adapters:
        _take_layers(given, original.layers)
    if original.experts:
        problems += _take_boundary(given)
    for name in [name for name in given if name in ACCEPTED]:
        del given[name]
        notices.warning("--%s changes nothing here: %s", name, ACCEPTED[name])
    for name in [name for name in given if name in refused]:
        problems.append(f"{name} is {given.pop(name)}; {refused[name]}")
    tree = {"train_mode": original.train_mode, **(LORA if original.trains_adapters else {})}
    given = adopted({**tree, **given}) | given
    return build(tree, given, where="command line", required=REQUIRED["train"], before=problems)


def _take_boundary(given: dict[str, Any]) -> list[str]:
    """boundary_type as our `expert`; what is wrong with it."""
    asked = given.pop("boundary_type", None)
    folder = Path(str(given.get("pretrained_model_name_or_path", "")))
    has_two = any((folder / name).is_dir() for name in TWO_NETWORKS)
    if asked not in (None, "low", "high", "full"):
        return [f"boundary_type is {asked}; expected low, high or full"]
    if not has_two:
        if asked in ("low", "high"):
            notices.warning(
                "--boundary_type %s changes nothing here: the model has one network, which learns all noise levels; "
                "the original leaves some of them out, unless it is full",
                asked,
            )
        return []
    if (expert := given.get("expert")) is not None:
        both = f"expert is {expert} and boundary_type is {asked}, which are one setting; leave boundary_type out"
        return [] if asked in (None, expert) else [both]
    if asked == "full":
        return [
            "boundary_type is full, which trains low_noise_model at all noise levels, high ones too, where sampling "
            "never asks it; give low or high, or --expert both, which trains the two, each at its own levels"
        ]
    if asked is None:
        notices.warning("--boundary_type was not given: low, as in the original; high trains the other network")
    if "uniform_sampling" not in given:
        notices.warning(
            "--uniform_sampling was not given, without which the original ignores boundary_type and trains one network "
            "at the noise levels of both; here it learns at its own"
        )
    given["expert"] = asked or "low"
    return []


def _take_layers(given: dict[str, Any], layers: Mapping[str, str]) -> None:
    """Names of layers as their fields have them: lists, with those that were meant."""
    if "target_name" in given and "use_peft_lora" not in given:
        notices.warning("--use_peft_lora was not given: target_name has whole parts of layers' names all the same")
    for flag in ("target_name", "lora_skip_name"):
        if flag in given:
            given[flag] = [name.strip() for word in given[flag] for name in word.split(",") if name.strip()]
            for name in [name for name in given[flag] if name in layers]:
                notices.warning("%s %s means %s: no layer has the first name", flag, name, layers[name])
            given[flag] = [layers.get(name, name) for name in given[flag]]
