"""One training step, run by the very code that trains, on fake tensors: they have sizes and no values."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from reeltune.config.recipe import Model, Recipe
from reeltune.core.types import Draw
from reeltune.diffusion.loss import Loss, settle
from reeltune.distributed.engine import Engine
from reeltune.estimate import attribution, repeated_blocks
from reeltune.estimate.attribution import (
    Times,
    give_gradients,
    gradients_owned,
    own_network,
    own_state,
    tensors_in,
    weights_of,
)
from reeltune.estimate.fake_batch import first_of
from reeltune.estimate.frozen_networks import Encoding
from reeltune.estimate.memory_tracker import ELSEWHERE, HOST, Tracker
from reeltune.estimate.result import StepEstimate
from reeltune.memory.blocks import blocks_of, can_wait, waiting
from reeltune.memory.size import size_bytes
from reeltune.optim.trainable import matches, released_names, select
from reeltune.run.model import load_parts
from reeltune.sampling.sample import Setup, at_rest
from reeltune.training.learner import learner_of
from reeltune.training.loss import training_loss

RESIDENT = ("weights", "still", "average")  # parts that are there in every phase


def engine_of(recipe: Recipe) -> Engine:
    asked = recipe.training.mixed_precision
    return Engine("bf16" if asked == "fp16" else asked, on_cpu=True)  # the CPU has no fp16


def training_step(
    recipe: Recipe,
    setup: Setup,
    encoding: Encoding,
    draws: Sequence[Draw],
    fake: FakeTensorMode,
    *,
    preview: bool = True,
    whole: bool = False,
) -> StepEstimate:
    """Forward and backward pass of an encoded batch, the optimizer's step, and with `preview` a denoising pass.

    Frozen networks and the batch itself are not counted. setup: as for encoding; its network is loaded anew. whole:
    with each of equal blocks, which takes long and comes to the same (repeated_blocks.py). Raises UserError as loading
    does.
    """
    engine = engine_of(recipe)
    with first_of(recipe.parallel.context_parallel) as mesh:
        step = _FakeStep(recipe, setup, encoding, draws, fake, engine, mesh, whole=whole)
        with step.tracker, repeated_blocks.counted(step.stands, step.tracker):
            return step.run(preview=preview)


class _FakeStep:
    def __init__(
        self,
        recipe: Recipe,
        setup: Setup,
        encoding: Encoding,
        draws: Sequence[Draw],
        fake: FakeTensorMode,
        engine: Engine,
        mesh: DeviceMesh | None,
        *,
        whole: bool,
    ):
        self.recipe, self.draws, self.fake, self.encoded = recipe, draws, fake, encoding.encoded
        family, memory = setup.family, recipe.memory
        parts = load_parts(recipe, family, engine.device, encoders=False, fake=fake)
        parts.null = encoding.null
        names = released_names(parts.net, lambda state: family.to_released(state, parts.config))
        model = recipe.model
        select(parts.net, names, model.trainable_modules, model.trainable_modules_low_learning_rate)
        self.counts = counts_of(parts.net, family.blocks)
        self.network_bytes = size_bytes(weights_of(parts.net))
        alike = not memory.blocks_to_swap and memory.gradient_checkpointing_share == 1
        self.stands = repeated_blocks.shorten(parts.net, family.blocks) if alike and not whole else []
        self.times: Times = repeated_blocks.times_of(self.stands)
        if mesh is not None and family.split is not None:
            family.split(parts.net, mesh)
        self.tracker = Tracker(fake)
        if memory.offload_activations:
            attribution.offload_activations(parts.net, self.tracker)
        objective = copy(setup.objective)  # which makes its tables anew
        self.setup = replace(setup, parts=parts, objective=objective, autocast=engine.autocast)
        self.learner = learner_of(
            replace(
                recipe,
                model=still_matching(model, parts.net, names),
                memory=replace(memory, offload_activations=False),
            ),
            family,
            parts,
            engine,
            batch=len(draws),
            accumulate=recipe.training.gradient_accumulation_steps,
        )
        own_network(self.tracker, self.learner, self.times)
        self.resident = {part: self.tracker.live[part] for part in RESIDENT}
        batch = [*encoding.encoded.tensors().values(), *encoding.null.values()]
        self.tracker.own(batch, ELSEWHERE)  # Encoding.batch_bytes has them

    def run(self, *, preview: bool) -> StepEstimate:
        tracker, learner = self.tracker, self.learner
        passes = self._forward_backward()
        reached = [parameter for parameter in learner.learning if parameter.grad is not None]
        self._optimizer_step(reached)
        if preview:
            with tracker.phase("preview"):
                self._denoise()
        if self.recipe.memory.step_in_backward:
            tracker.flops["backward"] = tracker.flops.pop("step")
        return StepEstimate(
            peaks=tracker.peaks,
            flops=dict(tracker.flops),
            resident=self.resident,
            state_bytes=tracker.live["optimizer"],
            swapped_bytes=size_bytes([waiting(block) for block in learner.network.swapped]),
            number_bytes=learner.engine.dtype.itemsize,
            weight_bytes={"network": self.network_bytes},
            **passes,
            **self.counts,
        )

    def _forward_backward(self) -> dict[str, int]:
        """Bytes that the forward pass keeps, on the device and on the host, and those of the gradients."""
        tracker, learner = self.tracker, self.learner
        if self.recipe.memory.step_in_backward:  # its state is made weight by weight, and is there in later steps
            learner.backward(self._loss().value, last=True)
            learner.step(0, self.recipe.optimization.learning_rate)
            own_state(tracker, learner, self.times)
        with tracker.phase("forward"):
            loss = self._loss()
        tracker.own(tensors_in(vars(self.setup.objective)), ELSEWHERE)  # its tables, made once
        kept = {"saved_bytes": tracker.live["forward"] + tracker.live["casts"], "offloaded_bytes": tracker.live[HOST]}
        tracker.rename("forward", "activations")
        with tracker.phase("backward"), gradients_owned(tracker, learner.learning, self.times):
            learner.backward(loss.value / self.recipe.training.gradient_accumulation_steps, last=True)
        return kept | {"gradient_bytes": tracker.live["gradients"]}

    def _loss(self) -> Loss:
        return training_loss(self.setup, self.learner.net, self.encoded, self.draws, self.recipe.loss)

    def _optimizer_step(self, reached: Sequence[nn.Parameter]) -> None:
        """reached: the parameters that a backward pass gives gradients."""
        rate = self.recipe.optimization.learning_rate
        if not self.recipe.memory.step_in_backward:  # the first step makes the state, which later ones find
            self.learner.step(0, rate)
            own_state(self.tracker, self.learner, self.times)
            give_gradients(reached, self.tracker, self.times, self.fake)
        with self.tracker.phase("step"):
            self.learner.step(1, rate)
        own_state(self.tracker, self.learner, self.times)

    def _denoise(self) -> None:
        """One pass for one clip."""
        setup, one = self.setup, self.encoded.map(lambda tensor: tensor[:1])
        with at_rest(self.learner.plain):
            x0, cond = settle(one, [0], setup.parts.null)
            setup.denoise(self.learner.plain, x0, torch.ones(1, device=x0.device), cond)


def counts_of(net: nn.Module, classes: tuple[str, ...]) -> dict[str, int]:
    """Parameters of a network and of its blocks, which are of these class names, once it is said what learns."""
    blocks = blocks_of(net, classes)
    parameters = sum(weight.numel() for weight in net.parameters())
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in blocks]
    return {
        "parameters": parameters,
        "trainable": sum(weight.numel() for weight in net.parameters() if weight.requires_grad),
        "block_parameters": max(sizes),
        "other_parameters": parameters - sum(sizes),
        "still_blocks": sum(map(can_wait, blocks)),
    }


def still_matching(model: Model, net: nn.Module, names: dict[str, str]) -> Model:
    """Without the patterns that match only blocks that were taken out."""
    left = [names[name] for name, _ in net.named_parameters()]

    def some(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one for one in patterns if any(matches(one, name) for name in left))

    low = some(model.trainable_modules_low_learning_rate)
    return replace(model, trainable_modules=some(model.trainable_modules), trainable_modules_low_learning_rate=low)
