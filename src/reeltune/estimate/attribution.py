"""To which part of a step each tensor belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from reeltune.core.types import Batch
from reeltune.estimate.fakes import weights_of
from reeltune.estimate.memory_tracker import ELSEWHERE, HOST, Tracker
from reeltune.families.spec import Parts
from reeltune.memory import blocks
from reeltune.training.learner import Learner

Times = Callable[[Tensor], int]


def own_what_is_there(
    tracker: Tracker, parts: Parts, learner: Learner, batch: Batch, times: Times, *, visiting: bool
) -> None:
    """visiting: frozen networks are on the device only while they are borrowed."""
    tensors = weights_of(parts.net)
    learning = {id(parameter) for parameter in learner.learning}
    tracker.own((tensor for tensor in tensors if id(tensor) in learning), "weights", times)
    tracker.own((tensor for tensor in tensors if id(tensor) not in learning), "still", times)
    for block in learner.network.swapped:
        tracker.own(weights_of(block), ELSEWHERE)
    tracker.own(parts.null.values(), "batch")
    tracker.own(tensors_in(vars(batch)), ELSEWHERE)  # in the host's memory until Batch.to
    if learner.average is not None:
        for name, average in learner.average.weights.items():
            count = times(learner.average.trained[name])
            tracker.own([average], "average", lambda _, count=count: count)
    for module in parts.frozen.values():
        tracker.own(weights_of(module), ELSEWHERE if visiting else "frozen")
    if visiting:

        @contextmanager
        def borrow(name: str) -> Iterator[nn.Module]:
            module = parts.frozen[name]
            tracker.own(weights_of(module), "frozen")
            yield module
            tracker.own(weights_of(module), ELSEWHERE)

        parts.borrow = borrow


def own_state(tracker: Tracker, learner: Learner, times: Times) -> None:
    states = learner.optimizer.state_dict()
    for i, state in states.get("optimizer", states)["state"].items():
        tracker.own(tensors_in(state), "optimizer", lambda _, i=i: times(learner.learning[i]))


@contextmanager
def gradients_owned(tracker: Tracker, parameters: Sequence[nn.Parameter], times: Times) -> Iterator[None]:
    def arrived(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        tracker.own([parameter.grad], "gradients", lambda _: times(parameter))

    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
    yield
    for hook in hooks:
        hook.remove()


def give_gradients(
    parameters: Sequence[nn.Parameter], tracker: Tracker, times: Times, stand_ins: FakeTensorMode
) -> None:
    """As a backward pass would have left them."""
    for parameter in parameters:
        with stand_ins:
            parameter.grad = torch.empty_like(parameter)
        tracker.own([parameter.grad], "gradients", lambda _, parameter=parameter: times(parameter))


@contextmanager
def host_apart(tracker: Tracker) -> Iterator[None]:
    """What goes to the machine's own memory is not on the device, though here both are one."""
    to_host, to_device = blocks.to_host, blocks.to_device

    def gone(tensor: Tensor) -> Tensor:
        copy = to_host(tensor)
        tracker.own([copy], HOST)
        return copy

    def back(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.clone() if tracker.part_of(tensor) == HOST else to_device(tensor, device)

    blocks.to_host, blocks.to_device = gone, back
    try:
        yield
    finally:
        blocks.to_host, blocks.to_device = to_host, to_device


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
