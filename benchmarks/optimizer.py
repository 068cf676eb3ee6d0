"""What an optimizer's step costs, by how many operations it is cut into: ratios of one thread's processor time.

800 weights, as of a network of 30 blocks, small ones, so that what each operation costs beside its arithmetic is seen;
all ways take their steps in turn, in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import nn

from reeltune.core.rng import seed_of
from reeltune.optim.optimizers import StochasticRounding, build_optimizer
from reeltune.optim.rounding import lifted, round_by_chance

WEIGHTS, SHAPES = 800, ((64, 64), (64,), (96, 64), (64,))
ADAM = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01}
ROUNDS, WARM_UP = 15, 3


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    chance = torch.Generator().manual_seed(0)
    found = []
    for i in range(WEIGHTS):
        shape = SHAPES[i % len(SHAPES)]
        found.append(nn.Parameter(torch.randn(shape, generator=chance).to(dtype)))
        found[-1].grad = torch.randn(shape, generator=chance).to(dtype)
    return found


def one_by_one(parameters: Sequence[nn.Parameter], seeds: Sequence[int]) -> None:
    """Weight by weight what `in_one_piece` does at once: the same bits."""
    generator = torch.Generator()
    for parameter, seed in zip(parameters, seeds, strict=True):
        x = parameter.detach().float()
        noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, generator=generator.manual_seed(seed))
        parameter.data.copy_(((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32).bfloat16())


def in_one_piece(parameters: Sequence[nn.Parameter], seeds: Sequence[int]) -> None:
    piece_N, copies = lifted([parameter.detach() for parameter in parameters])
    round_by_chance(piece_N, copies, seeds)
    torch._foreach_copy_([parameter.data for parameter in parameters], copies)


def steps() -> dict[str, Callable[[], object]]:
    """name -> what is timed."""
    seeds = [seed_of(0, "rounding", 0, i) for i in range(WEIGHTS)]
    found: dict[str, Callable[[], object]] = {}
    for name, how in {"adamw": {}, "adamw_foreach": {"foreach": True}, "adamw_fused": {"fused": True}}.items():
        of_torch = torch.optim.AdamW(weights(torch.float32), lr=1e-3, weight_decay=0.01, **how)
        found[name] = of_torch.step
    groups = [{"params": weights(torch.bfloat16), "rate": 1.0}]
    found["bf16"] = StochasticRounding(groups, lambda given: build_optimizer(given, **ADAM), seed=0).step
    alone, together = weights(torch.bfloat16), weights(torch.bfloat16)
    found["rounding_one_by_one"] = lambda: one_by_one(alone, seeds)
    found["rounding"] = lambda: in_one_piece(together, seeds)
    for name, foreach in {"norm": None, "norm_foreach": True}.items():
        given = weights(torch.float32)
        found[name] = lambda given=given, foreach=foreach: torch.nn.utils.clip_grad_norm_(given, 1e9, foreach=foreach)
    return found


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {}
    for _, (name, step) in product(range(WARM_UP + ROUNDS), steps().items()):
        begin_s = time.process_time()
        step()
        taken.setdefault(name, []).append(time.process_time() - begin_s)
    step_s = {name: statistics.median(seconds[WARM_UP:]) for name, seconds in taken.items()}
    return {
        "optimizer_rounding_ratio": step_s["rounding"] / step_s["rounding_one_by_one"],
        "optimizer_foreach_ratio": step_s["adamw_foreach"] / step_s["adamw"],
        "optimizer_fused_ratio": step_s["adamw_fused"] / step_s["adamw"],
        "optimizer_norm_ratio": step_s["norm_foreach"] / step_s["norm"],
        "optimizer_bf16_ratio": step_s["bf16"] / step_s["adamw"],
    }
