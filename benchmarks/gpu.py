"""Steps of networks of released width on a GPU: seconds, tokens, share of the GPU's arithmetic, memory.

Wan2.1-Fun-V1.1-1.3B-Control whole, and the 14B's width with few of its layers, both with random weights, on one clip of
81 x 480 x 832, encoded already; gradient checkpointing, bf16. By each of the attention kernels that torch has, with
what attention gave kept, and with the network's blocks compiled. Without a GPU there is nothing to measure.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils import swap_tensors
from torch.utils.flop_counter import FlopCounterMode

from reeltune.config.recipe import Model, Recipe, Training
from reeltune.core.errors import UserError
from reeltune.core.types import Encoded, Posterior, Shape
from reeltune.diffusion.loss import diffusion_loss, settle
from reeltune.distributed.engine import Engine, peak_flops
from reeltune.families.spec import Parts
from reeltune.families.wan_fun.family import CONTROL_V1_1 as FAMILY
from reeltune.families.wan_fun.net import WanFunTransformer
from reeltune.memory.blocks import blocks_of
from reeltune.training.learner import learner_of

CHANNELS, TEXT, TEXT_WIDTH, IMAGE, IMAGE_WIDTH = 16, 512, 4096, 257, 1280
ROUNDS, WARM_UP = 6, 3


@dataclass(frozen=True)
class Size:
    """Of a network: https://huggingface.co/alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control, config.json, and 14B's."""

    heads: int
    ffn: int
    layers: int
    head_width: int = 128


SIZES = {"1.3b": Size(12, 8960, 30), "14b_cut": Size(40, 13824, 8)}  # of 40 layers
RECOMPUTED = Training(gradient_checkpointing=True)
WAYS: dict[str, tuple[Training, bool]] = {  # of a recipe; blocks compiled
    "": (RECOMPUTED, False),
    "_compiled": (RECOMPUTED, True),
    "_attention_kept": (Training(gradient_checkpointing="attention_kept"), False),
    "_flash": (replace(RECOMPUTED, attention="flash"), False),
    "_cudnn": (replace(RECOMPUTED, attention="cudnn"), False),
    "_efficient": (replace(RECOMPUTED, attention="efficient"), False),
}
CLIP = Shape(81, 480, 832)


def network(size: Size, device: torch.device, dtype: torch.dtype) -> WanFunTransformer:
    with torch.device("meta"):
        net = outline(size)
    chance = torch.Generator(device).manual_seed(0)
    for weight in net.parameters():
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        values = torch.empty(weight.shape, dtype=dtype, device=device)
        swap_tensors(weight, nn.Parameter(values.normal_(0, 1 / math.sqrt(fan_in), generator=chance)))
    return net


def outline(size: Size) -> WanFunTransformer:
    width = size.heads * size.head_width
    return WanFunTransformer(
        in_channels=3 * CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        ffn_dim=size.ffn,
        num_layers=size.layers,
        text_dim=TEXT_WIDTH,
        image_dim=IMAGE_WIDTH,
        added_kv_proj_dim=width,
        ref_channels=CHANNELS,
    )


def encoded(clip: Shape, device: torch.device) -> Encoded:
    """What the VAE and the encoders could have made of a clip with a control clip and a reference picture."""
    chance = torch.Generator(device).manual_seed(1)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=chance, device=device)

    def latents(T: int) -> Posterior:
        _, h, w = FAMILY.geometry.latent(clip)
        return Posterior(values(CHANNELS, T, h, w), values(CHANNELS, T, h, w))

    T, _, _ = FAMILY.geometry.latent(clip)
    cond = {
        "text": values(TEXT, TEXT_WIDTH),
        "image": values(IMAGE, IMAGE_WIDTH),
        "control": latents(T),
        "ref": latents(1),
    }
    return Encoded(latents(T), cond, keep={})


class Step:
    """What a training step does once its batch is encoded."""

    def __init__(self, size: Size, clip: Shape, training: Training, *, compiled: bool):
        self.engine = Engine("bf16")
        parts = Parts(network(size, self.engine.device, torch.bfloat16), device=self.engine.device)
        if compiled:
            for block in blocks_of(parts.net, FAMILY.blocks):
                block.compile()
        recipe = Recipe(model=Model(trained_weights="bf16_stochastic"), training=training)
        self.learner = learner_of(recipe, FAMILY, parts, self.engine, batch=1, accumulate=1)
        self.encoded, self.seed = encoded(clip, self.engine.device), 0

    def __call__(self) -> None:
        self.seed += 1
        loss = diffusion_loss(
            FAMILY.denoise, self.learner.net, FAMILY.objective, self.encoded, {}, [self.seed], [(0, 1)]
        )
        self.learner.backward(loss.value, last=True)
        self.learner.step(self.seed, 1e-5)


def seconds_of(step: Step, device: torch.device) -> float:
    """Of one step, done to the end."""
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def measured(size: Size, clip: Shape, training: Training, *, compiled: bool) -> Iterator[tuple[str, float]]:
    """(unit, number), of which there are none if torch has not the kernel asked for."""
    step = Step(size, clip, training, compiled=compiled)
    device = step.engine.device
    try:
        step()
    except UserError as error:
        print(error)
        return
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = [seconds_of(step, device) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    step_s = statistics.median(taken)
    yield "step_s", step_s
    yield "tokens_s", FAMILY.geometry.tokens(clip) / step_s
    yield "peak_gb", step.engine.peak_memory_bytes() / 1e9
    peak = peak_flops(device, torch.bfloat16)
    if peak is not None and not compiled:  # whose kernels torch cannot count
        yield "mfu", flops(step) / step_s / peak


def flops(step: Step) -> int:
    """Of a step, attention included; what is recomputed is not counted, as `mfu` in a run's metrics."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x0, cond = settle(step.encoded, [0], {})
        FAMILY.denoise(step.learner.net, x0, torch.full((1,), 500.0, device=x0.device), cond)
    return 3 * counter.get_total_flops()


def main() -> dict[str, float]:
    if not torch.cuda.is_available():
        print("there is no GPU here, so nothing of this is measured")
        return {}
    found = {}
    for name, size in SIZES.items():
        for way, (training, compiled) in WAYS.items():
            for unit, value in measured(size, CLIP, training, compiled=compiled):
                found[f"gpu_{name}{way}_{unit}"] = value
                print(f"gpu_{name}{way}_{unit} {value:.4g}")
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main()
