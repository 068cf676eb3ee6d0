"""Settings that change nothing beside others: given, and without effect.  (no torch)"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from reeltune.config.parse import flat, settings
from reeltune.config.recipe import Recipe
from reeltune.config.rules import shown


class Need(NamedTuple):
    """What another setting must be for some to count."""

    other: str
    counts: Callable[[Any], bool]
    words: str  # what to set it to


class Waiting(NamedTuple):
    """Settings that count where one of these is as it must be."""

    names: tuple[str, ...]
    needs: tuple[Need, ...]


def _is(*values: object) -> Callable[[Any], bool]:
    return lambda value: value in values


def _is_not(*values: object) -> Callable[[Any], bool]:
    return lambda value: value not in values


def _has(*words: str) -> Callable[[Any], bool]:
    return lambda value: not {*words}.isdisjoint(value)


ADAPTED = (Need("random_hw_adapt", _is(True), "true"),)
NOT_FIXED = (Need("fix_sample_size", _is(None), "none"),)
PROMPTS = (Need("validation_prompts", _is_not(()), "prompts"),)
HELD_OUT = (Need("validation_data_meta", _is_not(None), "a list"), Need("held_out_share", _is_not(0), "0.05"))
OF_PREVIEWS = ("preview_steps", "guidance_scale", "negative_prompt", "control_kind", "control_detector")
# Sizes: data.shapes. Schedulers: diffusers' get_scheduler. Optimizers: `build_optimizer`; of CAME released recipes give
# what it has not. Validation: sampling.validate.
WAITING = (
    Waiting(("logit_mean", "logit_std"), (Need("weighting_scheme", _is("logit_normal"), "logit_normal"),)),
    Waiting(("mode_scale",), (Need("weighting_scheme", _is("mode"), "mode"),)),
    Waiting(("motion_sub_loss_ratio",), (Need("motion_sub_loss", _is(True), "true"),)),
    Waiting(
        ("lr_warmup_steps",),
        (Need("lr_scheduler", _is_not("constant", "piecewise_constant"), "constant_with_warmup"),),
    ),
    Waiting(("lr_num_cycles",), (Need("lr_scheduler", _is("cosine_with_restarts"), "cosine_with_restarts"),)),
    Waiting(("lr_power",), (Need("lr_scheduler", _is("polynomial"), "polynomial"),)),
    Waiting(("adam_beta1", "adam_beta2", "adam_epsilon"), (Need("use_adafactor", _is(False), "false"),)),
    Waiting(("initial_grad_norm_ratio",), (Need("abnormal_norm_clip_start", _is_not(None), "a step"),)),
    Waiting(("ema_decay",), (Need("use_ema", _is(True), "true"),)),
    Waiting(("video_sample_stride",), (Need("video_sample_fps", _is(None), "none"),)),
    Waiting(("token_sample_size",), (Need("training_with_video_token_length", _is(True), "true"),)),
    Waiting(("token_sample_size", "training_with_video_token_length"), ADAPTED),
    Waiting(("video_sample_size", "image_sample_size", "token_sample_size", "enable_bucket"), NOT_FIXED),
    Waiting(("random_hw_adapt", "training_with_video_token_length"), NOT_FIXED),
    Waiting(("random_frame_crop",), (Need("video_sample_n_frames", _is_not(1), "more"),)),
    Waiting(("accept_changed_data",), (Need("resume_from_checkpoint", _is_not(None), "latest"),)),
    Waiting(("tracker_project_name",), (Need("report_to", _has("wandb", "trackio"), "wandb or trackio"),)),
    Waiting(("held_out_levels",), HELD_OUT),
    Waiting(("validation_steps", *OF_PREVIEWS), (*PROMPTS, *HELD_OUT)),
    Waiting(OF_PREVIEWS, (*PROMPTS, Need("preview_count", _is_not(0), "more than 0"))),
    Waiting(("preview_count",), (Need("validation_prompts", _is(()), "[]"),)),
)


def idle_notices(recipe: Recipe) -> list[str]:
    """What is not as it is by default and changes nothing beside other settings, a line for those that want the
    same."""
    values: Mapping[str, Any] = flat(recipe)
    trackers = recipe.output.report_to
    told = []
    if "none" in trackers and len(set(trackers)) > 1:
        told.append(f"report_to is {shown(trackers)}, of which none changes nothing; leave it out, or all others")
    wanting: dict[str, list[tuple[Need, ...]]] = {}
    for names, needs in WAITING:
        if not any(need.counts(values[need.other]) for need in needs):
            for name in names:
                if values[name] != settings()[name].default:
                    wanting.setdefault(name, []).append(needs)
    alike: dict[tuple[tuple[Need, ...], ...], list[str]] = {}
    for name, lacking in wanting.items():
        alike.setdefault(tuple(lacking), []).append(name)
    return told + [_told(names, lacking, values) for lacking, names in alike.items()]


def _told(names: Sequence[str], lacking: Sequence[Sequence[Need]], values: Mapping[str, Any]) -> str:
    """lacking: groups of needs, of each of which one must be met."""
    others = dict.fromkeys(need.other for needs in lacking for need in needs)
    said = " and ".join(f"{name} is {shown(values[name])}" for name in (*names, *others))
    remedy = " and ".join(" or ".join(f"{need.other} to {need.words}" for need in needs) for needs in lacking)
    they = "it changes" if len(names) == 1 else "they change"
    return f"{said}, beside which {they} nothing; set {remedy}, or leave {' and '.join(names)} out"
