"""Steps of one checkpoint on fake tensors. What several of them have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune.config.recipe import Parallel, Recipe
from reeltune.core.types import Draw
from reeltune.estimate.fake_batch import empty_batch
from reeltune.estimate.fake_step import training_step
from reeltune.estimate.frozen_networks import Encoding, decode, encode
from reeltune.estimate.memory_tracker import Work, fuller
from reeltune.estimate.result import PHASES, StepEstimate
from reeltune.families.spec import learning
from reeltune.run.experts import of_expert
from reeltune.run.model import choose_family, encode_options, load_parts, network_dtype
from reeltune.run.precision import encoder_dtype
from reeltune.sampling.sample import Setup

T = TypeVar("T")


class Estimator:
    """Estimates steps of a recipe, and of others that have its checkpoint, train mode, precision and encoding
    options.

    on_cpu: as a CPU trains, whose kernels keep other activations than a GPU's.
    """

    def __init__(self, recipe: Recipe, *, on_cpu: bool = False):
        self.family, self.mode, self.objective = choose_family(recipe)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.on_cpu = on_cpu
        self._known: dict[Any, Any] = {}

    def step(
        self, recipe: Recipe, draws: Sequence[Draw], captions: Sequence[str], *, preview: bool = True
    ) -> StepEstimate:
        """A micro-step of these draws, the optimizer's step after it, and with `preview` one of the first draw's shape.

        Draws of one shape are all alike. Raises UserError as loading does.
        """
        family, fake, once = learning(self.family)[0], self.fake, self._once  # two that learn are of the same sizes
        recipe = as_counted_here(of_expert(recipe, family.expert))
        shape, sized = draws[0].shape, (draws[0].shape, len(draws))
        load = partial(load_parts, recipe, family, torch.device("cpu"), fake=fake)
        visiting = recipe.training.low_vram or recipe.cache.cache_folder is not None
        frozen = recipe.memory.vae_tiling, encoder_dtype(recipe)
        parts = replace(once(("frozen", frozen), lambda: load(network=False)), low_vram=visiting)
        setup = Setup(family, self.mode, parts, self.objective, options=encode_options(recipe))
        encoding = once(
            ("encode", frozen, recipe.training.vae_mini_batch, visiting, sized),
            lambda: encode(setup, empty_batch(family, self.mode, draws, captions, fake), fake),
        )
        based = network_dtype(recipe), recipe.adapter.base_weights
        network = once(("network", based), lambda: load(encoders=False))
        trains = only_training(recipe)
        step = once(
            ("step", trains, preview, sized),
            lambda: training_step(trains, setup, network, encoding, draws, fake, preview=preview, on_cpu=self.on_cpu),
        )
        decoding = None
        if preview:
            x0_BCThw = encoding.encoded.x0.mean
            decoding = once(("decode", frozen, visiting, shape), lambda: decode(setup, x0_BCThw, fake))
        return together(recipe, step, encoding, decoding)

    def _once(self, key: tuple, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def as_counted_here(recipe: Recipe) -> Recipe:
    """fp16 is counted as bf16, of the same bytes: the CPU, by whose kernels fake tensors go, mixes the two up."""
    if recipe.training.mixed_precision != "fp16":
        return recipe
    return replace(recipe, training=replace(recipe.training, mixed_precision="bf16"))


def only_training(recipe: Recipe) -> Recipe:
    """What a step of the trained network reads of a recipe; all else as it is by default."""
    return Recipe(
        model=replace(recipe.model, encoder_weights=None),
        adapter=recipe.adapter,
        training=replace(recipe.training, low_vram=False, vae_mini_batch=0),
        memory=replace(recipe.memory, vae_tiling=False, encode_ahead=None),
        parallel=Parallel(context_parallel=recipe.parallel.context_parallel),
        loss=recipe.loss,
        optimization=recipe.optimization,
    )


def together(recipe: Recipe, step: StepEstimate, encoding: Encoding, decoding: Work | None) -> StepEstimate:
    """A step with what the frozen networks take before and after it.

    In each phase there is what later steps find: the optimizer's state, and under accumulation all gradients.
    """
    beside = step.resident | encoding.left
    peaks = {phase: step.peaks[phase] | beside for phase in PHASES if phase in step.peaks}
    flops = dict(step.flops)
    if recipe.cache.cache_folder is None:
        peaks = {"encode": step.resident | encoding.work.peak, **peaks}
        flops["encode"] = encoding.work.flops
    if decoding is not None:
        peaks["preview"] = fuller(peaks["preview"], beside | decoding.peak)
        flops["preview"] += decoding.flops
    if recipe.training.gradient_accumulation_steps > 1:
        for phase in peaks.keys() & {"encode", "forward", "backward"}:
            peaks[phase]["gradients"] = step.gradient_bytes
    weight_bytes = step.weight_bytes | encoding.weight_bytes
    return replace(step, peaks=peaks, flops=flops, weight_bytes=weight_bytes, encoded_bytes=encoding.clip_bytes)
