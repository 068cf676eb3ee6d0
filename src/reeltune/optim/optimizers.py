"""Optimizers, the learning rate's course, weights kept in bf16, and their moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from reeltune.core.errors import UserError
from reeltune.core.rng import seed_of
from reeltune.optim.rounding import lifted, round_by_chance

OF_A_RECIPE = ("rate", "betas", "eps", "weight_decay")  # of what a group has beside its parameters


def build_optimizer(
    groups: list[dict],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    use_8bit_adam: bool = False,
    use_came: bool = False,
    use_adafactor: bool = False,
    use_prodigy: bool = False,
    use_muon: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (fused where there is a GPU), 8-bit AdamW (bitsandbytes), Adafactor (torch), or CAME, Prodigy or Muon
    (pytorch_optimizer).

    A group's "rate" multiplies the learning rate; Prodigy has the first group's for all. Raises UserError for a
    missing package.
    """
    groups = [{**group, "lr": learning_rate * group["rate"]} for group in groups]
    if use_came:
        from pytorch_optimizer import CAME

        # CAME has a third decay and two epsilons: https://arxiv.org/abs/2307.02047, section 4.1.
        decays = {"betas": (*betas, 0.9999), "weight_decay": weight_decay}
        # All weights at once would take 8 bytes more for each of them (measured, 2026-11).
        return CAME(groups, lr=learning_rate, **decays, eps1=1e-30, eps2=1e-16, foreach=False)
    if use_adafactor:
        # No first moment, and a decay of the second that only its step decides: https://arxiv.org/abs/1804.04235.
        return torch.optim.Adafactor(groups, lr=learning_rate, weight_decay=weight_decay)
    if use_prodigy:
        from pytorch_optimizer import Prodigy

        # The first two are its authors' advice for diffusion models: https://github.com/konstmish/prodigy.
        return Prodigy(
            groups,
            lr=learning_rate,
            betas=betas,
            eps=epsilon,
            weight_decay=weight_decay,
            bias_correction=True,
            safeguard_warmup=True,
            foreach=False,  # the same sums on every device
        )
    if use_muon:
        return _muon(groups, betas=betas, epsilon=epsilon, weight_decay=weight_decay)
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


