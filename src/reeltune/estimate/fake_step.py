"""One training step, run by the very code that trains, on tensors that have sizes and no values."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from itertools import compress

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reeltune.config.recipe import Recipe
from reeltune.core.types import Draw, Encoded
from reeltune.diffusion.loss import Loss, diffusion_loss, settle
from reeltune.distributed.engine import Engine
from reeltune.estimate import repeated_blocks
from reeltune.estimate.attribution import (
    give_gradients,
    gradients_owned,
    host_apart,
    own_state,
    own_what_is_there,
    tensors_in,
)
from reeltune.estimate.fakes import (
    counts_of,
    empty_batch,
    first_of,
    one_of,
    renewed,
    still_matching,
    tensors_of,
    weights_of,
)
from reeltune.estimate.memory_tracker import ELSEWHERE, HOST, Tracker
from reeltune.estimate.result import Rehearsal
from reeltune.families import weights
from reeltune.memory.lever import ALL, TRAINED
from reeltune.memory.size import size_bytes
from reeltune.run.model import choose_family, encode_options, load_parts
from reeltune.sampling.sample import Setup, at_rest
from reeltune.training.learner import Learner

RESIDENT = ("weights", "still", "average", "frozen", "batch")  # parts that are there in every phase


def rehearse(
    recipe: Recipe,
    draws: Sequence[Draw],
    captions: Sequence[str],
    *,
    phases: Set[str] = ALL,
    like: Rehearsal | None = None,
    whole: bool = False,
) -> Rehearsal:
    """A micro-step of these draws, and the optimizer's step after it; then a preview of the first draw's shape.

    phases: those that are run; all others are as in `like`, a rehearsal of the same run, but for what is there all the
    time. Without `like` only "preview" can be left out. whole: with each of equal blocks, which takes long and comes
    to the same (forecast/repeated_blocks.py). Raises UserError as loading does.
    """
    asked = recipe.training.mixed_precision
    engine = Engine("bf16" if asked == "fp16" else asked, on_cpu=True)  # the CPU has no fp16
    with one_of(recipe.parallel.context_parallel) as mesh:
        return _rehearse(engine, mesh, recipe, draws, captions, phases, like, whole)


def _rehearse(
    engine: Engine,
    mesh: DeviceMesh | None,
    recipe: Recipe,
    draws: Sequence[Draw],
    captions: Sequence[str],
    phases: Set[str],
    like: Rehearsal | None,
    whole: bool,
) -> Rehearsal:
    family, mode, objective = choose_family(recipe)
    training = recipe.training
    with weights.unread() as stand_ins:
        recipe = replace(recipe, training=replace(training, low_vram=False))
        parts = load_parts(recipe, family, engine.device)
        batch = empty_batch(family, mode, draws, captions, stand_ins)
    counts = counts_of(family, parts, recipe.model)
    alike = not recipe.memory.blocks_to_swap and recipe.memory.gradient_checkpointing_share == 1
    stands = repeated_blocks.shorten(parts.net, family.blocks) if alike and not whole else []
    times = repeated_blocks.times_of(stands)
    if mesh is not None and family.split is not None:
        family.split(parts.net, mesh)
    setup = Setup(family, mode, parts, objective, engine.autocast, encode_options(recipe))
    learner = Learner(
        family,
        parts,
        engine,
        still_matching(recipe.model, parts.net, counts.names),
        recipe.optimization,
        recipe.memory,
        seed=training.seed,
        gradient_checkpointing=training.gradient_checkpointing,
        batch=len(draws),
        accumulate=training.gradient_accumulation_steps,
    )
    in_backward = recipe.memory.step_in_backward
    if in_backward and phases & (TRAINED | {"step"}):
        phases = phases | TRAINED | {"step"}
    seeds, strata = batch.seeds, [draw.stratum for draw in draws]

    def forward_pass() -> Loss:
        return diffusion_loss(
            family.denoise,
            learner.net,
            objective,
            encoded,
            parts.null,
            seeds,
            strata,
            motion_sub_loss_ratio=recipe.loss.motion_sub_loss_ratio if recipe.loss.motion_sub_loss else None,
            loss_outlier_threshold=recipe.loss.loss_outlier_threshold,
        )

    tracker = Tracker(stand_ins)
    cached = recipe.cache.cache_folder is not None
    own_what_is_there(tracker, parts, learner, batch, times, visiting=training.low_vram or cached)
    if "encode" not in phases:
        assert like is not None
        encoded = renewed(like.encoded, stand_ins)
    elif cached:
        encoded = setup.encode(batch)  # on another day
    if "encode" not in phases or cached:
        tracker.own(tensors_of(encoded), "batch")
    with tracker, host_apart(tracker), repeated_blocks.counted(stands, tracker):
        if "encode" in phases and not cached:
            with tracker.phase("encode"):
                encoded = setup.encode(batch)
        tracker.rename("encode", "batch")
        resident = {part: tracker.live[part] for part in RESIDENT}
        if in_backward and "step" in phases:  # its state is made bit by bit, and is there in later steps
            learner.backward(forward_pass().value, last=True)
            learner.step(0, recipe.optimization.learning_rate)
            own_state(tracker, learner, times)
        if "forward" in phases:
            with tracker.phase("forward"):
                loss = forward_pass()
            tracker.own(tensors_in(dict(vars(objective))), ELSEWHERE)  # its tables, made once
            saved_bytes, offloaded_bytes = tracker.live["forward"] + tracker.live["casts"], tracker.live[HOST]
            tracker.rename("forward", "activations")
            with tracker.phase("backward"), gradients_owned(tracker, learner.learning, times):
                learner.backward(loss.value / training.gradient_accumulation_steps, last=True)
            gradient_bytes = tracker.live["gradients"]
            reached = tuple(parameter.grad is not None for parameter in learner.learning)
            del loss
        else:
            assert like is not None
            saved_bytes, offloaded_bytes = like.saved_bytes, like.offloaded_bytes
            gradient_bytes, reached = like.gradient_bytes, like.reached
        del batch
        if "step" in phases:
            with_gradients = [*compress(learner.learning, reached)]
            if not in_backward:  # the first step makes the state, which later ones find
                give_gradients(with_gradients, tracker, times, stand_ins)
                learner.step(0, recipe.optimization.learning_rate)
                own_state(tracker, learner, times)
                give_gradients(with_gradients, tracker, times, stand_ins)
            with tracker.phase("step"):
                learner.step(1, recipe.optimization.learning_rate)
            own_state(tracker, learner, times)
            state_bytes = tracker.live["optimizer"]
        else:
            assert like is not None
            state_bytes = like.state_bytes
        if "preview" in phases:
            with tracker.phase("preview"):
                one_pass(setup, learner.plain, encoded)
    peaks = tracker.peaks
    if like is not None:
        peaks |= {phase: like.peaks[phase] | resident for phase in like.peaks.keys() - phases - {"encode"}}
        if "encode" in like.peaks.keys() - phases:
            peaks["encode"] = like.peaks["encode"] | {**resident, "batch": like.peaks["encode"].get("batch", 0)}
    for phase in peaks:  # later steps find it there
        peaks[phase]["optimizer"] = state_bytes
    if training.gradient_accumulation_steps > 1:  # later micro-steps find the gradients of those before
        for phase in ("encode", "forward", "backward"):
            if phase in peaks:
                peaks[phase]["gradients"] = gradient_bytes
    if in_backward and "step" in phases:
        tracker.flops["backward"] = tracker.flops.pop("step")
    sizes = {name: size_bytes(weights_of(module)) for name, module in parts.frozen.items()}
    return Rehearsal(
        peaks=peaks,
        flops={**(like.flops if like is not None else {}), **tracker.flops},
        saved_bytes=saved_bytes,
        gradient_bytes=gradient_bytes,
        state_bytes=state_bytes,
        offloaded_bytes=offloaded_bytes,
        swapped_bytes=sum(size_bytes(weights_of(block)) for block in learner.swapped),
        parameters=counts.parameters,
        trainable=counts.trainable,
        number_bytes=engine.dtype.itemsize,
        weight_bytes={"network": counts.network_bytes, **sizes},
        block_parameters=counts.block_parameters,
        still_blocks=counts.still_blocks,
        other_parameters=counts.other_parameters,
        encoded_bytes=size_bytes(tensors_of(encoded)) // len(draws),
        reached=reached,
        encoded=encoded,
    )


def one_pass(setup: Setup, net: nn.Module, encoded: Encoded) -> None:
    """A preview's heaviest moments: one denoising pass of one clip, and decoding it."""
    one = first_of(encoded)
    with at_rest(net):
        x0, cond = settle(one, [0], setup.parts.null)
        x0 = setup.denoise(net, x0, torch.ones(1, device=x0.device), cond)
        del cond
        setup.family.decode(setup.parts, x0)
