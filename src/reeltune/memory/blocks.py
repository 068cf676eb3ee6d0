"""A network's blocks, some of which recompute their activations or wait in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from reeltune.core.errors import UserError

Contexts = tuple[AbstractContextManager, AbstractContextManager]
"""Around a forward pass, and around its recomputation, which then finds what was kept."""
LEAST_BYTES = 2**20  # of an activation that is worth a copy to the CPU's memory


def blocks_of(net: nn.Module, classes: tuple[str, ...]) -> list[nn.Module]:
    """Modules of these class names, in the order in which they were made."""
    return [module for module in net.modules() if type(module).__name__ in classes]


def spread(blocks: Sequence[nn.Module], share: float) -> list[nn.Module]:
    """This share of the blocks, evenly spread."""
    return _spread(blocks, round(share * len(blocks)))


def _spread(blocks: Sequence[nn.Module], count: int) -> list[nn.Module]:
    return [blocks[i * len(blocks) // count] for i in range(count)]


def recompute(blocks: Sequence[nn.Module], *, keep: Callable[[], Contexts] | None = None) -> None:
    """Gradient checkpointing: these blocks recompute activations in the backward pass.

    keep: of kept.KEPT, what they do not recompute.
    """
    contexts = {} if keep is None else {"context_fn": keep}
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)


# ---- what waits in the CPU's memory


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory; page-locked if it comes from a GPU, which then need not be waited for."""
    on_gpu = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
    return copy.copy_(tensor, non_blocking=on_gpu)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def copy_over(there: Tensor, home: Tensor) -> None:
    there.copy_(home, non_blocking=True)


def offload_activations(
    net: nn.Module,
    *,
    to_host: Callable[[Tensor], Tensor] = to_host,
    to_device: Callable[[Tensor, torch.device], Tensor] = to_device,
) -> None:
    """Has what the network's forward pass keeps for the backward pass wait in the CPU's memory: all tensors of
    LEAST_BYTES or more but the weights, which are on the device anyway."""
    passes: list[saved_tensors_hooks] = []

    def begins(_: nn.Module, _given: Any) -> None:
        storages = [weight.untyped_storage() for weight in chain(net.parameters(), net.buffers())]
        weights = {id(storage): storage for storage in storages}

        def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
            small = tensor.nbytes < LEAST_BYTES
            stays = small or id(tensor.untyped_storage()) in weights
            return tensor.device, tensor if stays else to_host(tensor)

        def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
            device, tensor = packed
            return to_device(tensor, device)

        passes.append(saved_tensors_hooks(pack, unpack))
        passes[-1].__enter__()

    def ends(*_: Any) -> None:
        passes.pop().__exit__()

    net.register_forward_pre_hook(begins)
    net.register_forward_hook(ends, always_call=True)


def waiting(block: nn.Module) -> list[Tensor]:
    """The tensors of a swapped block that are on the device only while it computes: all that do not learn."""
    return [tensor for tensor in chain(block.parameters(), block.buffers()) if not tensor.requires_grad]


def can_wait(block: nn.Module) -> bool:
    """Whether the block has weights that do not learn, and so can be swapped."""
    return not all(weight.requires_grad for weight in block.parameters())


def swap(
    blocks: Sequence[nn.Module],
    count: int,
    device: torch.device,
    *,
    copy: Callable[[Tensor, Tensor], object] = copy_over,
) -> list[nn.Module]:
    """Keeps the weights of `count` blocks, evenly spread, that do not learn in the CPU's memory; `move` leaves them
    there. Returns these blocks.

    They come to the device for the block's forward pass, and again in the backward pass, where the block recomputes its
    activations; nothing is sent back. copy: (tensor on the device, tensor at home) -> sends one tensor. Raises
    UserError if fewer blocks have weights that do not learn.
    """
    still = [block for block in blocks if can_wait(block)]
    if count > len(still):
        raise UserError(
            "recipe",
            f"blocks_to_swap is {count}, but of the network's {len(blocks)} blocks {len(still)} have weights that do "
            f"not learn; set it to at most {len(still)}, or name fewer parts in trainable_modules",
        )
    chosen = _spread(still, count)
    for block in chosen:
        for tensor in waiting(block):
            tensor.data = tensor.data if device.type == "cpu" else tensor.data.cpu().pin_memory()
    visits = Visits(chosen, device, copy)
    for i, block in enumerate(chosen):
        block.forward = partial(checkpoint, visits.computing(i), use_reentrant=False, context_fn=visits.contexts)
    return chosen


