"""A training step, run by the very code that trains, on fake tensors: they have sizes and no values."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from reeltune.config.recipe import Recipe
from reeltune.core.types import Draw, Encoded
from reeltune.diffusion.loss import settle
from reeltune.distributed.engine import Engine
from reeltune.estimate import attribution, repeated_blocks
from reeltune.estimate.fake_batch import first_of
from reeltune.estimate.frozen_networks import Encoding
from reeltune.estimate.gpu_kernels import compute_as_gpu, step_as_gpu
from reeltune.estimate.memory_tracker import ELSEWHERE, HOST, Tracker, tensors_in, weights_of
from reeltune.estimate.repeated_blocks import Stand
from reeltune.estimate.result import StepEstimate
from reeltune.families.spec import Family, Parts
from reeltune.memory import attention
from reeltune.memory.blocks import blocks_of, can_wait, waiting
from reeltune.memory.size import size_bytes
from reeltune.sampling.sample import Setup, at_rest
from reeltune.training.learner import Learner, with_optimizer
from reeltune.training.loss import training_loss
from reeltune.training.trained_network import TrainedNetwork, prepare_network

RESIDENT = ("weights", "still", "average", "optimizer")  # parts that are there in every phase


def training_step(
    recipe: Recipe,
    setup: Setup,
    network: Parts,
    encoding: Encoding,
    draws: Sequence[Draw],
    fake: FakeTensorMode,
    *,
    preview: bool,
    on_cpu: bool,
) -> StepEstimate:
    """The memory and work of a step on an encoded batch, and with `preview` of a denoising pass. Frozen networks and
    the batch itself are not counted.

    on_cpu: by a CPU's kernels, and not by a GPU's.

    Raises UserError as a run does that prepares it.
    """
    inside, encoded = recipe.memory.step_in_backward, encoding.encoded
    engine = Engine(recipe.training.mixed_precision, on_cpu=True)
    tracker = Tracker(fake)

    def step(count: int) -> None:
        learner.step(count, recipe.optimization.learning_rate)
        attribution.own_state(tracker, learner)

    with first_of(recipe.parallel.context_parallel) as mesh:
        learner, stands, counts = prepare(recipe, setup.family, network, engine, mesh, fake, on_cpu=on_cpu)
        if recipe.memory.offload_activations:
            attribution.offload_activations(learner.plain, tracker)
        attribution.own_network(tracker, learner, stands)
        tracker.own([*encoded.tensors().values(), *encoding.null.values()], ELSEWHERE)
        setup = replace(
            setup,
            parts=replace(network, net=learner.plain, null=encoding.null),
            objective=copy(setup.objective),  # which makes its tables anew
            autocast=engine.autocast,
        )
        loss_of = partial(training_loss, setup, learner.net, encoded, draws, recipe.loss)
        with tracker, repeated_blocks.counted(stands, tracker):
            if inside:  # its state is made weight by weight, and is there in later steps
                learner.backward(loss_of().value, last=True)
                step(0)
            with tracker.phase("forward"):
                loss = loss_of()
            tracker.own(tensors_in(vars(setup.objective)), ELSEWHERE)  # its tables, made once
            saved, offloaded = tracker.live["forward"] + tracker.live["casts"], tracker.live[HOST]
            tracker.rename("forward", "activations")
            with tracker.phase("backward"), attribution.gradients_owned(tracker, learner.learning):
                learner.backward(loss.value / recipe.training.gradient_accumulation_steps, last=True)
            gradients = tracker.live["gradients"]
            if not inside:  # the first step makes the state; the second, of as many gradients, is counted
                del loss
                reached = [weight for weight in learner.learning if weight.grad is not None]
                step(0)
                attribution.give_gradients(tracker, reached)
            with tracker.phase("step"):
                step(1)
            if inside:
                tracker.flops["backward"] = tracker.flops.pop("step")
            if preview:
                with tracker.phase("preview"):
                    denoise(learner.plain, setup, encoded)
    return StepEstimate(
        peaks=tracker.peaks,
        flops=dict(tracker.flops),
        resident={part: tracker.live[part] for part in RESIDENT},
        number_bytes=engine.dtype.itemsize,
        saved_bytes=saved,
        offloaded_bytes=offloaded,
        gradient_bytes=gradients,
        **counts,
    )


def prepare(
    recipe: Recipe,
    family: Family,
    network: Parts,
    engine: Engine,
    mesh: DeviceMesh | None,
    fake: FakeTensorMode,
    *,
    on_cpu: bool,
) -> tuple[Learner, list[Stand], dict[str, Any]]:
    """(what learns, in a copy of the network with few of its equal blocks; which of them stand for more; as counts_of).

    mesh: as of `first_of`. on_cpu: as of `training_step`.
    """
    parts, training = replace(network, net=fresh(network.net)), recipe.training
    if mesh is not None and family.split is not None:
        family.split(parts.net, mesh)
    prepared = prepare_network(family, parts, engine, as_here(recipe))
    counts = counts_of(prepared, engine.dtype.itemsize)
    if not on_cpu:
        compute_as_gpu(prepared.plain)
    stands = repeated_blocks.shorten(prepared.plain, family.blocks, swapped=bool(prepared.swapped))
    batch, accumulate = training.train_batch_size, training.gradient_accumulation_steps
    learner = with_optimizer(as_counted(prepared, fake), recipe, engine, batch=batch, accumulate=accumulate)
    if not on_cpu:
        step_as_gpu(learner.optimizer)
    return learner, stands, counts


def as_here(recipe: Recipe) -> Recipe:
    """Offloading is the tracker's to count. A GPU's fused kernels of attention keep what the CPU's keeps; `math` more.
    Compiled blocks are counted uncompiled: what torch's compiler keeps is its own choice, and is not more."""
    memory, training = replace(recipe.memory, offload_activations=False), replace(recipe.training, compile="none")
    if training.attention != "math":
        training = replace(training, attention=attention.AUTO)
    return replace(recipe, memory=memory, training=training)


