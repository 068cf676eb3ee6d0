"""Bytes and FLOPs of what runs, op by op: an allocator's count for tensors that need not have values."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from reeltune.estimate import repeated_ops

ROUND_BYTES = 512  # CUDA's allocator gives whole blocks of it (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)
ELSEWHERE = "elsewhere"  # the part of what is not on the device
HOST = "host"  # the part of what has left it for the machine's own memory
AWAY = (ELSEWHERE, HOST)
WEIGHTS = ("weights", "still")  # parts of which a copy in another precision is told apart, as "casts"
FACTORIES = ("::empty", "::zeros", "::full", "::rand", "::randn", "::randint")
VALUED = 2**20  # numbers; tensors made of nothing of more than that are noise or room, and nobody looks at them
aten, DEVICE = torch.ops.aten, torch.ops.prim.device.default
T = TypeVar("T")
FLOPS = {  # torch's own table leaves the CPU's kernel out, which begins with the same arguments as the GPU's
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Work:
    """What ran in a phase, or in a part of one."""

    peak: Counter[str]  # part -> bytes at its fullest moment; in a part of a phase, beside what was there before it
    flops: int


class Tracker(TorchDispatchMode):
    """Counts every storage that an op makes, from then until it is freed, under the phase it was made in.

    `live` has the bytes now, by part; `peaks` those at the fullest moment of each phase; `flops` those of each phase.
    Works alike on real tensors and on those of FakeTensorMode. What was there before is told to `own`; what a kernel
    allocates and frees within itself is not seen.

    fake: in which large tensors made of nothing, such as noise, have no values either.
    """

    def __init__(self, fake: FakeTensorMode):
        super().__init__()
        self.fake = fake
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}
        self.flops: Counter[str] = Counter()
        self._phase = ""
        self._known: dict[int, Block] = {}  # by the storage's id
        self._times, self._seen = 1, True
        self._made: list[Block] = []  # while it stands for more

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

    def work(self, phase: str) -> Work:
        """What has run in this phase."""
        return Work(Counter(self.peaks[phase]), self.flops[phase])

    def own(self, tensors: Iterable[Tensor], part: str, times: int = 1) -> None:
        """These tensors belong to `part` from now on, whatever made them, and each counts `times` times.

        part: ELSEWHERE and HOST are not on the device.
        """
        for tensor in tensors:
            block = self.block_of(tensor)
            self._count(block, part, max(block.times, times))
        self._look()

    def stand_for(self, times: int, *, unseen: bool = False) -> None:
        """What runs from now on counts `times` times. unseen: and is not looked at for the fullest moment."""
        self._times, self._seen = times, not unseen

    def multiply(self, times: int, part: str | None = None) -> None:
        """What was made while `stand_for` counted several times, and is still there, counts `times` times.

        part: that of this part alone; None: all of it.
        """
        for block in self._made:
            if id(block.reference()) in self._known and part in (None, block.part):
                self._count(block, block.part, times)
        self._made.clear()
        self._look()

    def rise(self, run: Callable[[], T]) -> tuple[T, Work]:
        """(what `run` returns; what it takes, its bytes beyond those that were there before it)."""
        phase, before, flops = self._phase, on_device(self.live), self.flops[self._phase]
        earlier, self.peaks[phase] = self.peaks[phase], before
        out = run()
        peak = Counter(self.peaks[phase])
        peak.subtract(before)
        self.peaks[phase] = fuller(earlier, self.peaks[phase])
        return out, Work(peak, self.flops[phase] - flops)

    def again(self, work: Work, make: Callable[[], T]) -> T:
        """Counts `work` once more without running it. make: makes fake tensors like those that it left."""
        self.flops[self._phase] += work.flops
        self._look(work.peak)
        self._seen = False  # what it left is there beside what it took the place of
        with self.fake:
            made = make()
        self._seen = True
        return made

    def rename(self, old: str, new: str) -> None:
        """All that is still there of one part belongs to the other."""
        for block in self._known.values():
            if block.part == old:
                block.part = new
        self.live[new] += self.live.pop(old, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DEVICE and isinstance(args[0], FakeTensor):  # half of all that is asked
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype).item()  # any number does for one that has no value
        out = self._run(func, types, args, kwargs)
        for tensor in tensors_in(out):
            if tensor.layout is torch.strided:
                self.block_of(tensor)
        if func is aten._to_copy.default and self.block_of(args[0]).part in WEIGHTS:
            self.own([out], "casts")
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops[self._phase] += self._times * int(formula(*args, **kwargs, out_val=out))
        return out

    def _run(self, func, types, args, kwargs) -> Any:
        if FakeTensor in types and _get_dispatch_mode(_TorchDispatchModeKey.FAKE) is None:
            return repeated_ops.run(self.fake, func, types, args, kwargs)
        if isinstance(args[0], Tensor) or not func._schema.name.endswith(FACTORIES):
            return func(*args, **kwargs)
        with self.fake:
            out = func(*args, **kwargs)
        return out if out.numel() > VALUED else func(*args, **kwargs)

    def block_of(self, tensor: Tensor) -> Block:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known:
            size_bytes = -(-storage.nbytes() // ROUND_BYTES) * ROUND_BYTES
            block = Block(weakref.ref(storage, lambda _: self._gone(key)), self._phase, size_bytes)
            self._known[key] = block
            if self._times > 1 and self._seen:
                self._made.append(block)
            self.live[self._phase] += size_bytes
            self._look()
        return self._known[key]

    def _gone(self, key: int) -> None:
        block = self._known.pop(key)
        self.live[block.part] -= block.size_bytes

    def _count(self, block: Block, part: str, times: int) -> None:
        self.live[block.part] -= block.size_bytes
        block.part, block.times = part, times
        self.live[part] += block.size_bytes

    def _look(self, beside: Counter[str] | None = None) -> None:
        """Keeps this moment if it is the fullest of its phase. beside: what is there, too."""
        if self._phase and self._seen:
            now = on_device(self.live if beside is None else self.live + beside)
            self.peaks[self._phase] = fuller(self.peaks[self._phase], now)


def tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):  # as what most operators make
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def weights_of(net: nn.Module, *, recurse: bool = True) -> list[Tensor]:
    """Each once, though it may have several names."""
    return [*net.parameters(recurse), *net.buffers(recurse)]


def fuller(*moments: dict[str, int]) -> dict[str, int]:
    """The first of those that take most, each as part -> bytes."""
    return max(moments, key=lambda parts: sum(parts.values()))


def on_device(live: Counter[str]) -> dict[str, int]:
    """Bytes of its parts."""
    return {part: count for part, count in live.items() if count and part not in AWAY}


@dataclass
class Block:
    """A storage, and what it counts as: torch's unit of memory, which several tensors may share."""

    reference: weakref.ref
    part: str
    one_bytes: int
    times: int = 1  # that it counts

    @property
    def size_bytes(self) -> int:
        return self.one_bytes * self.times
