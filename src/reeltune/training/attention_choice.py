"""Which kernel computes attention where the recipe leaves that open: tried before the first step, then kept by
checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.types import Shape
from reeltune.distributed.engine import Engine
from reeltune.memory import attention, flash_4
from reeltune.memory.attention_trial import Trial, asked, median_s, soonest, tried
from reeltune.training.prefetch import encodes_beside
from reeltune.training.rank_checks import from_first
from reeltune.training.run import Run
from reeltune.training.warm_up import Sizes, forward_pass


@dataclass(frozen=True)
class Choice:
    """Which kernel a run takes. kernel: None where torch chooses for each shape. is_kept: whether checkpoints keep it.
    told: line of the log."""

    kernel: str | None
    is_kept: bool
    told: str


def choose_attention(run: Run) -> Choice:
    """Decides `attention: auto`, alike in all processes: the kernel that the resumed checkpoint keeps, else the fastest
    one in a trial. The networks that learn use it from here on."""
    chosen = _chosen(run)
    if chosen.kernel is not None and chosen.is_kept:
        for turn in run.turns.each:
            turn.learner.network.attention.prefer(attention.in_order(chosen.kernel, _candidates(run)))
    return chosen


def _chosen(run: Run) -> Choice:
    held, begins, kernels = run.progress.attention, "attention is auto: ", _candidates(run)
    if not held and len(kernels) == 1:
        return _only(kernels[0], begins, run.engine)
    if (reason := _leaves_to_torch(run.recipe, run.engine)) is not None:
        told = f"{begins}torch chooses a kernel for each shape, and none is tried, as {reason}{_own(run)}"
        return Choice(None, False, told + (f"; so {held}, which the checkpoint says, is not taken" if held else ""))
    if held:
        if (reason := _lacking(held, run.recipe, run.engine)) is None:
            return Choice(held, True, f"{begins}{held} computes it, as the checkpoint says")
        begins += f"the checkpoint says {held}, and {reason}; "
    if len(kernels) == 1:
        return _only(kernels[0], begins, run.engine)
    trial, shape = _trial(run, kernels)
    if trial is not None and run.engine.world > 1:
        trial = _for_all(trial, run.recipe, run.engine)
    kernel = None if trial is None else soonest(trial.passes_s)
    return Choice(kernel, kernel is not None, begins + in_words(trial, shape))


def _candidates(run: Run) -> tuple[str, ...]:
    return attention.candidates(run.engine.device.type)


def _only(kernel: str, begins: str, engine: Engine) -> Choice:
    device = engine.device.type.upper()
    return Choice(kernel, False, f"{begins}{kernel} computes it, the one kernel that torch has to try on a {device}")


def _leaves_to_torch(recipe: Recipe, engine: Engine) -> str | None:
    """Why no kernel can be chosen for the network's blocks alone, or none by timing it; None: one can."""
    if engine.context > 1:
        return "with context_parallel the backward pass computes attention outside the network's blocks"
    if recipe.training.deterministic:
        return "deterministic is true, and timing them may find another one in another run"
    if encodes_beside(recipe, on_gpu=engine.device.type == "cuda"):
        return (
            "a kernel is chosen for the whole process, and encoders are at work meanwhile; train from a cache or set "
            "encode_ahead to false to have one"
        )
    return None


def _own(run: Run) -> str:
    """What is told of the kernel that may be had all the same, where it is installed."""
    if run.engine.context > 1 or flash_4.NAME not in _candidates(run):
        return ""
    own = "it is the network's alone, and its gradients repeat their bits where deterministic is true"
    return f"; {flash_4.NAME}, which is installed, may be named: {own}"


def _for_all(trial: Trial, recipe: Recipe, engine: Engine) -> Trial:
    """The trial without kernels that were the soonest of the first process, and that another one cannot use."""
    while (kernel := soonest(trial.passes_s)) and (reason := _lacking(kernel, recipe, engine)):
        others = {name: seconds for name, seconds in trial.passes_s.items() if name != kernel}
        trial = Trial(others, {**trial.left_out, kernel: reason})
    return trial


def _lacking(kernel: str, recipe: Recipe, engine: Engine) -> str | None:
    """Why some process cannot use that kernel, alike in all; None: each can."""
    return next(filter(None, engine.gather(_lacks(kernel, recipe, engine))), None)


def _lacks(kernel: str, recipe: Recipe, engine: Engine) -> str | None:
    """Why this process cannot use that kernel; None: it can."""
    if kernel == attention.MATH and isinstance(kept := recipe.training.gradient_checkpointing, str):
        return f"gradient_checkpointing is {kept}"
    try:
        attention.refuse_missing(kernel, engine.device, engine.dtype)
    except UserError:
        return f"a process has no such kernel on {engine.device.type}"
    return None


def _trial(run: Run, kernels: Sequence[str]) -> tuple[Trial | None, Shape]:
    """(the trial, the clip's size): the main process times each kernel on the attention calls of the network's blocks
    for the largest clip of epoch 0. The trial is None if they make no such call."""
    engine, (micro_step, shape) = run.engine, next(iter(Sizes.of(run.reader.plan(0)).first.items()))
    turn = run.turns.now
    forward = partial(forward_pass(run, micro_step), turn)
    with engine.same_bits():
        calls = asked(turn.learner.network.attention.blocks, forward)
        return (from_first(engine, partial(tried, calls, kernels)) if calls else None), shape


def in_words(trial: Trial | None, shape: Shape) -> str:
    if trial is None:
        return "the network's blocks ask for none that torch could compute by one kernel or another"
    kernel, medians_s, (F, H, W) = soonest(trial.passes_s), median_s(trial.passes_s), shape
    found = f"{kernel} computes it" if kernel else "torch chooses a kernel for each shape"
    if medians_s:
        times = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in medians_s.items())
        found = f"{found}; forward and backward pass of it in all blocks, for {F}x{H}x{W}: {times}"
    left_out = "".join(f"; {name} is left out ({reason})" for name, reason in trial.left_out.items())
    return found + left_out
