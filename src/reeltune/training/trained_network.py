"""The network that is trained: which of its weights learn, how it spares memory, and how processes share it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.state import Shared
from reeltune.config.recipe import Memory, Model
from reeltune.core.errors import refuse
from reeltune.distributed.engine import Engine
from reeltune.families.spec import Family, Parts
from reeltune.memory.blocks import blocks_of, offload_activations, recompute, swap
from reeltune.memory.levers import pulled_alone
from reeltune.optim.trainable import released_names, select


@dataclass(frozen=True)
class TrainedNetwork:
    """Ready for an optimizer. Parameters have our names in it, and the released ones in files and patterns."""

    family: Family
    config: dict[str, Any]  # its own config.json, as read
    plain: nn.Module  # as processes share it, without what wraps it in training
    names: dict[str, str]  # ours -> released
    shapes: dict[str, list[int]]  # by our names, of whole parameters
    groups: list[dict[str, Any]]  # for the optimizer: "params" that learn, and their "rate" over the learning rate
    swapped: list[nn.Module]  # blocks that wait in the CPU's memory

    @property
    def learning(self) -> list[nn.Parameter]:
        """What learns, in the optimizer's order."""
        return [parameter for group in self.groups for parameter in group["params"]]

    @property
    def counts(self) -> dict[str, int]:
        """Parameters, and how many of them learn."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        learning = [sizes[name] for name, weight in self.plain.named_parameters() if weight.requires_grad]
        return {"parameters": sum(sizes.values()), "trainable": sum(learning)}


def prepare_network(
    family: Family,
    parts: Parts,
    engine: Engine,
    model: Model,
    memory: Memory,
    *,
    gradient_checkpointing: bool,
    resumed_from: Path | None = None,
) -> TrainedNetwork:
    """Of `parts.net`, which is changed in place.

    resumed_from: the checkpoint that the run goes on from. One that several processes wrote is read here; of another
    the weights are in the network already. Raises UserError for patterns that match nothing, and for ways of sparing
    memory that several processes have not.
    """
    net = parts.net
    names = released_names(net, lambda state: family.to_released(state, parts.config))
    shapes = {name: list(weight.shape) for name, weight in net.named_parameters()}
    if resumed_from is not None and checkpoint.is_shared(resumed_from):
        Shared(resumed_from).fill_network(net, names)
    if engine.context > 1 and family.split is not None:
        family.split(net, engine.context_mesh())
    patterns = model.trainable_modules, model.trainable_modules_low_learning_rate
    select(net, names, *patterns)
    swapped = _spare_memory(net, family.blocks, engine, memory, gradient_checkpointing)
    plain = engine.shard(net, family.blocks, swapped=swapped)
    groups = select(plain, names, *patterns)  # again: sharded parameters are others
    return TrainedNetwork(family, parts.config, plain, names, shapes, groups, swapped)


def _spare_memory(
    net: nn.Module, block_names: tuple[str, ...], engine: Engine, memory: Memory, gradient_checkpointing: bool
) -> list[nn.Module]:
    """Returns the blocks that wait in the CPU's memory."""
    refuse(
        "recipe",
        [
            f"{name} is {getattr(memory, name)} and there are {engine.world} processes, which must have all "
            "gradients and weights on their devices at once; leave it out, or start one process"
            for name in pulled_alone(vars(memory))
            if engine.world > 1
        ],
    )
    blocks = blocks_of(net, block_names)
    swapped = swap(blocks, memory.blocks_to_swap, engine.device)
    if gradient_checkpointing:
        recompute([block for block in blocks if block not in swapped], memory.gradient_checkpointing_share)
    if memory.offload_activations:
        offload_activations(net)
    return swapped
