"""What a number of a Recipe may be.  (no torch)"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

ANY = math.inf
MOST_SIDE = 100_000  # pixels
# Least and greatest. A slip beyond a greatest would take all of a machine's memory, or days, before anything is told.
RANGES: dict[str, tuple[float, float]] = {
    "held_out_share": (0, 0.5),
    "max_bad_share": (0, 1),
    "text_drop_ratio": (0, 1),
    "rank": (0, 16_384),
    "video_repeat": (0, 100_000),
    "dataloader_num_workers": (0, 1024),
    "video_sample_n_frames": (1, 10_000),
    "video_sample_stride": (1, 10_000),
    "video_sample_size": (16, MOST_SIDE),  # from one patch of 2 cells of 8 pixels
    "image_sample_size": (16, MOST_SIDE),
    "token_sample_size": (16, MOST_SIDE),
    "train_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 1_000_000),
    "num_train_epochs": (1, 1_000_000_000),
    "max_train_steps": (1, 1_000_000_000),
    "seed": (0, ANY),
    "vae_mini_batch": (0, ANY),
    "gradient_checkpointing_share": (0, 1),
    "blocks_to_swap": (0, ANY),
    "cache_variants": (0, 100_000),
    "motion_sub_loss_ratio": (0, 1),
    "logit_mean": (-10, 10),  # the sigmoid of 10 is 0.99995: all levels at one end
    "mode_scale": (-1, 1.75),  # keeps the order of what is drawn (https://arxiv.org/abs/2403.03206, section 3.1)
    "learning_rate": (0, ANY),
    "low_expert_learning_rate": (0, ANY),
    "lr_warmup_steps": (0, ANY),
    "lr_num_cycles": (1, ANY),
    "adam_weight_decay": (0, ANY),
    "initial_grad_norm_ratio": (1, ANY),
    "abnormal_norm_clip_start": (1, ANY),
    "checkpointing_steps": (1, ANY),
    "checkpoints_total_limit": (1, ANY),
    "logging_steps": (1, ANY),
    "validation_steps": (1, ANY),
    "preview_count": (0, 10_000),
    "preview_steps": (1, 1000),  # of the schedules that models were trained with
    "guidance_scale": (0, 1000),  # bf16 keeps one part in 256: times more, its rounding alone is what is seen
    "held_out_levels": (1, 1000),  # the same
    "context_parallel": (1, 16_384),
}
ABOVE_ZERO = {  # and at most
    "network_alpha": 1_000_000_000,
    "lora_plus_ratio": ANY,
    "rank_timeout_seconds": 30 * 24 * 3600,
    "video_sample_fps": 1000,
    "logit_std": 10,  # over which most levels lie at both ends
    "loss_outlier_threshold": ANY,
    "lr_power": ANY,
    "adam_epsilon": 1,  # gradients are less, and would move nothing
    "max_grad_norm": ANY,
    "low_expert_max_grad_norm": ANY,
}
DECAYS = ("adam_beta1", "adam_beta2", "ema_decay", "lora_dropout")


def range_of(name: str) -> str:
    """What a setting's number may be, in words; empty where it may be any."""
    if name in DECAYS:
        return "at least 0 and less than 1"
    if name in ABOVE_ZERO:
        most = ABOVE_ZERO[name]
        return "more than 0" if most == ANY else f"more than 0 and at most {most:,}"
    if name not in RANGES:
        return ""
    least, most = RANGES[name]
    return f"at least {least}" if most == ANY else f"between {least} and {most:,}"


def beyond(values: Mapping[str, Any]) -> Iterator[str]:
    """The settings whose number may not be what it is."""
    for name, value in values.items():
        if value is None:
            continue
        if name in RANGES:
            least, most = RANGES[name]
            inside = least <= value <= most
        elif name in ABOVE_ZERO:
            inside = 0 < value <= ABOVE_ZERO[name]
        else:
            inside = name not in DECAYS or 0 <= value < 1
        if not inside:
            yield name
