"""The learning rate of every step, and what a run makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from reeltune.config.recipe import Optimization
from reeltune.optim.optimizers import rate_curve

LOW = 0.5  # of learning_rate: a lower mean is worth a notice
LOOKED_AT = 10_000  # steps at most, spread evenly, of a long run


def rate_of(optimization: Optimization, total_steps: int) -> Callable[[int], float]:
    """Step -> learning rate."""
    factor = rate_curve(
        optimization.lr_scheduler,
        warmup_steps=optimization.lr_warmup_steps,
        total_steps=total_steps,
        num_cycles=optimization.lr_num_cycles,
        power=optimization.lr_power,
        step_rules=optimization.lr_step_rules,
    )
    return lambda step: optimization.learning_rate * factor(step)


@dataclass(frozen=True)
class Rates:
    """Learning rates over the steps of a run."""

    highest: float
    mean: float
    last: float

    @classmethod
    def of(cls, rate: Callable[[int], float], total_steps: int) -> Rates:
        steps = np.unique(np.linspace(0, total_steps - 1, min(total_steps, LOOKED_AT)).round().astype(int))
        rates = [rate(step) for step in steps.tolist()]
        return cls(max(rates), sum(rates) / len(rates), rates[-1])

    def __str__(self) -> str:
        return f"at most {self.highest:.3g}, {self.mean:.3g} in the mean, {self.last:.3g} at the last step"


def rate_notices(optimization: Optimization, total_steps: int) -> list[str]:
    """Says where the run learns at much less than its learning_rate, and what to change."""
    rates = Rates.of(rate_of(optimization, total_steps), total_steps)
    if optimization.learning_rate == 0 or rates.mean >= LOW * optimization.learning_rate:
        return []
    said, warm_up = f"lr_scheduler is {optimization.lr_scheduler}", optimization.lr_warmup_steps
    if warm_up:
        said += f" and lr_warmup_steps {warm_up}"
    remedy = "lower lr_warmup_steps" if warm_up >= total_steps else "raise learning_rate, if more is meant"
    return [
        f"the rate is {rates} of the run's {total_steps:,}; learning_rate is {optimization.learning_rate:g}, {said}; "
        f"{remedy}"
    ]
