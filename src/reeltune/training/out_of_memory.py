"""What to say when a device or the machine is full: where that came, which part grew, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from reeltune.config.parse import flat
from reeltune.config.recipe import Recipe
from reeltune.config.rules import written
from reeltune.core.errors import UserError, first_words
from reeltune.core.types import Shape
from reeltune.memory import choices
from reeltune.memory.lever import ALL, TRAINED
from reeltune.training.prefetch import encodes_ahead

GREW = {  # what a process was doing (watchdog.Doing; "step in backward") -> (the same in words, what that makes anew)
    "start": ("the start", "what is loaded"),
    "data": ("reading data", "the batch"),
    "encode": ("encoding", "what the VAE and the encoders are working on"),
    "forward": ("the forward and backward pass", "activations and gradients"),
    "step": ("the optimizer's step", "the optimizer's state, which its first step makes"),
    "step in backward": (
        "the backward pass, with the optimizer's step in it,",
        "activations, gradients and optimizer state",
    ),
    "validate": ("the held-out loss and previews", "what previews and the held-out loss are working on"),
    "save": ("saving", "copies of what is saved"),
    "end": ("the end", "what is gathered of all processes"),
}
PHASES = {  # the same -> phases of a step, one of which must take less; all of them where it is none of a step
    "data": {"encode"},  # of as many pixels
    "encode": {"encode"},
    "forward": TRAINED,
    "step": {"step"},
    "step in backward": TRAINED | {"step"},
    "validate": {"preview"},
}


def explained(
    error: Exception, doing: str, step: int, shape: Shape | None, held_bytes: dict[str, int], recipe: Recipe
) -> UserError:
    """The error in words: what was done, what was held, what would help. doing: one of watchdog.Doing. held_bytes: part
    -> bytes that the learner holds now."""
    doing = named(doing, recipe)
    words, grew = GREW[doing]
    place = "the device" if isinstance(error, torch.OutOfMemoryError) else "the memory of this machine"
    size = "" if shape is None else f" at {shape.frames} frames of {shape.width} x {shape.height}"
    parts = ", ".join(f"{part} {size_bytes / 1e9:.1f} GB" for part, size_bytes in held_bytes.items() if size_bytes)
    return UserError(
        "memory",
        f"{place} is full in {words} of step {step}{size} ({first_words(error)}). It holds {parts}; {grew} grew until "
        f"it was full. Change one or more, the cheapest first: {'; '.join(remedies(doing, recipe))}. `reeltune plan` "
        "with this recipe tells which of them is enough",
    )


def named(doing: str, recipe: Recipe) -> str:
    """One of watchdog.Doing -> one of GREW: with step_in_backward a step is a backward pass too."""
    return "step in backward" if doing == "step" and recipe.memory.step_in_backward else doing


def remedies(doing: str, recipe: Recipe) -> Iterator[str]:
    """What this recipe has not done yet and may, the cheapest first. doing: one of GREW."""
    ahead = encodes_ahead(recipe, on_gpu=True)
    values = {**flat(recipe), "encodes_ahead": ahead}
    words = (
        lever.advice or written(settings)
        for lever, settings in choices.offered(values)
        if (PHASES[doing] & lever.where(values) if doing in PHASES else lever.where(values) == ALL)
    )
    yield from dict.fromkeys(words)  # more devices come in several numbers
