"""What does not go with how the network's blocks are computed: by which attention, compiled or not.  (no torch)"""

from __future__ import annotations

from collections.abc import Iterator

from reeltune.config.recipe import Recipe


def kernel_rules(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """(fields, what is wrong with them together)"""
    yield from _attention(recipe)
    yield from _compile(recipe)
    yield from _ahead(recipe)


def _attention(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go with a kernel that is chosen for the network's blocks."""
    kernel, together = recipe.training.attention, recipe.parallel.context_parallel
    if kernel == "auto":
        return
    if kernel == "cudnn" and recipe.training.deterministic:
        yield (
            ("attention", "deterministic"),
            "attention is cudnn and deterministic is true; cuDNN adds up gradients in no fixed order; set attention to "
            "flash, flash_4, efficient or math, or leave deterministic out",
        )
    if together > 1:
        yield (
            ("attention", "context_parallel"),
            f"attention is {kernel} and context_parallel is {together}, where the backward pass computes attention "
            "anew, outside the network's blocks; set attention to auto, or leave context_parallel out",
        )


def of_the_process(recipe: Recipe) -> list[str]:
    """Settings that choose kernels for the whole process, and not for the thread in which the network computes."""
    chosen = {
        "attention": recipe.training.attention not in ("auto", "flash_4"),
        "deterministic": recipe.training.deterministic,
    }
    return [name for name, is_chosen in chosen.items() if is_chosen]


def _ahead(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What encoders at work beside the network would find chosen too."""
    if not recipe.memory.encode_ahead or recipe.cache.cache_folder is not None:
        return
    for name in of_the_process(recipe):
        yield (
            (name, "encode_ahead"),
            f"{name} is {str(getattr(recipe.training, name)).lower()} and encode_ahead is true; a kernel is chosen for "
            "the whole process, and encoders at work meanwhile may not have it; leave one of the two out, or train "
            "from a cache",
        )


def _compile(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What reaches into the network's blocks, which are compiled as a whole."""
    parallel = recipe.parallel
    if recipe.training.compile == "none":
        return
    if recipe.adapter.use_dora:
        yield (
            ("compile", "use_dora"),
            "compile is blocks and use_dora is true, whose library (PEFT) asks for classes of weights, and that torch "
            "cannot compile; leave one of the two out",
        )
    recomputed = recipe.training.gradient_checkpointing
    if recipe.adapter.lora_dropout and isinstance(recomputed, str):
        yield (
            ("compile", "lora_dropout", "gradient_checkpointing"),
            f"compile is blocks, lora_dropout is {recipe.adapter.lora_dropout} and gradient_checkpointing is "
            f"{recomputed}, which is compiled with the blocks, where the backward pass would drop others than the "
            "forward pass; set gradient_checkpointing to true, or leave lora_dropout out",
        )
    if parallel.engine == "zero3":
        yield (
            ("compile", "engine"),
            "compile is blocks and engine is zero3, which gathers weights within the blocks; set engine to fsdp, or "
            "compile to none",
        )
    if parallel.context_parallel > 1:
        yield (
            ("compile", "context_parallel"),
            f"compile is blocks and context_parallel is {parallel.context_parallel}, where processes exchange tokens "
            "within the blocks; set compile to none, or leave context_parallel out",
        )
