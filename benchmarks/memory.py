"""What ways of saving memory save and cost: bytes by torch's own record of its allocations, seconds as ratios.

Bytes per trained parameter are those of the fullest moment of a second step, of a network whose activations are small
and whose largest weight is a 64th of it, as in networks of billions. Savings and prices of the other ways are of a
small Wan2.1-Fun-Control network, every way and the plain step in turn; a step's seconds are of one thread's processor
time.
"""

from __future__ import annotations

import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from reeltune import families
from reeltune.config.recipe import Memory, Model, Optimization, Recipe, Training
from reeltune.distributed.engine import Engine
from reeltune.memory import blocks
from reeltune.optim.optimizers import StochasticRounding, build_optimizer
from reeltune.optim.step_in_backward import StepInBackward
from reeltune.training import trained_network
from reeltune.training.learner import learner_of
from tests.families.tiny_wan import tiny_checkpoint

WEIGHTS = ("fp32", "bf16_stochastic")
OPTIMIZERS = {
    "adamw": {},
    "8bit": {"use_8bit_adam": True},
    "came": {"use_came": True},
    "adafactor": {"use_adafactor": True},
}
WIDTH, DEPTH = 192, 64
ADAM = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01}
ROUNDS, WARM_UP = 7, 2


def peak_bytes(work: Callable[[], object]) -> int:
    """Most that is allocated at a time, beyond what was there before `work`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    del kept
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now = 0
    event: Any  # its type leaves out what it can tell
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# ---- bytes per trained parameter


def bytes_per_parameter(weights: str, optimizer: str, in_backward: bool) -> float:
    """Weights, gradients, state and what a step needs for a moment, of the second step."""

    def work() -> list:
        torch.manual_seed(0)
        dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(DEPTH)))
        parameters = list(net.parameters())

        def build(groups: list[dict]) -> torch.optim.Optimizer:
            return build_optimizer(groups, **ADAM, **OPTIMIZERS[optimizer])

        groups = [{"params": parameters, "rate": 1.0}]
        rounding = weights == "bf16_stochastic"
        stepper = StochasticRounding(groups, build, seed=0) if rounding else build(groups)
        fused = StepInBackward(stepper, parameters) if in_backward else None
        given = torch.ones(1, WIDTH, dtype=dtype)
        for _ in range(2):
            loss = net(given).float().square().mean()
            if fused is not None:
                fused.backward(loss)
                fused.step(math.inf)
            else:
                loss.backward()
                stepper.step()
                stepper.zero_grad()
        return [net, stepper]

    # What is lifted to fp32 at a time is a small part here too.
    with mock.patch.object(StochasticRounding, "CHUNK", WIDTH**2):
        return peak_bytes(work) / (DEPTH * WIDTH**2)


# ---- the other ways


@dataclass
class Way:
    checkpointing: bool | Literal["attention_kept", "products_kept"] = False
    memory: Memory = field(default_factory=Memory)
    max_grad_norm: float | None = None
    still: bool = False  # the blocks do not learn
    compiled: bool = False
    beside: str = "plain"  # the way that it is compared with


CLIPPED = 1.0
FIRST = ("patch_embedding",)  # so that gradients pass all blocks
WAYS = {
    "plain": Way(),
    "recompute_half": Way(True, Memory(gradient_checkpointing_share=0.5)),
    "recompute_all": Way(True),
    "recompute_but_attention": Way("attention_kept"),
    "recompute_but_products": Way("products_kept"),
    "compiled": Way(compiled=True),
    "recompute_all_compiled": Way(True, compiled=True, beside="recompute_all"),
    "recompute_but_products_compiled": Way("products_kept", compiled=True, beside="compiled"),
    "offload": Way(memory=Memory(offload_activations=True)),
    "recompute_and_offload": Way(True, Memory(offload_activations=True)),
    "in_backward": Way(memory=Memory(step_in_backward=True)),
    "clipped": Way(max_grad_norm=CLIPPED),
    "in_backward_clipped": Way(memory=Memory(step_in_backward=True), max_grad_norm=CLIPPED, beside="clipped"),
    "still": Way(still=True),
    "swap": Way(still=True, memory=Memory(blocks_to_swap=6), beside="still"),
}


class Step:
    """One way, ready to step."""

    def __init__(self, checkpoint: Path, way: Way):
        self.family = families.find(checkpoint)
        parts = self.family.load(checkpoint, encoders=False)
        recipe = Recipe(
            model=Model(trainable_modules=FIRST) if way.still else Model(),
            training=Training(gradient_checkpointing=way.checkpointing, compile="blocks" if way.compiled else "none"),
            memory=way.memory,
            optimization=Optimization(max_grad_norm=way.max_grad_norm),
        )
        self.sent: list[int] = []  # bytes that on a GPU would not be on the device
        offload = partial(blocks.offload_activations, to_host=self._to_host)
        with mock.patch.object(trained_network, "offload_activations", offload):
            self.learner = learner_of(recipe, self.family, parts, Engine("no"), batch=1, accumulate=1)
        if self.learner.network.compiled is not None:
            self.learner.network.compiled.begin(1, "benchmark")
        chance = torch.Generator().manual_seed(0)
        self.x = torch.randn(1, 16, 3, 28, 28, generator=chance)
        self.cond = {
            "text": torch.randn(1, 512, 24, generator=chance),
            "control": self.x,
            "ref": self.x[:, :, :1],
            "image": torch.randn(1, 257, 32, generator=chance),
        }

    def _to_host(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.nbytes)
        return blocks.to_host(tensor)

    def __call__(self) -> None:
        answer = self.family.denoise(self.learner.net, self.x, torch.full((1,), 500.0), self.cond)
        self.learner.backward((answer - self.x).square().mean(), last=True)
        self.learner.step(0, 1e-6)


def price_and_saving(checkpoint: Path) -> dict[str, float]:
    steps = {name: Step(checkpoint, way) for name, way in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
    found = {}
    peaks = {}
    for name, step in steps.items():
        gc.collect()
        step.sent.clear()
        peaks[name] = peak_bytes(step) - sum(step.sent)
    for name, way in WAYS.items():
        if name in ("plain", "clipped", "still"):
            continue
        pairs = zip(seconds[name][WARM_UP:], seconds[way.beside][WARM_UP:], strict=True)
        found[f"memory_seconds_{name}"] = statistics.median(ours / plain for ours, plain in pairs)
        if way.checkpointing or way.memory.offload_activations:
            found[f"memory_bytes_{name}"] = peaks[name] / peaks[way.beside]
    return found


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    found = {
        f"memory_{weights}_{optimizer}{'_in_backward' if in_backward else ''}": bytes_per_parameter(
            weights, optimizer, in_backward
        )
        for weights in WEIGHTS
        for optimizer in OPTIMIZERS
        for in_backward in (False, True)
    }
    with tempfile.TemporaryDirectory() as name, mock.patch.object(blocks, "LEAST_BYTES", 2**14):
        checkpoint = tiny_checkpoint(Path(name), "control_v1.1", width=256, heads=4, layers=6)
        found |= price_and_saving(checkpoint)
    for what, value in found.items():
        print(f"{what} {value:.3g}")
    return found


if __name__ == "__main__":
    main()
