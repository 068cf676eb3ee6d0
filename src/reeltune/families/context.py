"""Each clip's tokens sharded over several processes (context parallelism), by diffusers' hooks.

Attention gathers all tokens for a part of the heads each (Ulysses, https://arxiv.org/abs/2309.14509). All processes
get the whole answer, but each only its part of the gradients: those of a clip's processes must be added up.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from reeltune.core.errors import UserError

NORMS = "norm_q", "norm_k", "norm_added_q", "norm_added_k"  # of queries and keys, in diffusers' attention


def split(net: nn.Module, mesh: DeviceMesh, plan: dict[str, Any]) -> None:
    """Shards a network's tokens over the processes of a clip. plan: module -> what of its inputs and outputs is sharded
    or gathered, as diffusers' `_cp_plan` says it.

    Raises UserError if the heads cannot be shared evenly.
    """
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    network: Any = net  # diffusers', with its config
    count, heads = mesh["ulysses"].size(), network.config.num_attention_heads
    if heads % count:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            "recipe", f"context_parallel is {count}, but the network has {heads} attention heads; use one of {fits}"
        )
    config = ContextParallelConfig(ulysses_degree=count, mesh=mesh)
    # As net.enable_parallelism does, which takes a place modulo the number of GPUs and fails where that is 0 (0.42).
    config.setup(dist.get_rank(), dist.get_world_size(), next(net.parameters()).device, mesh)
    whole = ParallelConfig(context_parallel_config=config)
    for module in net.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = whole
        for norm in (getattr(module, name, None) for name in NORMS):
            if isinstance(norm, nn.Module):
                norm.register_forward_hook(_as_given)
    apply_context_parallel(net, config, plan)


def _as_given(_: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
    """In the precision that values have too: in that of fp32 weights attention over several processes has no gradient
    beneath autocast (diffusers 0.42)."""
    return answer.to(given[0].dtype)
