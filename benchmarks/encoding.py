"""What the VAE takes for clips of one shape encoded together: one thread's processor time over that one by one.

torch computes a 3D convolution of one clip in fp32 without oneDNN where channels x frames x height are 20,480 or fewer
(ATen/native/Convolution.cpp, `use_mkldnn`), and that is slow. `small` are VAEs of the demo's widths below that; `large`
are of a quarter of the released widths with clips so high that all but the least convolutions are above it, as those of
released networks are. Weights are random.
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
from reeltune.families.wan_fun.vae import with_quick_layers

CLIPS = {"small": Shape(5, 64, 64), "large": Shape(5, 640, 16)}
TOGETHER = {"small": (2, 4), "large": (2,)}
ROUNDS, WARM_UP = 3, 1


def networks(size: str) -> dict[str, Any]:
    """Family -> its VAE."""
    torch.manual_seed(0)
    if size == "small":
        found: dict[str, Any] = {
            "wan_fun": checkpoint.vae(),
            "easyanimate": easyanimate.vae(),
            "hunyuan_video": hunyuan_video.vae(),
            "cogvideox_fun": cogvideox_fun.vae(),
        }
    else:
        down = ("SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3)
        blocks: dict[str, Any] = {
            "down_block_types": down,
            "up_block_types": tuple(name.replace("Down", "Up") for name in down),
        }
        cogvideox: dict[str, Any] = {"block_out_channels": (32, 64, 64, 128)}  # a quarter of its config.json's
        others: dict[str, Any] = {"block_out_channels": (32, 64, 128, 128)}
        found = {
            "wan_fun": AutoencoderKLWan(base_dim=24),
            "easyanimate": AutoencoderKLMagvit(latent_channels=16, **others, **blocks),
            "hunyuan_video": AutoencoderKLHunyuanVideo(**others),
            "cogvideox_fun": AutoencoderKLCogVideoX(**cogvideox),
        }
    found["wan_fun"] = with_quick_layers(found["wan_fun"])
    return {name: net.requires_grad_(False).eval() for name, net in found.items()}


@torch.no_grad()
def ratios(vae: Any, clips_BCFHW: Tensor, together: tuple[int, ...]) -> dict[int, float]:
    """How many together -> processor time of all clips over that one by one, taken in turn on a busy machine."""
    taken: dict[int, list[float]] = {}
    for _, count in product(range(WARM_UP + ROUNDS), (1, *together)):
        begin_s = time.process_time()
        for some in clips_BCFHW.split(count):
            vae.encode(some)
        taken.setdefault(count, []).append(time.process_time() - begin_s)
    taken_s = {count: statistics.median(seconds[WARM_UP:]) for count, seconds in taken.items()}
    return {count: taken_s[count] / taken_s[1] for count in together}


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    found = {}
    for size, shape in CLIPS.items():
        together = TOGETHER[size]
        clips = torch.rand(max(together), 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for family, vae in networks(size).items():
            taken = ratios(vae, clips, together)
            found |= {f"encoding_{family}_{size}_{count}": ratio for count, ratio in taken.items()}
            print(f"{family}, {size}: {taken}")
    return found