def _muon(
    groups: list[dict], *, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Muon for matrices, AdamW for all else, in the order given.

    A step is scaled to the size of AdamW's, 0.2 in the mean square, by 0.2 * sqrt(larger side), so that AdamW's rate
    and decay are right for it (https://arxiv.org/abs/2502.16982, section 2.2). The momentum, 0.95, is its author's
    (https://kellerjordan.github.io/posts/muon).
    """
    from pytorch_optimizer import Muon

    alike = [
        {**group, "params": list(part), "use_muon": is_matrix, "weight_decay": weight_decay}
        | ({} if is_matrix else {"betas": betas, "eps": epsilon})
        for group in groups
        for is_matrix, part in groupby(group["params"], lambda parameter: parameter.ndim == 2)
    ]
    # One matrix at a time: a batch of them has other bits than its parts, which step in backward and rounding step.
    return Muon(alike, momentum=0.95, use_adjusted_lr=True, foreach=False)


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


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The state of a checkpoint, and the settings of the recipe: torch would take those of the checkpoint as well."""
    own = [{name: group[name] for name in OF_A_RECIPE if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def soften_outliers(parameters: list[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Shrinks an already clipped gradient again where its norm was over 5 times max_norm, by that ratio up to 10.

    The rule of the original training scripts (measured, 2026-11).
    """
    ratio = norm / max_norm
    factor = torch.where(ratio > 5, 1 / ratio.clamp(max=10), torch.ones_like(ratio))
    torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], factor)


def clip_ceiling(step: int, max_norm: float, start_ratio: float, steps: int | None) -> float:
    """The norm to clip at: start_ratio * max_norm at step 0, falling linearly to max_norm over `steps`."""
    if steps is None or step >= steps:
        return max_norm
    return max_norm * (start_ratio + (1 - start_ratio) * step / steps)


PartStep = Callable[[Sequence[nn.Parameter]], None]


@contextmanager
def in_parts(optimizer: torch.optim.Optimizer) -> Iterator[PartStep]:
    """Hands out what steps some of its parameters. Called once for each of them, that is one step, bit for bit.

    It knows those alone whose turn it is, so that no time goes to the others; one that counts its steps counts one.
    """
    groups = optimizer.param_groups
    members = [group["params"] for group in groups]
    counters = [group.get("step") for group in groups]
    place = {id(parameter): i for i, group in enumerate(members) for parameter in group}

    def step(some: Sequence[nn.Parameter]) -> None:
        for i, (group, counter) in enumerate(zip(groups, counters, strict=True)):
            group["params"] = [parameter for parameter in some if place[id(parameter)] == i]
            if counter is None:
                group.pop("step", None)
            else:
                group["step"] = counter
        optimizer.step()

    try:
        yield step
    finally:
        for group, parameters in zip(groups, members, strict=True):
            group["params"] = parameters


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
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.places = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        empty = ((0,) * parameter.ndim for parameter in self.parameters)  # an optimizer may go by their dimensions
        self.stand_ins = [
            nn.Parameter(parameter.detach().new_empty(shape, dtype=torch.float32))
            for parameter, shape in zip(self.parameters, empty, strict=True)
        ]
        self.optimizer = build([{**group, "params": self._standing_in(group["params"])} for group in groups])

    def step(self) -> None:
        with self.in_parts() as step:
            for chunk in self._chunks():
                step(chunk)

    @contextmanager
    def in_parts(self) -> Iterator[PartStep]:
        """What the function of that name does, with fp32 stand-ins for the parameters."""
        with in_parts(self.optimizer) as step_stand_ins:

            @torch.no_grad()
            def step(some: Sequence[nn.Parameter]) -> None:
                stand_ins = self._standing_in(some)
                piece_N = self._lift(some, stand_ins)
                step_stand_ins(stand_ins)
                for stand_in in stand_ins:  # before as much is taken for the dice
                    stand_in.grad = None
                copies = [stand_in.data for stand_in in stand_ins]
                seeds = [seed_of(self.seed, "rounding", self.steps, self.places[id(parameter)]) for parameter in some]
                round_by_chance(piece_N, copies, seeds)
                torch._foreach_copy_([parameter.data for parameter in some], copies)
                for stand_in in stand_ins:
                    stand_in.data = torch.empty(0, device=stand_in.device)

            yield step
        self.steps += 1

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def state_dict(self) -> dict:
        return {"steps": self.steps, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _standing_in(self, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
        return [self.stand_ins[self.places[id(parameter)]] for parameter in parameters]

    @staticmethod
    def _lift(some: Sequence[nn.Parameter], stand_ins: Sequence[nn.Parameter]) -> Tensor:
        """Returns the piece in which the stand-ins' values lie."""
        piece_N, copies = lifted([parameter.detach() for parameter in some])
        for stand_in, copy in zip(stand_ins, copies, strict=True):
            stand_in.data = copy
        given = [(stand_in, w.grad) for stand_in, w in zip(stand_ins, some, strict=True) if w.grad is not None]
        _, gradients = lifted([gradient for _, gradient in given])
        for (stand_in, _), gradient in zip(given, gradients, strict=True):
            stand_in.grad = gradient
        return piece_N

    def _chunks(self) -> Iterator[list[nn.Parameter]]:
        chunk: list[nn.Parameter] = []
        count = 0
        for parameter in self.parameters:
            chunk.append(parameter)
            count += parameter.numel()
            if count >= self.CHUNK:
                yield chunk
                chunk, count = [], 0
        if chunk:
            yield chunk


def average_decay(step: int, most: float) -> float:
    """The moving average's decay at optimizer step `step`, counted from 0: 0 at the first, so that nothing is left of
    the weights that a run began with, then (1 + step) / (10 + step), at most `most`. As diffusers' EMAModel, which the
    original scripts use as it comes.
    """
    return 0.0 if step == 0 else min((1 + step) / (10 + step), most)


class MovingAverage:
    """fp32 average of the trained weights: a = d * a + (1 - d) * w after each step, d its `average_decay`."""

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.trained = {name: w for name, w in net.named_parameters() if w.requires_grad}
        self.weights = {name: w.detach().float().clone() for name, w in self.trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights. step: the optimizer's, from 0, that was just taken."""
        decay = average_decay(step, self.decay)
        for name, weight in self.trained.items():  # one by one: bf16 weights are lifted to fp32 for it
            self.weights[name].lerp_(weight.detach().float(), 1 - decay)
