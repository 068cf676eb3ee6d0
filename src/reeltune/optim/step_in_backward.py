"""The optimizer's step inside the backward pass, so that there is never a full set of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from reeltune.optim.optimizers import PartStep, StochasticRounding, in_parts


class StepInBackward:
    """Steps each parameter as soon as its gradient is whole, and frees that gradient.

    A step ends in the same bits as one after the backward pass. Where gradients are clipped by their norm, which is
    known only when all have been there, the backward pass runs twice over the same activations: for the norm, then
    for the step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | StochasticRounding, parameters: Sequence[nn.Parameter]):
        self.optimizer, self.parameters = optimizer, parameters
        self.loss: Tensor | None = None
        self._arrived: Callable[[nn.Parameter], None]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    def backward(self, loss: Tensor) -> None:
        """Keeps the loss until `step`, which needs the learning rate."""
        self.loss = loss

    def rehearse(self, loss: Tensor) -> None:
        """A backward pass whose gradients are thrown away, each as it comes."""
        self.loss = loss
        self._run(lambda _: None)
        self.loss = None

    def step(self, max_norm: float, soften: Callable[[list[nn.Parameter], Tensor], None] | None = None) -> Tensor:
        """Returns the norm of all gradients before clipping, still on the device.

        soften: what is done with clipped gradients, given their parameters and that norm, before they step.
        """
        norms: dict[int, Tensor] = {}
        before = partial(_measure, norms)
        if max_norm != math.inf:
            self._run(before, keep=True)
            norm = self._total(norms)
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
            before = partial(_clip, factor, norm, soften)
        optimizer = self.optimizer
        parts = optimizer.in_parts() if isinstance(optimizer, StochasticRounding) else in_parts(optimizer)
        with parts as step:
            self._run(partial(_step, before, step))
        self.loss = None
        return self._total(norms)

    def _on_gradient(self, parameter: nn.Parameter) -> None:
        self._arrived(parameter)
        parameter.grad = None

    def _run(self, arrived: Callable[[nn.Parameter], None], *, keep: bool = False) -> None:
        assert self.loss is not None
        self._arrived = arrived
        self.loss.backward(retain_graph=keep)

    def _total(self, norms: dict[int, Tensor]) -> Tensor:
        """The norm of all gradients, in the order and form of torch.nn.utils.get_total_norm, for the same bits."""
        in_order = [norms[id(parameter)] for parameter in self.parameters if id(parameter) in norms]
        return torch.linalg.vector_norm(torch.stack(in_order))


def _measure(norms: dict[int, Tensor], parameter: nn.Parameter) -> None:
    norms[id(parameter)] = torch.linalg.vector_norm(_gradient(parameter))


def _clip(
    factor: Tensor,
    norm: Tensor,
    soften: Callable[[list[nn.Parameter], Tensor], None] | None,
    parameter: nn.Parameter,
) -> None:
    _gradient(parameter).mul_(factor)
    if soften is not None:
        soften([parameter], norm)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _step(before: Callable[[nn.Parameter], None], step: PartStep, parameter: nn.Parameter) -> None:
    before(parameter)
    step([parameter])
