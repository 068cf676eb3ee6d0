"""To which part of a step each tensor belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reeltune.estimate.memory_tracker import ELSEWHERE, HOST, Tracker, tensors_in, weights_of
from reeltune.memory import blocks
from reeltune.training.learner import Learner

Times = Callable[[Tensor], int]  # weight -> for how many it stands; what belongs to it is there as often


def own_network(tracker: Tracker, learner: Learner, times: Times) -> None:
    """Its weights, and their moving average."""
    learning = {id(parameter) for parameter in learner.learning}
    for tensor in weights_of(learner.plain):
        tracker.own([tensor], "weights" if id(tensor) in learning else "still", times(tensor))
    for block in learner.network.swapped:
        tracker.own(blocks.waiting(block), ELSEWHERE)
    if learner.average is not None:
        for name, average in learner.average.weights.items():
            tracker.own([average], "average", times(learner.average.trained[name]))


def own_state(tracker: Tracker, learner: Learner, times: Times) -> None:
    states = learner.optimizer.state_dict()
    for i, state in states.get("optimizer", states)["state"].items():
        tracker.own(tensors_in(state), "optimizer", times(learner.learning[i]))


@contextmanager
def gradients_owned(tracker: Tracker, parameters: Sequence[nn.Parameter], times: Times) -> Iterator[None]:
    """Within, each gradient as soon as a backward pass has made it."""

    def arrived(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        tracker.own([parameter.grad], "gradients", times(parameter))

    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
    yield
    for hook in hooks:
        hook.remove()


def give_gradients(parameters: Sequence[nn.Parameter], tracker: Tracker, times: Times) -> None:
    """As a backward pass would have left them."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        tracker.own([parameter.grad], "gradients", times(parameter))


def offload_activations(net: nn.Module, tracker: Tracker) -> None:
    """As training does; of fake tensors, which are all of one device, the tracker knows which are on the host."""

    def to_host(tensor: Tensor) -> Tensor:
        copy = blocks.to_host(tensor)
        tracker.own([copy], HOST)
        return copy

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.clone() if tracker.part_of(tensor) == HOST else tensor

    blocks.offload_activations(net, to_host=to_host, to_device=to_device)
