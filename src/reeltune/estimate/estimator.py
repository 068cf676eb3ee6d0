"""Steps of one checkpoint on fake tensors. What several of them have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune.config.recipe import Parallel, Recipe
from reeltune.core.types import Draw
from reeltune.estimate.fake_batch import empty_batch
from reeltune.estimate.fake_step import engine_of, training_step
from reeltune.estimate.frozen_networks import Encoding, Work, decode, encode
from reeltune.estimate.result import StepEstimate
from reeltune.run.model import choose_family, encode_options, load_parts
from reeltune.run.precision import encoder_dtype
from reeltune.sampling.sample import Setup

T = TypeVar("T")


class Estimator:
    """For a recipe, and for others that have its checkpoint, train mode, precision and encoding options.

    whole: as for `training_step`.
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
        frozen, shape, batch = as_frozen(recipe), draws[0].shape, len(draws)
        visiting = recipe.training.low_vram or recipe.cache.cache_folder is not None
        setup = self._setup(recipe)

        def encoded() -> Encoding:
            clips = empty_batch(self.family, self.mode, draws, captions, self.fake)
            return encode(setup, clips, self.fake, visiting=visiting)

        encoding = self._once(("encoding", frozen, visiting, shape, batch), encoded)
        trains = only_training(recipe)
        step = self._once(
            ("training", trains, preview, shape, batch),
            lambda: training_step(trains, setup, encoding, draws, self.fake, preview=preview, whole=self.whole),
        )
        decoding = None
        if preview:
            decoding = self._once(
                ("decoding", frozen, visiting, shape),
                lambda: decode(setup, encoding.encoded.x0.mean, self.fake, visiting=visiting),
            )
        return together(recipe, step, encoding, decoding)

    def _setup(self, recipe: Recipe) -> Setup:
        """The frozen networks, with an outline of the trained one."""
        engine = engine_of(recipe)
        parts = self._once(
            ("parts", as_frozen(recipe)),
            lambda: load_parts(recipe, self.family, engine.device, network=False, fake=self.fake),
        )
        return Setup(self.family, self.mode, parts, self.objective, options=encode_options(recipe))

    def _once(self, key: tuple, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def as_frozen(recipe: Recipe) -> tuple[Any, ...]:
    """What frozen networks read of a recipe beside what all of an Estimator's have."""
    return recipe.memory.vae_tiling, encoder_dtype(recipe)


def only_training(recipe: Recipe) -> Recipe:
    """What the trained network's step reads of a recipe; all else as it is by default."""
    return Recipe(
        model=replace(recipe.model, encoder_weights=None),
        training=replace(recipe.training, low_vram=False),
        memory=replace(recipe.memory, vae_tiling=False, encode_ahead=None),
        parallel=Parallel(context_parallel=recipe.parallel.context_parallel),
        loss=recipe.loss,
        optimization=recipe.optimization,
    )


def together(recipe: Recipe, step: StepEstimate, encoding: Encoding, decoding: Work | None) -> StepEstimate:
    """A training step with what the frozen networks take before and after it.

    In each phase there is what later steps find: the optimizer's state, and under accumulation all gradients.
    """
    resident = step.resident | {"optimizer": step.state_bytes}
    batch = {"batch": encoding.batch_bytes, "frozen": encoding.frozen_bytes}
    peaks = {phase: parts | resident | batch for phase, parts in step.peaks.items()}
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