class Visits:
    """Copies of what waits, on the device: those of the block that computes, and on their way those of the next.

    While a block computes they stand in the places of what waits, as tensors of their own: autograd keeps frozen
    weights by reference, and would find what waits once the block has done. On a GPU a stream of its own sends them.
    Room for them is of the computing stream, which waits for them to arrive; the sending stream waits for what was
    computed before the room was had.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, copy: Callable[[Tensor, Tensor], object]):
        self.blocks, self.device, self.copy = blocks, device, copy
        self.homes = [waiting(block) for block in blocks]
        self.places = [list(_places(block)) for block in blocks]
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.recomputing = False
        self.sent: tuple[int, list[Tensor]] | None = None  # which block's, and the copies

    def computing(self, i: int) -> Callable[..., Any]:
        """The forward pass of block i, during which its weights are on the device."""
        forward = self.blocks[i].forward

        def visit(*given: Any, **named: Any) -> Any:
            with self._visiting(i):
                return forward(*given, **named)

        return visit

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts around a forward pass, and around its recomputation, in which blocks come in reversed order."""
        return nullcontext(), Recomputing(self)

    @contextmanager
    def _visiting(self, i: int) -> Iterator[None]:
        """Within, block i computes with copies on the device. No reference to them is kept here: what the backward pass
        needs of them, autograd keeps."""
        copies = self._arrived(i)
        self._send(i - 1 if self.recomputing else i + 1)
        visitors = {id(home): _as(home, copy) for home, copy in zip(self.homes[i], copies, strict=True)}
        for module, name, home in self.places[i]:
            setattr(module, name, visitors[id(home)])
        del copies, visitors
        try:
            yield
        finally:
            for module, name, home in self.places[i]:
                setattr(module, name, home)

    def _arrived(self, i: int) -> list[Tensor]:
        if self.sent is None or self.sent[0] != i:
            self._wait()  # for what comes in vain, before its room is another's
            self._send(i)
        self._wait()
        assert self.sent is not None
        copies, self.sent = self.sent[1], None
        return copies

    def _wait(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _send(self, i: int) -> None:
        if not 0 <= i < len(self.blocks):
            return
        copies = [torch.empty_like(home, device=self.device) for home in self.homes[i]]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            for there, home in zip(copies, self.homes[i], strict=True):
                self.copy(there, home.detach())
        self.sent = i, copies


def _places(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(a module, the name in it, what waits there), of all its modules."""
    for module in block.modules():
        weights = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in chain(weights, module.named_buffers(recurse=False, remove_duplicate=False)):
            if not tensor.requires_grad:
                yield module, name, tensor


def _as(home: Tensor, copy: Tensor) -> Tensor:
    return nn.Parameter(copy, requires_grad=False) if isinstance(home, nn.Parameter) else copy


@dataclass
class Recomputing:
    """Entered once for each backward pass over the same activations: a step in the backward pass has two."""

    visits: Visits

    def __enter__(self) -> None:
        self.visits.recomputing = True

    def __exit__(self, *_: object) -> None:
        self.visits.recomputing = False


def move(net: nn.Module, device: torch.device, *, besides: Sequence[nn.Module] = ()) -> None:
    """Does net.to(device), but the waiting tensors of the swapped blocks `besides` stay where they are."""
    stay = {id(tensor) for block in besides for tensor in waiting(block)}
    for tensor in chain(net.parameters(), net.buffers()):
        if id(tensor) not in stay:
            tensor.data = tensor.data.to(device)
