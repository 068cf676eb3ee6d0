"""Bytes and FLOPs of what runs, op by op: an allocator's count for tensors that need not have values."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ROUND_BYTES = 512  # CUDA's allocator gives whole blocks of it (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)
ELSEWHERE = "elsewhere"  # the part of what is not on the device
WEIGHTS = ("weights", "still")  # parts of which a copy in another precision is told apart, as "casts"
FACTORIES = ("::empty", "::zeros", "::full", "::rand", "::randn", "::randint")
VALUED = 2**20  # numbers; tensors made of nothing of more than that are noise or room, and nobody looks at them
aten = torch.ops.aten


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FLOPS = {  # torch's own table leaves the CPU's kernel out
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class Tracker(TorchDispatchMode):
    """Counts every storage that an op makes, from then until it is freed, under the phase it was made in.

    `live` has the bytes now, by part; `peaks` those at the fullest moment of each phase; `flops` those of each phase.
    Works alike on real tensors and on those of FakeTensorMode. What was there before is told to `own`; what a kernel
    allocates and frees within itself is not seen.

    stand_ins: where large tensors made of nothing, such as noise, have no values either.
    """

    def __init__(self, stand_ins: FakeTensorMode | None = None):
        super().__init__()
        self.stand_ins = stand_ins
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self.flops: Counter[str] = Counter()
        self._phase = ""
        self._known: dict[int, _Block] = {}  # by the storage's id
        self._total = 0  # of `live`, but ELSEWHERE
        self._fullest: Counter[str] = Counter()  # phase -> most that it was

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is made within belongs to `name`."""
        before, self._phase = self._phase, name
        self.peaks.setdefault(name, {})
        self._look()
        try:
            yield
        finally:
            self._phase = before

    def own(self, tensors: Iterable[Tensor], part: str) -> None:
        """These are `part` from now on, whoever made them. ELSEWHERE: they are not on the device."""
        for tensor in tensors:
            block = self._block(tensor)
            self._add(block.part, -block.size_bytes)
            block.part = part
            self._add(part, block.size_bytes)
        self._look()

    def rename(self, old: str, new: str) -> None:
        """All that is still there of one part belongs to the other."""
        for block in self._known.values():
            if block.part == old:
                block.part = new
        self.live[new] += self.live.pop(old, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self._made_of_nothing(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._block(tensor)
        if func is aten._to_copy.default and self._block(args[0]).part in WEIGHTS:
            self.own([out], "casts")
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops[self._phase] += int(formula(*args, **kwargs, out_val=out))
        return out

    def _made_of_nothing(self, func, args, kwargs) -> Tensor | None:
        """A large tensor without values, if that is what is asked for."""
        if self.stand_ins is None or isinstance(args[0], Tensor) or not func._schema.name.endswith(FACTORIES):
            return None
        with self.stand_ins:
            out = func(*args, **kwargs)
        return out if out.numel() > VALUED else None

    def _block(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known:
            size_bytes = -(-storage.nbytes() // ROUND_BYTES) * ROUND_BYTES
            self._known[key] = _Block(weakref.ref(storage, lambda _: self._gone(key)), self._phase, size_bytes)
            self._add(self._phase, size_bytes)
            self._look()
        return self._known[key]

    def _gone(self, key: int) -> None:
        block = self._known.pop(key)
        self._add(block.part, -block.size_bytes)

    def _add(self, part: str, size_bytes: int) -> None:
        self.live[part] += size_bytes
        if part != ELSEWHERE:
            self._total += size_bytes

    def _look(self) -> None:
        """Keeps this moment if it is the fullest of its phase."""
        if self._phase and self._total > self._fullest[self._phase]:
            self._fullest[self._phase] = self._total
            live = self.live.items()
            self.peaks[self._phase] = {part: count for part, count in live if count and part != ELSEWHERE}


@dataclass
class _Block:
    """One storage."""

    reference: weakref.ref
    part: str
    size_bytes: int
