"""A network's blocks, some of which recompute their activations or wait in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from reeltune.core.errors import UserError

LEAST_BYTES = 2**20  # of an activation that is worth a journey to the CPU's memory


def blocks_of(net: nn.Module, classes: tuple[str, ...]) -> list[nn.Module]:
    """Modules of these class names, in the order in which they were made."""
    return [module for module in net.modules() if type(module).__name__ in classes]


def recompute(blocks: Sequence[nn.Module], share: float = 1.0) -> None:
    """Gradient checkpointing: that share of the blocks, evenly spread, recompute activations in the backward pass."""
    count = round(share * len(blocks))
    for i in range(count):
        block = blocks[i * len(blocks) // count]
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# ---- what waits in the CPU's memory


def to_host(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory; page-locked if it comes from a GPU, which then need not be waited for."""
    on_gpu = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
    return copy.copy_(tensor, non_blocking=on_gpu)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def offload_activations(
    net: nn.Module,
    *,
    to_host: Callable[[Tensor], Tensor] = to_host,
    to_device: Callable[[Tensor, torch.device], Tensor] = to_device,
) -> None:
    """What its forward pass keeps for the backward pass waits in the CPU's memory: all tensors of LEAST_BYTES or more
    but the weights, which are on the device anyway."""
    passes: list[saved_tensors_hooks] = []

    def begins(_: nn.Module, _given: Any) -> None:
        storages = [weight.untyped_storage() for weight in net.parameters()]
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


def swap(blocks: Sequence[nn.Module], count: int, device: torch.device) -> list[nn.Module]:
    """`count` of the blocks of which nothing learns, evenly spread, wait in the CPU's memory; `move` can leave them
    there.

    Each comes to the device for its forward pass, and again in the backward pass, where it recomputes its activations.
    Returns them. Raises UserError if there are fewer.
    """
    still = [block for block in blocks if not any(weight.requires_grad for weight in block.parameters())]
    if count > len(still):
        raise UserError(
            "recipe",
            f"blocks_to_swap is {count}, but of the network's {len(blocks)} blocks {len(still)} do not learn; set it "
            f"to {len(still)} or less, or name fewer parts in trainable_modules",
        )
    chosen = [still[i * len(still) // count] for i in range(count)]
    for block in chosen:
        _swap_one(block, device)
    return chosen


def _swap_one(block: nn.Module, device: torch.device) -> None:
    weights = list(chain(block.parameters(), block.buffers()))
    for weight in weights:
        weight.data = weight.data if device.type == "cpu" else weight.data.cpu().pin_memory()
    forward = block.forward

    def visit(*given: Any, **named: Any) -> Any:
        with visiting(weights, device):
            return forward(*given, **named)

    block.forward = partial(checkpoint, visit, use_reentrant=False)


def move(net: nn.Module, device: torch.device, *, besides: Sequence[nn.Module] = ()) -> None:
    """As net.to(device), but these of its blocks stay where they are."""
    stay = {id(module) for block in besides for module in block.modules()}
    for module in net.modules():
        if id(module) not in stay:
            for tensor in chain(module.parameters(recurse=False), module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


@contextmanager
def visiting(weights: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """On the device, as copies, inside; what the backward pass needs of those it keeps itself."""
    homes = [weight.data for weight in weights]
    for weight, home in zip(weights, homes, strict=True):
        weight.data = home.to(device, non_blocking=True, copy=True)
    try:
        yield
    finally:
        for weight, home in zip(weights, homes, strict=True):
            weight.data = home
