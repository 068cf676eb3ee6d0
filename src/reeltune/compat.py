"""The original tools' command lines -> a Recipe. Their flags are fields of ours; the few that are not stand here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from reeltune.cli import REQUIRED, flags, guarded
from reeltune.recipe import Recipe
from reeltune.settings import build

notices = logging.getLogger(__name__)

DEFAULTS = {"train_mode": "control_ref"}  # of the control scripts, where the flags name none
LAUNCHER = "accelerate launch decides how processes share the work"
NEVER_READ = "the original script takes it and never reads it"
ACCEPTED = {  # flags that ask for nothing of a run that it does not do anyway -> what is said
    "use_deepspeed": LAUNCHER,
    "use_fsdp": LAUNCHER,
    "local_rank": "accelerate launch gives it to each process",
    "enable_text_encoder_in_dataloader": "captions are encoded in the training process",
    "multi_stream": "frozen networks run on the stream that trains",
    "report_model_info": "metrics.jsonl has the gradient norm of every step",
    "logging_dir": "trackers write into output_dir",
    "cache_dir": NEVER_READ,
    "hub_model_id": NEVER_READ,
    "hub_token": NEVER_READ,
    "input_perturbation": NEVER_READ,
    "max_train_samples": NEVER_READ,
    "noise_offset": NEVER_READ,
    "non_ema_revision": NEVER_READ,
    "prediction_type": NEVER_READ,
    "push_to_hub": NEVER_READ,
    "random_flip": NEVER_READ,
    "revision": NEVER_READ,
    "snr_loss": NEVER_READ,
    "variant": NEVER_READ,
}
REFUSED = {  # flags that would change a run in a way that ours has not -> what to do
    "auto_tile_batch_size": "a clip is not repeated within a step; leave it out, or set gradient_accumulation_steps",
    "scale_lr": "the rate is used as it is written; give learning_rate times processes, batch and accumulation",
    "tokenizer_max_length": "captions are cut at the length that the checkpoint was trained with; leave it out",
    "train_sampling_steps": "the schedule is the checkpoint's; set num_train_timesteps in the yaml of config_path",
    "vae_path": "the VAE is the checkpoint's; name another file as vae_subpath in the yaml of config_path",
    "validation_epochs": "previews are made by steps; give validation_steps",
}


def train_control(argv: Sequence[str] | None = None) -> int:
    """scripts/wan2.1_fun/train_control.py"""

    def act() -> int:
        recipe = control_recipe(sys.argv[1:] if argv is None else argv)

        from reeltune.train import train

        return train(recipe)

    return guarded(act)


def control_recipe(argv: Sequence[str]) -> Recipe:
    """The flags of a control training script. Raises UserError with everything that is wrong with them."""
    words, given, problems = flags(argv)
    problems += [f"{word} belongs to no flag; flags begin with --" for word in words]
    for name in [name for name in given if name in ACCEPTED]:
        del given[name]
        notices.warning("--%s changes nothing here: %s", name, ACCEPTED[name])
    for name in [name for name in given if name in REFUSED]:
        problems.append(f"{name} is {given.pop(name)}; {REFUSED[name]}")
    return build(DEFAULTS, given, where="command line", required=REQUIRED["train"], found=problems)
