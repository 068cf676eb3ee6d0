"""Numbers far beyond the usual ones: possible, and more often a slip of the pen than meant.  (no torch)"""

from __future__ import annotations

import math
from collections.abc import Iterator

from reeltune.config.recipe import Adapter, Optimization, Recipe

MOST_GUIDANCE = 20  # scripts of Wan, VideoX-Fun and EasyAnimate sample with 3 to 6
MOST_RATE = 1e-2  # the original scripts train with 2e-5 and 1e-4; LoRA+ has 16 times that for half of the weights
MOST_DECAY = 1  # these have 5e-3 and 3e-2
MOST_EPSILON = 1e-3  # these have 1e-10; a gradient that is clipped to 1 as a whole has far less in each of a billion
MOST_SCALE = 64  # of adapters; 1 and 2 are usual


def unlikely_notices(recipe: Recipe) -> list[str]:
    guidance = recipe.validation.guidance_scale
    told = [*_of_optimizer(recipe.optimization, recipe.adapter.lora_plus_ratio), *_of_adapters(recipe.adapter)]
    if guidance > MOST_GUIDANCE:
        told.append(
            f"guidance_scale is {guidance:g}; the models' own tools have 3 to 6, and far over that clips burn out"
        )
    return [f"{line}; see whether it is meant" for line in told]


def _of_optimizer(optimization: Optimization, lora_plus_ratio: float) -> Iterator[str]:
    for name in ("learning_rate", "low_expert_learning_rate"):
        rate = getattr(optimization, name) or 0.0
        if rate * lora_plus_ratio > MOST_RATE and not optimization.use_prodigy:
            times = f", times lora_plus_ratio {lora_plus_ratio:g}" if lora_plus_ratio != 1 else ""
            yield f"{name} is {rate:g}{times}, by about which each step moves each weight; 1e-5 to 1e-4 is usual"
    decay, epsilon = optimization.adam_weight_decay, optimization.adam_epsilon
    if decay > MOST_DECAY:
        yield f"adam_weight_decay is {decay:g}, of which the original scripts have 0.005 to 0.03"
    if epsilon > MOST_EPSILON:
        yield f"adam_epsilon is {epsilon:g}, beside which gradients are small, and so are steps; 1e-10 to 1e-8 is usual"


def _of_adapters(adapter: Adapter) -> Iterator[str]:
    if adapter.rank and adapter.network_alpha is not None:
        scale = adapter.network_alpha / (math.sqrt(adapter.rank) if adapter.use_rslora else adapter.rank)
        if scale > MOST_SCALE:
            yield (
                f"network_alpha is {adapter.network_alpha:g} and rank is {adapter.rank}, which multiplies what "
                f"adapters change by {scale:,.0f}; network_alpha is mostly as large as rank, or twice that"
            )
