"""What to say when the device is full: where that came, which part grew, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.types import Shape
from reeltune.training.prefetch import encodes_ahead

GREW = {  # what a process was doing (watchdog.Doing) -> (the same in words, what that makes anew)
    "start": ("the start", "what is loaded"),
    "data": ("reading data", "the batch"),
    "encode": ("encoding", "what the VAE and the encoders are working on"),
    "forward": ("the forward and backward pass", "activations and gradients"),
    "step": ("the optimizer's step", "the optimizer's state, which its first step makes"),
    "validate": ("the held-out loss and previews", "what previews and the held-out loss are working on"),
    "save": ("saving", "copies of what is saved"),
    "end": ("the end", "what is gathered of all processes"),
}


def explained(
    error: Exception, doing: str, step: int, shape: Shape | None, held_bytes: dict[str, int], recipe: Recipe
) -> UserError:
    """doing: one of watchdog.Doing. held_bytes: part -> bytes that the learner holds now."""
    words, grew = GREW[doing]
    size = "" if shape is None else f" at {shape.frames} frames of {shape.width} x {shape.height}"
    held = ", ".join(f"{part} {size_bytes / 1e9:.1f} GB" for part, size_bytes in held_bytes.items() if size_bytes)
    first = str(error).partition(". ")[0]
    return UserError(
        "memory",
        f"the device is full in {words} of step {step}{size} ({first}). It holds {held}; {grew} grew until it "
        f"was full. Change one or more: {'; '.join(remedies(doing, recipe))}. `reeltune plan` with this recipe tells "
        "which of them is enough",
    )


def remedies(doing: str, recipe: Recipe) -> Iterator[str]:
    """What this recipe has not done yet, the cheapest first."""
    training, optimization, model = recipe.training, recipe.optimization, recipe.model
    if training.train_batch_size > 1:
        yield f"train_batch_size below {training.train_batch_size}, with more gradient_accumulation_steps"
    ahead = encodes_ahead(recipe.memory.encode_ahead, on_gpu=True, low_vram=training.low_vram)
    if ahead and recipe.cache.cache_folder is None and doing in ("encode", "forward", "step"):
        yield "encode_ahead: false, so that nothing is encoded while the network trains"
    if not training.low_vram:
        yield "low_vram: true, which takes frozen networks off the device"
    if doing == "forward" and not training.gradient_checkpointing:
        yield "gradient_checkpointing: true"
    whole_on_each = recipe.parallel.engine in (None, "ddp")
    if doing == "forward" and whole_on_each and not recipe.memory.offload_activations:
        yield "offload_activations: true"
    if doing == "encode" and not recipe.memory.vae_tiling:
        yield "vae_tiling: true"
    if doing == "validate":
        yield "preview_count: 0"
    if doing in ("forward", "step"):
        if model.trained_weights == "fp32" and training.mixed_precision == "bf16":
            yield "trained_weights: bf16_stochastic"
        if not recipe.memory.step_in_backward and whole_on_each:
            yield "step_in_backward: true, with one device"
        if not (optimization.use_8bit_adam or optimization.use_came or optimization.use_adafactor):
            yield "use_8bit_adam: true, use_came: true or use_adafactor: true"
        if optimization.use_ema:
            yield "use_ema: false"
    if doing != "step":
        yield "smaller clips by video_sample_n_frames or the sample sizes"
    yield "more devices"
