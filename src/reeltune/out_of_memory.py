"""What to say when the device is full: where that came, which part grew, and what to change."""

from __future__ import annotations

from collections.abc import Iterator

from reeltune.errors import UserError
from reeltune.recipe import Recipe
from reeltune.types import Shape

NEXT = {  # the last mark of a step's stopwatch -> what was being done when memory ran out
    "": "reading data",
    "data_s": "encoding",
    "encode_s": "the forward and backward pass",
    "forward_backward_s": "the optimizer's step",
    "optimizer_s": "the held-out loss and previews",
}
GREW = {  # what that makes anew
    "reading data": "the batch",
    "encoding": "what the VAE and the encoders are working on",
    "the forward and backward pass": "activations and gradients",
    "the optimizer's step": "the optimizer's state, which its first step makes",
    "the held-out loss and previews": "what previews and the held-out loss are working on",
}


def explained(
    error: Exception, last_mark: str, step: int, shape: Shape | None, held_bytes: dict[str, int], recipe: Recipe
) -> UserError:
    """held_bytes: part -> bytes that the learner holds now."""
    doing = NEXT[last_mark]
    size = "" if shape is None else f" at {shape.frames} frames of {shape.width} x {shape.height}"
    held = ", ".join(f"{part} {size_bytes / 1e9:.1f} GB" for part, size_bytes in held_bytes.items() if size_bytes)
    first = str(error).partition(". ")[0]
    return UserError(
        "memory",
        f"the device is full in {doing} of step {step}{size} ({first}). It holds {held}; {GREW[doing]} grew until it "
        f"was full. Change one or more: {'; '.join(remedies(doing, recipe))}. `reeltune plan` with this recipe tells "
        "which of them is enough",
    )


def remedies(doing: str, recipe: Recipe) -> Iterator[str]:
    """What this recipe has not done yet, the cheapest first."""
    training, optimization, model = recipe.training, recipe.optimization, recipe.model
    if training.train_batch_size > 1:
        yield f"train_batch_size below {training.train_batch_size}, with more gradient_accumulation_steps"
    if not training.low_vram:
        yield "low_vram: true, which takes frozen networks off the device"
    if doing == "the forward and backward pass" and not training.gradient_checkpointing:
        yield "gradient_checkpointing: true"
    if doing == "the held-out loss and previews":
        yield "preview_count: 0"
    if doing in ("the forward and backward pass", "the optimizer's step"):
        if model.trained_weights == "fp32" and training.mixed_precision == "bf16":
            yield "trained_weights: bf16_stochastic"
        if not (optimization.use_8bit_adam or optimization.use_came):
            yield "use_8bit_adam: true or use_came: true"
        if optimization.use_ema:
            yield "use_ema: false"
    if doing != "the optimizer's step":
        yield "smaller clips by video_sample_n_frames or the sample sizes"
    yield "more devices"
