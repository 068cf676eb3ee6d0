"""Which part of a step each tensor belongs to. What belongs to a weight is there as often as the weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reeltune.estimate.memory_tracker import ELSEWHERE, HOST, Tracker, tensors_in, weights_of
from reeltune.estimate.repeated_blocks import Stand
from reeltune.memory import blocks
from reeltune.training.learner import Learner


def own_network(tracker: Tracker, learner: Learner, stands: Sequence[Stand]) -> None:
    """Marks the learner's weights, those of `stands` as often as they stand for, and their moving average."""
    times = {id(weight): stand.times for stand in stands for weight in weights_of(stand.block)}
    for weight in weights_of(learner.plain):
        tracker.own([weight], "weights" if weight.requires_grad else "still", times.get(id(weight), 1))
    for block in learner.network.swapped:
        tracker.own(blocks.waiting(block), ELSEWHERE)
    if learner.average is not None:
        for name, average in learner.average.weights.items():
            tracker.own([average], "average", tracker.block_of(learner.average.trained[name]).times)


def own_state(tracker: Tracker, learner: Learner) -> None:
    states = learner.optimizer.state_dict()
    for i, state in states.get("optimizer", states)["state"].items():
        tracker.own(tensors_in(state), "optimizer", tracker.block_of(learner.learning[i]).times)


@contextmanager
def gradients_owned(tracker: Tracker, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, each gradient as soon as a backward pass has made it."""

    def arrived(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        tracker.own([parameter.grad], "gradients", tracker.block_of(parameter).times)

    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
    yield
    for hook in hooks:
        hook.remove()


def give_gradients(tracker: Tracker, parameters: Sequence[nn.Parameter]) -> None:
    """Gives each parameter a gradient, as a backward pass would have left it."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        tracker.own([parameter.grad], "gradients", tracker.block_of(parameter).times)


def offload_activations(net: nn.Module, tracker: Tracker) -> None:
    """Offloads activations as training does; of fake tensors, which are all of one device, the tracker knows which are
    on the host."""

    def to_host(tensor: Tensor) -> Tensor:
        copy = blocks.to_host(tensor)
        tracker.own([copy], HOST)
        return copy

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.clone() if tracker.block_of(tensor).part == HOST else tensor

    blocks.offload_activations(net, to_host=to_host, to_device=to_device)
