"""Deep networks estimated with few of their blocks, exactly.

Of a run of equal blocks four are left, of which one stands for all that are gone. Its weights, gradients and state,
what it keeps for the backward pass and its FLOPs count as often as it stands for. From one block to the next a pass
keeps or frees the same bytes more; so the fullest moment is in the first or the last block, which are there, and
moments within one that stands for many are not looked at. Where blocks wait on the host, the block before the last of a
pass may be the fullest, as the next one's weights come meanwhile; so one more is left at both ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from reeltune.estimate.memory_tracker import Tracker, tensors_in, weights_of

LEFT = 4  # first, the one that stands for more, the one that frees what it hands on, last


@dataclass(frozen=True)
class Stand:
    """`block` is there for `times` blocks, between the `first` and the `last` of its kind but those at its ends."""

    first: nn.Module
    block: nn.Module
    last: nn.Module
    times: int


def shorten(net: nn.Module, classes: tuple[str, ...], *, swapped: bool = False) -> list[Stand]:
    """Takes blocks of these class names out of the network, in place; names of those left stay as they are.

    swapped: some of them wait on the host.
    """
    lists = [module for module in net.modules() if isinstance(module, nn.ModuleList)]
    return [stand for blocks in lists for stand in _cut(blocks, classes, int(swapped))]


def _cut(blocks: nn.ModuleList, classes: tuple[str, ...], ends: int) -> Iterator[Stand]:
    named = [(name, block) for name, block in blocks.named_children() if type(block).__name__ in classes]
    for _, equal in groupby(named, key=lambda pair: _outline(pair[1])):
        run = list(equal)
        gone = len(run) - LEFT - 2 * ends
        if gone < 1:
            continue
        for name, _ in run[ends + 2 : ends + 2 + gone]:
            delattr(blocks, name)  # not by index, which would rename those behind it
        first, block, *_, last = (block for _, block in run[ends : len(run) - ends])
        yield Stand(first, block, last, 1 + gone)


def _outline(block: nn.Module) -> list:
    """Blocks of which this is the same do the same. What is around a module's forward pass, from without, is told by
    its words alone: that it recomputes, visits the device, or has a kernel chosen."""
    return [
        (
            name,
            type(module).__name__,
            re.sub(" at 0x[0-9a-f]+", "", repr(vars(module).get("forward"))),
            sorted((key, value) for key, value in vars(module).items() if isinstance(value, bool | int | float | str)),
            [(weight.shape, weight.dtype, weight.requires_grad) for weight in weights_of(module, recurse=False)],
        )
        for name, module in block.named_modules()
    ]


@contextmanager
def counted(stands: Sequence[Stand], tracker: Tracker) -> Iterator[None]:
    """Within, the tracker counts what they stand for."""
    hooks = [hook for stand in stands for hook in _hooks(stand, tracker)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hooks(stand: Stand, tracker: Tracker) -> Iterator[Any]:
    def begins(*_: Any) -> None:
        tracker.stand_for(stand.times)

    def ends(_module: nn.Module, _given: Any, out: Any) -> None:
        tracker.stand_for(1)
        for tensor in _learned(out):
            tensor.register_hook(lambda _: tracker.stand_for(stand.times, unseen=True))

    def last_begins(_module: nn.Module, given: Any, named: Any) -> None:
        """What is there of the block when one more is through with what it handed on, is kept. Without gradients those
        are copies of weights alone, which autocast keeps to its end."""
        tracker.multiply(stand.times, None if _learned((given, named)) else "casts")

    def first_ends(_module: nn.Module, _given: Any, out: Any) -> None:
        """The backward pass takes what was made last first, so all blocks behind this one are through by then."""
        for tensor in _learned(out):
            tensor.register_hook(lambda _: tracker.stand_for(1))

    yield stand.first.register_forward_hook(first_ends)
    yield stand.block.register_forward_pre_hook(begins)
    yield stand.block.register_forward_hook(ends)
    yield stand.last.register_forward_pre_hook(last_begins, with_kwargs=True)


def _learned(out: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(out) if tensor.requires_grad]