def denoise(net: nn.Module, setup: Setup, encoded: Encoded) -> None:
    """One pass for one clip."""
    one = encoded.map(lambda tensor: tensor[:1])
    with at_rest(net):
        x0, cond = settle(one, [0], setup.parts.null)
        setup.denoise(net, x0, torch.ones(1, device=x0.device), cond)


def fresh(net: nn.Module) -> nn.Module:
    """A copy, whose weights are there but once."""
    memo: dict[int, Any] = {id(weight): nn.Parameter(weight.detach(), False) for weight in net.parameters()}
    return deepcopy(net, memo | {id(buffer): buffer.detach() for buffer in net.buffers()})


def counts_of(network: TrainedNetwork, number_bytes: int) -> dict[str, Any]:
    """Fields of StepEstimate that say what the network is. number_bytes: as there."""
    counts, blocks = network.counts, blocks_of(network.plain, network.family.blocks)
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in blocks]
    largest = blocks[sizes.index(max(sizes))]
    return {
        **counts,
        "block_parameters": max(sizes),
        "block_bytes": sum(
            weight.numel() * (number_bytes if weight.is_floating_point() else weight.itemsize)
            for weight in largest.parameters()
        ),
        "other_parameters": counts["parameters"] - sum(sizes),
        "buffer_bytes": size_bytes(list(network.plain.buffers())),
        "blocks": len(blocks),
        "still_blocks": sum(map(can_wait, blocks)),
        "swapped_bytes": size_bytes([waiting(block) for block in network.swapped]),
        "kept_bytes": size_bytes(network.weights()),
        "weight_bytes": {"network": size_bytes(weights_of(network.plain))},
    }


def as_counted(network: TrainedNetwork, fake: FakeTensorMode) -> TrainedNetwork:
    """The network without the weights of blocks that were taken out of it, and with fake tensors in the place of those
    that were made beside what is loaded: adapters."""
    there: dict[int, nn.Parameter] = {}
    with fake:
        for weight in network.plain.parameters():
            is_fake = isinstance(weight, FakeTensor)
            there[id(weight)] = weight if is_fake else nn.Parameter(torch.empty_like(weight), weight.requires_grad)
    for module in network.plain.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, there[id(weight)])
    groups = [
        {**group, "params": [there[id(weight)] for weight in group["params"] if id(weight) in there]}
        for group in network.groups
    ]
    return replace(network, groups=[group for group in groups if group["params"]])
