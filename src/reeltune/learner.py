"""What learns: the network, its optimizer and its average, stepped, saved and loaded together."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from reeltune import checkpoint
from reeltune.blocks import blocks_of, offload_activations, recompute, swap
from reeltune.engine import Engine
from reeltune.errors import refuse
from reeltune.families.spec import Family, Parts
from reeltune.fused import StepInBackward
from reeltune.optim import (
    MovingAverage,
    StochasticRounding,
    build_optimizer,
    clip_ceiling,
    rate_curve,
    set_rate,
    soften_outliers,
)
from reeltune.recipe import Memory, Model, Optimization
from reeltune.trainable import released_names, select
from reeltune.types import Progress

ALONE = ("step_in_backward", "blocks_to_swap")  # what one process can do, and several together cannot


class Learner:
    """`net` is the network to call in training (it may be wrapped); `plain` the same without wrapping."""

    def __init__(
        self,
        family: Family,
        parts: Parts,
        engine: Engine,
        model: Model,
        optimization: Optimization,
        memory: Memory,
        *,
        seed: int,
        gradient_checkpointing: bool,
    ):
        self.family, self.parts, self.engine, self.optimization = family, parts, engine, optimization
        self.plain: nn.Module = parts.net
        names = released_names(self.plain, partial(family.to_released, config=parts.config))
        groups = select(self.plain, names, model.trainable_modules, model.trainable_modules_low_learning_rate)
        self.learning = [parameter for group in groups for parameter in group["params"]]
        self.average = MovingAverage(self.plain, optimization.ema_decay) if optimization.use_ema else None
        self._save_memory(memory, gradient_checkpointing)
        build = partial(
            build_optimizer,
            learning_rate=optimization.learning_rate,
            betas=(optimization.adam_beta1, optimization.adam_beta2),
            epsilon=optimization.adam_epsilon,
            weight_decay=optimization.adam_weight_decay,
            use_8bit_adam=optimization.use_8bit_adam,
            use_came=optimization.use_came,
            use_adafactor=optimization.use_adafactor,
        )
        rounding = model.trained_weights == "bf16_stochastic"
        optimizer = StochasticRounding(groups, build, seed) if rounding else build(groups)
        self.fused = None
        if memory.step_in_backward:
            self.net, self.optimizer = engine.prepare(self.plain, None)[0], optimizer
            self.fused = StepInBackward(optimizer, self.learning)
        else:
            self.net, self.optimizer = engine.prepare(self.plain, optimizer)
        self.net.train()

    def _save_memory(self, memory: Memory, gradient_checkpointing: bool) -> None:
        refuse(
            "recipe",
            [
                f"{name} is {getattr(memory, name)} and there are {self.engine.world} processes, which must have all "
                "gradients and weights on their devices at once; leave it out, or start one process"
                for name in ALONE
                if getattr(memory, name) and self.engine.world > 1
            ],
        )
        blocks = blocks_of(self.plain, self.family.blocks)
        swapped = swap(blocks, memory.blocks_to_swap, self.engine.device)
        if gradient_checkpointing:
            recompute([block for block in blocks if block not in swapped], memory.gradient_checkpointing_share)
        if memory.offload_activations:
            offload_activations(self.plain)

    @property
    def counts(self) -> dict[str, int]:
        """Parameters, and how many of them learn."""
        return {
            "parameters": sum(parameter.numel() for parameter in self.plain.parameters()),
            "trainable": sum(parameter.numel() for parameter in self.learning),
        }

    def rate_curve(self, total_steps: int) -> Callable[[int], float]:
        """Step -> learning rate."""
        optimization = self.optimization
        factor = rate_curve(
            optimization.lr_scheduler,
            warmup_steps=optimization.lr_warmup_steps,
            total_steps=total_steps,
            num_cycles=optimization.lr_num_cycles,
            power=optimization.lr_power,
            step_rules=optimization.lr_step_rules,
        )
        return lambda step: optimization.learning_rate * factor(step)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """last: of the micro-steps of a step."""
        if self.fused is None:
            self.engine.backward(loss, self.net, last=last)
        else:
            self.fused.backward(loss)

    def step(self, step: int, rate: float) -> Tensor:
        """Clips, steps and clears the gradients. Returns their norm before clipping, still on the device."""
        optimization = self.optimization
        start = optimization.abnormal_norm_clip_start
        most = math.inf if optimization.max_grad_norm is None else optimization.max_grad_norm
        ceiling = clip_ceiling(step, most, optimization.initial_grad_norm_ratio, start)
        soften = partial(soften_outliers, max_norm=ceiling) if start is not None and step > start else None
        set_rate(self.optimizer, rate)
        norm = self._step(ceiling, soften) if self.fused is None else self.fused.step(ceiling, soften)
        if self.average is not None:
            self.average.update()
        return norm

    def _step(self, ceiling: float, soften: Callable | None) -> Tensor:
        norm = self.engine.clip(self.learning, ceiling)
        if soften is not None:
            soften(self.learning, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def write_weights(self, folder: Path) -> None:
        """transformer/ and, if kept, transformer_ema/, both in the released form."""
        state = self.plain.state_dict()
        self.family.save(folder / "transformer", state, self.parts.config)
        if self.average is not None:
            self.family.save(folder / "transformer_ema", {**state, **self.average.weights}, self.parts.config)

    def state(self) -> dict:
        """All but the weights that an exact resume needs."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.engine.scaler_state(),
            "average": None if self.average is None else self.average.weights,
        }

    def load_state(self, found: Path) -> Progress:
        """Of a checkpoint whose weights are in the network already."""
        progress, state = checkpoint.load(found)
        self.optimizer.load_state_dict(state["optimizer"])
        self.engine.load_scaler_state(state["scaler"])
        if self.average is not None and state["average"] is not None:
            for name, weight in self.average.weights.items():
                weight.copy_(state["average"][name])
        return progress
