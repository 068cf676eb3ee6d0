"""What a clip's encoding by the VAE costs when several clips of one shape are encoded together: one thread's processor
time over that of one by one.

VAEs of each family at the demo's widths and at a quarter of the released ones, with random weights. How many clips are
together changes with every round, so that a busy machine slows all alike.
"""

from __future__ import annotations

import statistics
import time
from itertools import product
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLMagvit, AutoencoderKLWan
from torch import Tensor

from reeltune.core.types import Shape
from reeltune.demo import checkpoint
from reeltune.demo.tiny import cogvideox_fun, easyanimate, hunyuan_video
from reeltune.families.wan_fun.vae import with_quick_norms

CLIP = Shape(9, 64, 96)
TOGETHER = (2, 4)
MOST = max(TOGETHER)
ROUNDS, WARM_UP = 5, 1


def networks() -> dict[tuple[str, str], Any]:
    """(family, width) -> its VAE. Released widths: config.json of each family's VAE."""
    torch.manual_seed(0)
    down = ("SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3)
    up = tuple(name.replace("Down", "Up") for name in down)
    cog, magvit, hunyuan = (32, 64, 64, 128), (32, 64, 128, 128), (32, 64, 128, 128)
    blocks: dict[str, Any] = {"down_block_types": down, "up_block_types": up}
    found: dict[tuple[str, str], Any] = {
        ("wan_fun", "demo"): with_quick_norms(checkpoint.vae()),
        ("easyanimate", "demo"): easyanimate.vae(),
        ("hunyuan_video", "demo"): hunyuan_video.vae(),
        ("cogvideox_fun", "demo"): cogvideox_fun.vae(),
        ("wan_fun", "quarter"): with_quick_norms(AutoencoderKLWan(base_dim=24)),
        ("easyanimate", "quarter"): AutoencoderKLMagvit(latent_channels=16, block_out_channels=magvit, **blocks),
        ("hunyuan_video", "quarter"): AutoencoderKLHunyuanVideo(block_out_channels=hunyuan),  # pyright: ignore
        ("cogvideox_fun", "quarter"): AutoencoderKLCogVideoX(block_out_channels=cog),  # pyright: ignore
    }
    return {name: net.requires_grad_(False).eval() for name, net in found.items()}


@torch.no_grad()
def ratios(vae: Any, clips_BCFHW: Tensor) -> dict[int, float]:
    """How many together -> processor time of all clips over that one by one."""
    taken: dict[int, list[float]] = {}
    for _, count in product(range(WARM_UP + ROUNDS), (1, *TOGETHER)):
        begin_s = time.process_time()
        for some in clips_BCFHW.split(count):
            vae.encode(some)
        taken.setdefault(count, []).append(time.process_time() - begin_s)
    taken_s = {count: statistics.median(seconds[WARM_UP:]) for count, seconds in taken.items()}
    return {count: taken_s[count] / taken_s[1] for count in TOGETHER}


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    clips = torch.rand(MOST, 3, *CLIP, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {
        f"encoding_{family}_{width}_{count}": ratio
        for (family, width), vae in networks().items()
        for count, ratio in ratios(vae, clips).items()
    }
