"""The network that is trained: which of its weights learn, how it spares memory, and how processes share it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reeltune.adapters import saved
from reeltune.adapters.layers import groups as adapter_groups
from reeltune.adapters.principal import is_start
from reeltune.checkpoint.folder import ADAPTER, weights_in
from reeltune.config.recipe import Recipe
from reeltune.core.errors import refuse
from reeltune.distributed.engine import Engine
from reeltune.families.spec import Family, Parts
from reeltune.memory.attention import Attention
from reeltune.memory.blocks import blocks_of, offload_activations, recompute, spread, swap
from reeltune.memory.choices import pulled_alone
from reeltune.memory.compiled import Compiled
from reeltune.memory.kept import KEPT
from reeltune.optim.trainable import released_names, select
from reeltune.training.trained_adapter import TrainedAdapter, put_adapters, read_kept, take_principal_parts


@dataclass(frozen=True)
class TrainedNetwork:
    """The network to train, ready for an optimizer. Its parameters have our names; files and patterns released ones."""

    family: Family
    config: dict[str, Any]  # its own config.json, as read
    plain: nn.Module  # as processes share it, without what wraps it in training
    names: dict[str, str]  # ours -> released
    shapes: dict[str, list[int]]  # by our names, of whole parameters
    groups: list[dict[str, Any]]  # for the optimizer: "params" that learn, and their "rate" over the learning rate
    swapped: list[nn.Module]  # blocks that wait in the CPU's memory
    attention: Attention  # of its blocks
    adapter: TrainedAdapter | None = None  # what learns in place of the network's own weights
    compiled: Compiled | None = None  # its blocks, where the recipe asks for that

    @property
    def learning(self) -> list[nn.Parameter]:
        """What learns, in the optimizer's order."""
        return [parameter for group in self.groups for parameter in group["params"]]

    @cached_property
    def kept(self) -> dict[str, str]:
        """Our name -> released name of the weights that a checkpoint keeps: all of them, or with an adapter what learns
        and, for PiSSA, what that began with."""
        if self.adapter is None:
            return self.names
        return {
            name: self.names[name]
            for name, weight in self.plain.named_parameters()
            if weight.requires_grad or is_start(self.names[name])
        }

    @property
    def folder(self) -> str:
        """The folder in a checkpoint that holds the weights."""
        return "transformer" if self.adapter is None else ADAPTER

    def weights_in(self, checkpoint: Path) -> Path:
        """Where a checkpoint, or the part of one that is this network's, has the weights."""
        return weights_in(checkpoint) if self.adapter is None else checkpoint / ADAPTER

    def weights(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps, by our names: not copies, so training goes on changing them."""
        state = self.plain.state_dict()
        return state if self.adapter is None else {name: state[name] for name in self.kept}

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes weights, given by our names, under released names. For meta tensors, only the files beside them."""
        if self.adapter is None:
            self.family.save(folder, weights, self.config)
            return
        released = {self.kept[name]: weight for name, weight in weights.items()}
        saved.write(folder, released, self.adapter.alphas, self.adapter.about)

    @property
    def notices(self) -> list[str]:
        return [] if self.adapter is None else self.adapter.notices

    @property
    def summary(self) -> str:
        """What learns, in a line."""
        counts, layers = self.counts, 0 if self.adapter is None else len(self.adapter.alphas)
        what = "the network" if self.adapter is None else f"adapters of {layers} layers"
        share = counts["trainable"] / counts["parameters"]
        kept_bytes = sum(weight.nbytes for weight in self.learning)
        return (
            f"{what}: {counts['trainable']:,} of {counts['parameters']:,} parameters learn ({share:.2%}), "
            f"{kept_bytes / 2**20:,.1f} MiB here"
        )

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
    recipe: Recipe,
    *,
    resumed_from: Path | None = None,
) -> TrainedNetwork:
    """Prepares `parts.net`, in place: adapters, what learns, recomputed, swapped and compiled blocks, sharding.

    resumed_from: the checkpoint that the run goes on from. One that several processes wrote is read here; of any other
    the weights are in the network already. Raises UserError for patterns that match nothing, and for memory levers
    that several processes cannot use.
    """
    # torch's, once, of each RMSNorm whose weights are in fp32 and whose input autocast gives in bf16: as it is meant.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    net, model, wanted = parts.net, recipe.model, recipe.adapter
    names = released_names(net, lambda state: family.to_released(state, parts.config))
    adapter = None
    if wanted.rank:
        names, adapter = put_adapters(net, names, family, recipe, resumed=resumed_from is not None)
        learners = partial(adapter_groups, names=names, whole=wanted.train_whole, ratio=wanted.lora_plus_ratio)
    else:
        patterns = model.trainable_modules, model.trainable_modules_low_learning_rate
        learners = partial(select, names=names, patterns=patterns[0], low_rate_patterns=patterns[1])
    learners(net)
    shapes = {name: list(weight.shape) for name, weight in net.named_parameters()}
    if resumed_from is not None:
        read_kept(net, names, adapter, resumed_from)
    take_principal_parts(net, names, recipe, engine, resumed=resumed_from is not None)
    if engine.context > 1 and family.split is not None:
        family.split(net, engine.context_mesh())
    _refuse_alone(engine, recipe)
    compiled, attention, swapped = _prepare_blocks(net, family.blocks, engine, recipe)
    plain = engine.shard(net, family.blocks, swapped=swapped)
    groups = learners(plain)  # again: sharded parameters are others
    return TrainedNetwork(family, parts.config, plain, names, shapes, groups, swapped, attention, adapter, compiled)


def _refuse_alone(engine: Engine, recipe: Recipe) -> None:
    """Raises UserError for memory levers of one process alone, where there are several."""
    memory = recipe.memory
    refuse(
        "recipe",
        [
            f"{name} is {getattr(memory, name)} and there are {engine.world} processes, which must have all "
            "gradients and weights on their devices at once; leave it out, or start one process"
            for name in pulled_alone(vars(memory))
            if engine.world > 1
        ],
    )


def _prepare_blocks(
    net: nn.Module, block_names: tuple[str, ...], engine: Engine, recipe: Recipe
) -> tuple[Compiled | None, Attention, list[nn.Module]]:
    """Returns the compiled blocks, all blocks' attention, and the blocks that wait in the CPU's memory."""
    memory, training = recipe.memory, recipe.training
    recomputed = training.gradient_checkpointing
    keep = KEPT[recomputed] if isinstance(recomputed, str) else None
    blocks = blocks_of(net, block_names)
    compiled = Compiled(blocks, again=memory.step_in_backward) if training.compile == "blocks" else None
    attention = Attention(blocks, training.attention, compiled)
    swapped = swap(blocks, memory.blocks_to_swap, engine.device)
    others = [block for block in blocks if block not in swapped]
    chosen = spread(others, memory.gradient_checkpointing_share) if recomputed else []
    if compiled is not None and keep is not None:
        compiled.keep(chosen, keep)
    else:
        recompute(chosen, keep=keep)
    if memory.offload_activations:
        offload_activations(net)
    return compiled, attention, swapped
