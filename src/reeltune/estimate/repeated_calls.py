"""Calls of a VAE's encoder and decoder that are like one before, counted and not run again.

Clips of a batch, and clips and their controls, are of one shape; and of the portions of a few frames, or the tiles, in
which a clip goes through a VAE most are: of 81 frames' 21 portions all but 3 in Wan2.1's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from reeltune.estimate.memory_tracker import Tracker, Work, tensors_in

CODERS = ("encoder", "decoder")  # of a VAE of diffusers
PLAIN = (bool, int, float, str, type(None))  # what is told by its value


@contextmanager
def counted_once(vae: nn.Module | None, tracker: Tracker) -> Iterator[None]:
    """Within, its coders do not run again what they ran within. None: there is no VAE."""
    coders = {name: coder for name, coder in (vae.named_children() if vae else ()) if name in CODERS}
    for name, coder in coders.items():
        setattr(vae, name, Once(coder, tracker))
    try:
        yield
    finally:
        for name, coder in coders.items():
            setattr(vae, name, coder)


class Once(nn.Module):
    """Stands in the place of a network, and calls it unless a call was alike; then tensors without values are the
    answer."""

    def __init__(self, network: nn.Module, tracker: Tracker):
        super().__init__()
        self.network, self.tracker = network, tracker
        self.known: dict[str, tuple[Work, Any]] = {}  # what a call was like -> what it took and left, as outlines

    def forward(self, *given: Any, **named: Any) -> Any:
        of_caller = [*given, *named.values()]
        lists = [value for value in of_caller if isinstance(value, list)]
        places = [*map(vars, self.network.modules()), *lists]  # where features are that the next portion needs
        like = repr(tree_map(outline, (given, named, [*map(held, places)])))
        if like in self.known:
            work, made = self.known[like]
            out, left = self.tracker.again(work, lambda: tree_map(made_of, made))
            for place, values in zip(places, left, strict=True):
                for key, value in values.items():
                    place[key] = value
            return out
        out, work = self.tracker.rise(lambda: self.network(*given, **named))
        made = out, [*map(held, places)]
        if can_be_made(made, tensors_in([value for value in of_caller if not isinstance(value, list)])):
            self.known[like] = work, tree_map(outline, made)
        return out


def held(place: dict[Any, Any] | list[Any]) -> dict[Any, Any]:
    """The tensors and plain values in it."""
    pairs = place.items() if isinstance(place, dict) else enumerate(place)
    return {key: value for key, value in pairs if isinstance(value, (Tensor, *PLAIN))}


def outline(value: Any) -> Any:
    """What makes such a tensor; of all else the value."""
    if not isinstance(value, Tensor):
        return value
    return partial(torch.empty_strided, value.shape, value.stride(), dtype=value.dtype)


def made_of(outline: Any) -> Any:
    return outline() if isinstance(outline, partial) else outline


def can_be_made(made: Any, given: list[Tensor]) -> bool:
    """Whether each tensor is all of a storage of its own, which none has that was given, and all else is plain."""
    tensors = tensors_in(made)
    storages = {id(tensor.untyped_storage()) for tensor in tensors} - {id(one.untyped_storage()) for one in given}
    whole = all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    plain = all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in tree_leaves(made))
    return whole and plain and len(storages) == len(tensors)
