"""The original tools' command lines -> a Recipe. Their flags are fields of ours; the few that are not stand here."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from reeltune.cli import guarded, recipe_of
from reeltune.recipe import Recipe

ACCEPTED = {  # flags that ask for nothing of a run that it does not do anyway -> what is said
    "use_deepspeed": "accelerate launch decides how processes share the work",
    "use_fsdp": "accelerate launch decides how processes share the work",
    "local_rank": "accelerate launch gives it to each process",
    "enable_text_encoder_in_dataloader": "captions are encoded in the training process",
    "report_model_info": "metrics.jsonl has the gradient norm of every step",
    "logging_dir": "trackers write into output_dir",
}


def train_control(argv: Sequence[str] | None = None) -> int:
    """scripts/wan2.1_fun/train_control.py; the checkpoint decides the train mode where the flags do not."""

    def act() -> int:
        recipe = control_recipe(sys.argv[1:] if argv is None else argv)

        from reeltune.train import train

        return train(recipe)

    return guarded(act)


def control_recipe(argv: Sequence[str]) -> Recipe:
    """The flags of a control training script. Raises UserError with everything that is wrong with them."""
    return recipe_of(argv, "train", ACCEPTED)
