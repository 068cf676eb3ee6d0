"""What learns: the network, its optimizer and its average, stepped, saved and loaded together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from reeltune import checkpoint
from reeltune.engine import Engine, recompute_blocks
from reeltune.families.spec import Family, Parts
from reeltune.optim import (
    MovingAverage,
    StochasticRounding,
    build_optimizer,
    clip_ceiling,
    rate_curve,
    set_rate,
    soften_outliers,
)
from reeltune.recipe import Model, Optimization
from reeltune.trainable import released_names, select
from reeltune.types import Progress


class Learner:
    """`net` is the network to call in training (it may be wrapped); `plain` the same without wrapping."""

    def __init__(
        self,
        family: Family,
        parts: Parts,
        engine: Engine,
        model: Model,
        optimization: Optimization,
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
        if gradient_checkpointing:
            recompute_blocks(self.plain, family.blocks)
        build = partial(
            build_optimizer,
            learning_rate=optimization.learning_rate,
            betas=(optimization.adam_beta1, optimization.adam_beta2),
            epsilon=optimization.adam_epsilon,
            weight_decay=optimization.adam_weight_decay,
            use_8bit_adam=optimization.use_8bit_adam,
            use_came=optimization.use_came,
        )
        rounding = model.trained_weights == "bf16_stochastic"
        optimizer = StochasticRounding(groups, build, seed) if rounding else build(groups)
        self.net, self.optimizer = engine.prepare(self.plain, optimizer)
        self.net.train()

    @property
    def counts(self) -> dict[str, int]:
        """Parameters, and how many of them learn."""
        return {
            "parameters": sum(parameter.numel() for parameter in self.plain.parameters()),
            "trainable": sum(parameter.numel() for parameter in self.learning),
        }

    def held_bytes(self) -> dict[str, int]:
        """part -> bytes of it that there are now."""
        gradients = [parameter.grad for parameter in self.learning if parameter.grad is not None]
        parts = {
            "weights": self.plain.state_dict(),
            "gradients": gradients,
            "optimizer state": self.optimizer.state_dict(),
            "the moving average": {} if self.average is None else self.average.weights,
        }
        return {
            part: sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
            for part, tree in parts.items()
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

    def step(self, step: int, rate: float) -> Tensor:
        """Clips, steps and clears the gradients. Returns their norm before clipping, still on the device."""
        optimization = self.optimization
        start = optimization.abnormal_norm_clip_start
        ceiling = clip_ceiling(step, optimization.max_grad_norm, optimization.initial_grad_norm_ratio, start)
        norm = self.engine.clip(self.learning, ceiling)
        if start is not None and step > start:
            soften_outliers(self.learning, norm, ceiling)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
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
