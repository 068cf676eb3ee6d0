"""Optimizers, the learning rate's course, weights kept in bf16, and their moving average."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from reeltune.dice import seed_of
from reeltune.errors import UserError


def build_optimizer(
    groups: list[dict],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    use_8bit_adam: bool = False,
    use_came: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (fused where there is a GPU), 8-bit AdamW (bitsandbytes) or CAME (pytorch_optimizer).

    A group's "rate" multiplies the learning rate. Raises UserError for a missing package.
    """
    groups = [{**group, "lr": learning_rate * group["rate"]} for group in groups]
    if use_came:
        from pytorch_optimizer import CAME

        # CAME has a third decay and two epsilons: https://arxiv.org/abs/2307.02047, section 4.1.
        return CAME(groups, lr=learning_rate, betas=(*betas, 0.9999), weight_decay=weight_decay, eps1=1e-30, eps2=1e-16)
    if use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as missing:
            raise UserError(
                "recipe", "use_8bit_adam needs bitsandbytes; pip install 'reeltune[eight-bit]'"
            ) from missing
        return AdamW8bit(groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay)
    fused = groups[0]["params"][0].device.type == "cuda"
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=fused or None
    )


def rate_curve(
    name: str, *, warmup_steps: int, total_steps: int, num_cycles: int, power: float, step_rules: str | None
) -> Callable[[int], float]:
    """Step -> factor on the learning rate, by diffusers' schedulers of that name.

    A pure function of the step, so that a resume has no scheduler state to restore.
    """
    bystander = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        name,
        bystander,
        step_rules=step_rules,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        num_cycles=num_cycles,
        power=power,
    )
    return scheduler.lr_lambdas[0]


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def soften_outliers(parameters: list[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Shrinks an already clipped gradient again where its norm was over 5 times max_norm, by that ratio up to 10.

    The rule of the original training scripts (measured, 2026-11).
    """
    ratio = norm / max_norm
    factor = torch.where(ratio > 5, 1 / ratio.clamp(max=10), torch.ones_like(ratio))
    torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)


def clip_ceiling(step: int, max_norm: float, start_ratio: float, steps: int | None) -> float:
    """The norm to clip at: start_ratio * max_norm at step 0, falling linearly to max_norm over `steps`."""
    if steps is None or step >= steps:
        return max_norm
    return max_norm * (start_ratio + (1 - start_ratio) * step / steps)


class StochasticRounding:
    """Trains bf16 parameters with an optimizer that sees fp32.

    Each step lifts some parameters and gradients at a time to fp32, steps there, and rounds back up or down with
    a probability equal to the remainder, so that small updates are kept on average (https://arxiv.org/abs/2010.06192).
    `build` makes the optimizer over the fp32 stand-ins; its state stays fp32.
    """

    CHUNK = 2**26  # elements lifted at a time: 512 MiB of fp32 weights and gradients

    def __init__(self, groups: list[dict], build: Callable[[list[dict]], torch.optim.Optimizer], seed: int):
        self.seed = seed
        self.steps = 0
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        lifted = []
        for group in groups:
            stand_ins = [nn.Parameter(p.detach().float()) for p in group["params"]]
            self.pairs += zip(group["params"], stand_ins, strict=True)
            lifted.append({**group, "params": stand_ins})
        self.optimizer = build(lifted)
        self._release(self.pairs)

    @torch.no_grad()
    def step(self) -> None:
        counters = [group.get("step") for group in self.optimizer.param_groups]
        for first, chunk in self._chunks():
            for group, counter in zip(self.optimizer.param_groups, counters, strict=True):
                if counter is not None:  # some optimizers count calls; this is one step in several calls
                    group["step"] = counter
            for parameter, stand_in in chunk:
                stand_in.data = parameter.detach().float()
                stand_in.grad = None if parameter.grad is None else parameter.grad.float()
            self.optimizer.step()
            generator = torch.Generator(chunk[0][0].device).manual_seed(
                seed_of(self.seed, "rounding", self.steps, first)
            )
            for parameter, stand_in in chunk:
                parameter.data.copy_(round_stochastically(stand_in.data, generator))
            self._release(chunk)
        self.steps += 1

    def zero_grad(self) -> None:
        for parameter, _ in self.pairs:
            parameter.grad = None

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def state_dict(self) -> dict:
        return {"steps": self.steps, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _chunks(self):
        first, chunk, size = 0, [], 0
        for index, pair in enumerate(self.pairs):
            chunk.append(pair)
            size += pair[0].numel()
            if size >= self.CHUNK or index == len(self.pairs) - 1:
                yield first, chunk
                first, chunk, size = index + 1, [], 0

    def _release(self, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
        for _, stand_in in pairs:
            stand_in.grad = None
            stand_in.data = torch.empty(0, device=stand_in.device)


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 -> bf16: a random number below one unit in the last bf16 place is added, then the low 16 bits are cut."""
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = x.contiguous().view(torch.int32) + noise
    return (bits & -(2**16)).view(torch.float32).to(torch.bfloat16)


class MovingAverage:
    """fp32 average of the trained weights: a = decay * a + (1 - decay) * w after each step."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.trained = {name: w for name, w in net.named_parameters() if w.requires_grad}
        self.weights = {name: w.detach().float().clone() for name, w in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(
            [self.weights[name] for name in self.trained],
            [w.detach().float() for w in self.trained.values()],
            1 - self.decay,
        )
