"""Settings that change nothing beside others: given, and without effect.  (no torch)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reeltune.config.parse import flat, settings
from reeltune.config.recipe import Recipe
from reeltune.config.rules import shown


class Waiting(NamedTuple):
    """Settings that count beside some values of another alone."""

    names: tuple[str, ...]
    other: str
    counts: Callable[[Any], bool]  # beside that value of the other
    needs: str  # what to set the other to


def _is(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


def _is_not(*values: object) -> Callable[[Any], bool]:
    return lambda value: value not in values


# Schedulers: diffusers' get_scheduler. Optimizers: `build_optimizer`; of CAME released recipes give what it has not.
WAITING = (
    Waiting(("logit_mean", "logit_std"), "weighting_scheme", _is("logit_normal"), "logit_normal"),
    Waiting(("mode_scale",), "weighting_scheme", _is("mode"), "mode"),
    Waiting(("motion_sub_loss_ratio",), "motion_sub_loss", _is(True), "true"),
    Waiting(("lr_warmup_steps",), "lr_scheduler", _is_not("constant", "piecewise_constant"), "constant_with_warmup"),
    Waiting(("lr_num_cycles",), "lr_scheduler", _is("cosine_with_restarts"), "cosine_with_restarts"),
    Waiting(("lr_power",), "lr_scheduler", _is("polynomial"), "polynomial"),
    Waiting(("adam_beta1", "adam_beta2", "adam_epsilon"), "use_adafactor", _is(False), "false"),
    Waiting(("initial_grad_norm_ratio",), "abnormal_norm_clip_start", _is_not(None), "a step"),
    Waiting(("ema_decay",), "use_ema", _is(True), "true"),
    Waiting(("video_sample_stride",), "video_sample_fps", _is(None), "none"),
)


def idle_notices(recipe: Recipe) -> list[str]:
    """One for each setting that is not as it is by default and changes nothing beside another."""
    values: Mapping[str, Any] = flat(recipe)
    trackers = recipe.output.report_to
    told = []
    if "none" in trackers and len(set(trackers)) > 1:
        told.append(f"report_to is {shown(trackers)}, of which none changes nothing; leave it out, or all others")
    return told + [
        f"{name} is {shown(values[name])} and {one.other} is {shown(values[one.other])}, beside which it changes "
        f"nothing; set {one.other} to {one.needs}, or leave {name} out"
        for one in WAITING
        if not one.counts(values[one.other])
        for name in one.names
        if values[name] != settings()[name].default
    ]
