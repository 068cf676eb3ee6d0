"""Steps of one checkpoint on fake tensors. What several of them have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune.config.recipe import Optimization, Parallel, Recipe, Training
from reeltune.core.types import Draw
from reeltune.estimate.fake_batch import empty_batch
from reeltune.estimate.fake_step import optimizer_step, passes
from reeltune.estimate.frozen_networks import Encoding, Work, decode, encode
from reeltune.estimate.result import PHASES, OptimizerEstimate, StepEstimate
from reeltune.families.spec import Parts
from reeltune.run.model import choose_family, encode_options, load_parts, network_dtype
from reeltune.run.precision import encoder_dtype
from reeltune.sampling.sample import Setup

T = TypeVar("T")


class Estimator:
    """For a recipe, and for others that have its checkpoint, train mode, precision and encoding options.

    whole: as of FakeLearner.
    """

    def __init__(self, recipe: Recipe, *, whole: bool = False):
        self.whole = whole
        self.family, self.mode, self.objective = choose_family(recipe)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[Any, Any] = {}

    def step(
        self, recipe: Recipe, draws: Sequence[Draw], captions: Sequence[str], *, preview: bool = True
    ) -> StepEstimate:
        """A micro-step of these draws, the optimizer's step after it, and with `preview` one of the first draw's shape.

        Draws of one shape are all alike. Raises UserError as loading does.
        """
        fake, whole, frozen, shape = self.fake, self.whole, as_frozen(recipe), draws[0].shape
        visiting = recipe.training.low_vram or recipe.cache.cache_folder is not None
        parts = self._once(("frozen networks", frozen), lambda: self._load(recipe, network=False))
        setup = Setup(self.family, self.mode, parts, self.objective, options=encode_options(recipe))

        def encoded() -> Encoding:
            clips = empty_batch(self.family, self.mode, draws, captions, fake)
            return encode(setup, clips, fake, visiting=visiting)

        encoding = self._once(("encoding", frozen, visiting, shape, len(draws)), encoded)
        network = self._once(
            ("network", network_dtype(recipe), recipe.adapter.base_weights), lambda: self._load(recipe, encoders=False)
        )
        trains, learns = only_passes(recipe), only_optimizer(recipe)
        step = self._once(
            ("passes", trains, preview, shape, len(draws)),
            lambda: passes(trains, setup, network, encoding, draws, fake, preview=preview, whole=whole),
        )
        optimizer = decoding = None
        if not recipe.memory.step_in_backward:
            optimizer = self._once(
                ("optimizer", learns, step.reached),
                lambda: optimizer_step(learns, self.family, network, step.reached, fake, whole=whole),
            )
        if preview:
            latents = encoding.encoded.x0.mean
            decoding = self._once(
                ("decoding", frozen, visiting, shape), lambda: decode(setup, latents, fake, visiting=visiting)
            )
        return together(recipe, step, optimizer, encoding, decoding)

    def _load(self, recipe: Recipe, *, encoders: bool = True, network: bool = True) -> Parts:
        device = torch.device("cpu")
        return load_parts(recipe, self.family, device, fake=self.fake, encoders=encoders, network=network)

    def _once(self, key: tuple, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def as_frozen(recipe: Recipe) -> tuple[Any, ...]:
    """What frozen networks read of a recipe beside what all of an Estimator's have."""
    return recipe.memory.vae_tiling, encoder_dtype(recipe)


def only_passes(recipe: Recipe) -> Recipe:
    """What the passes of the trained network read of a recipe; all else as it is by default."""
    return Recipe(
        model=replace(recipe.model, encoder_weights=None),
        adapter=recipe.adapter,
        training=replace(recipe.training, low_vram=False),
        memory=replace(recipe.memory, vae_tiling=False, encode_ahead=None),
        parallel=Parallel(context_parallel=recipe.parallel.context_parallel),
        loss=recipe.loss,
        optimization=recipe.optimization if recipe.memory.step_in_backward else Optimization(),
    )


def only_optimizer(recipe: Recipe) -> Recipe:
    """What the optimizer's step reads, where it is not in the backward pass."""
    return Recipe(
        model=replace(recipe.model, encoder_weights=None),
        adapter=recipe.adapter,
        training=Training(mixed_precision=recipe.training.mixed_precision),
        optimization=recipe.optimization,
    )


def together(
    recipe: Recipe,
    step: StepEstimate,
    optimizer: OptimizerEstimate | None,
    encoding: Encoding,
    decoding: Work | None,
) -> StepEstimate:
    """A step's passes with the optimizer's part, and what the frozen networks take before and after them.

    In each phase there is what later steps find: the optimizer's state, and under accumulation all gradients.
    """
    if optimizer is not None:
        step = replace(
            step,
            peaks=step.peaks | {"step": optimizer.peak},
            resident=step.resident | {"average": optimizer.average_bytes},
            state_bytes=optimizer.state_bytes,
        )
    resident = step.resident | {"optimizer": step.state_bytes}
    batch = {"batch": encoding.batch_bytes, "frozen": encoding.frozen_bytes}
    peaks = {phase: step.peaks[phase] | resident | batch for phase in PHASES if phase in step.peaks}
    flops = dict(step.flops)
    if recipe.cache.cache_folder is None:
        peaks = {"encode": resident | encoding.peak, **peaks}
        flops["encode"] = encoding.flops
    if decoding is not None:
        decoded = resident | batch | decoding.peak
        peaks["preview"] = max(peaks["preview"], decoded, key=lambda parts: sum(parts.values()))
        flops["preview"] += decoding.flops
    if recipe.training.gradient_accumulation_steps > 1:
        for phase in peaks.keys() & {"encode", "forward", "backward"}:
            peaks[phase]["gradients"] = step.gradient_bytes
    return replace(
        step,
        peaks=peaks,
        flops=flops,
        weight_bytes=step.weight_bytes | encoding.weight_bytes,
        encoded_bytes=encoding.clip_bytes,
    )
