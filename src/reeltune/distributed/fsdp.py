"""Weights, gradients and optimizer state sharded over the processes: torch's fully_shard (FSDP, version 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from reeltune.core.errors import UserError, refuse

# Before 2.12 parameters of integers could not be sharded (https://github.com/pytorch/pytorch/pull/177948).
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


def shard(
    net: nn.Module,
    blocks: Sequence[str],
    *,
    device: torch.device,
    world: int,
    dtype: torch.dtype,
    keep_gathered: bool,
    offload: bool,
) -> None:
    """Shards every block of these class names, then the rest of `net`, in place; parameters become DTensors.

    keep_gathered: blocks stay gathered from the forward to the backward pass (torch's reshard_after_forward=False).
    Blocks are gathered in `dtype`, to which the network autocasts anyway, but for weights in 8 or 4 bits, which come as
    they are; the rest, and all gradients, in fp32. Raises UserError for a class name that the network has not.
    """
    known = sorted({type(module).__name__ for module in net.modules()})
    nearest = [name for name in known if name.endswith("Block")] or known
    refuse(
        "launch",
        [
            f"{name} is no class in this network, to wrap by; it has {', '.join(nearest)}"
            for name in blocks
            if name not in known
        ],
    )
    if OLD and not all(weight.is_floating_point() for weight in net.parameters()):
        raise UserError(
            "recipe",
            f"base_weights and engine fsdp need torch 2.12 or later, which shards integers, and this is "
            f"{torch.__version__}; use engine zero2, zero3 or ddp, or leave base_weights out",
        )
    mesh = init_device_mesh(device.type, (world,))
    offload_policy = CPUOffloadPolicy() if offload and device.type == "cuda" else OffloadPolicy()
    reshard = not keep_gathered
    cast = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in list(net.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=cast, offload_policy=offload_policy, reshard_after_forward=reshard)
    fully_shard(net, mesh=mesh, offload_policy=offload_policy, reshard_after_forward=reshard)
