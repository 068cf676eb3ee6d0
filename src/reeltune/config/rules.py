"""What the values of a Recipe may be, alone and together.  (no torch)"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from reeltune.config.kernel_rules import kernel_rules
from reeltune.config.ranges import MOST_SIDE, beyond, range_of
from reeltune.config.recipe import Adapter, Model, Optimization, Recipe, Sizes, Validation
from reeltune.config.text_rules import text_rules
from reeltune.memory import choices

OPTIMIZERS = ("use_8bit_adam", "use_came", "use_adafactor", "use_prodigy", "use_muon")  # without these: AdamW
LEAST_OF_PRODIGY = 0.1  # learning_rate, beside which another optimizer's would be taken for a mistake
DENSITIES = ("logit_normal", "mode")  # weighting schemes that draw noise levels; the others weigh them
BEGINNINGS = re.compile(r"uniform|gaussian|pissa(_niter_[1-9]\d{0,2})?")  # of adapters: lora_init
STEP_RULES = re.compile(r"(\d*\.?\d+:\d+,)*\d*\.?\d+")
OTHER_BEGINNINGS = ("olora", "corda", "loftq")  # those of PEFT 0.21 that write other base weights


def broken_rules(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """(fields concerned, what is wrong with its rule and remedy), one by one."""
    values = {name: value for section in vars(recipe).values() for name, value in vars(section).items()}
    defaults = {name: value for section in vars(Recipe()).values() for name, value in vars(section).items()}

    for name in beyond(values):
        rule = f"{name} is {values[name]}; it must be {range_of(name)}; the default is {shown(defaults[name])}"
        yield (name,), rule
    yield from text_rules(values)
    yield from _together(recipe)
    yield from _experts(values)
    yield from _adapter(recipe)
    yield from _levers(values)


def broken_under(recipe: Recipe, engine: Any = None) -> list[str]:
    """What breaks a rule under the engine of a run: that of its launcher, of the recipe, or ddp where neither has one.

    A recipe without an engine may have what needs one: its launcher may name it.
    """
    settled = replace(recipe.parallel, engine=engine or recipe.parallel.engine or "ddp")
    return [line for _, line in broken_rules(replace(recipe, parallel=settled))]


def shown(value: object) -> str:
    """A value as it is written in a recipe."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "empty"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value) or "empty"


def written(settings: Mapping[str, object]) -> str:
    """Settings as they are written in a recipe; as the command's flag, what is none of its settings."""
    lines = (f"--{name} {value}" if name == "gpus" else f"{name}: {shown(value)}" for name, value in settings.items())
    return ", ".join(lines)


def _adapter(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    adapter, model = vars(recipe.adapter), recipe.model
    if not recipe.adapter.rank:
        for name, value in adapter.items():
            if value != getattr(Adapter, name):
                yield (
                    (name, "rank"),
                    f"{name} is {shown(value)} and rank is 0, so there is no adapter; set rank, to 32 if in doubt, "
                    f"or leave {name} out",
                )
        return
    for name in ("trainable_modules", "trainable_modules_low_learning_rate"):
        if getattr(model, name) != getattr(Model, name):
            yield (
                (name, "rank"),
                f"{name} is {shown(getattr(model, name))} and rank is {recipe.adapter.rank}: adapters learn and the "
                "network's own weights do not; leave it out, or name weights to learn in full in train_whole",
            )
    yield from _beginning(recipe.adapter)
    if recipe.adapter.use_dora and recipe.adapter.base_weights is not None:
        yield (
            ("use_dora", "base_weights"),
            f"use_dora is true and base_weights is {recipe.adapter.base_weights}; DoRA measures the rows of weights in "
            "full; leave one of the two out",
        )
    for name in ("rank_pattern", "alpha_pattern"):
        for entry in adapter[name]:
            layer, _, number = entry.rpartition("=")
            if not layer or not re.fullmatch(r"[1-9]\d*" if name == "rank_pattern" else r"\d*\.?\d+", number):
                yield (name,), f"{name} has {entry!r}; write layer=number, as ffn.0=16"
            elif float(number) <= 0:
                yield (name,), f"{name} has {entry!r}; the number must be more than 0"


def _beginning(adapter: Adapter) -> Iterator[tuple[tuple[str, ...], str]]:
    how = adapter.lora_init
    if not BEGINNINGS.fullmatch(how):
        rule = (
            "it takes what A and B begin with out of the base's weights; use pissa, which leaves the base its bits"
            if how in OTHER_BEGINNINGS
            else "expected one of uniform, gaussian, pissa, pissa_niter_N"
        )
        yield ("lora_init",), f"lora_init is {how!r}; {rule}"
    if not how.startswith("pissa"):
        return
    if adapter.adapter_path is not None:
        yield (
            ("lora_init", "adapter_path"),
            f"lora_init is {how} and adapter_path is {adapter.adapter_path}; each says what A and B begin with; leave "
            "one of the two out (what a run with pissa wrote has twice its rank)",
        )
    if adapter.base_weights is not None and adapter.lora_dropout:
        yield (
            ("lora_init", "base_weights", "lora_dropout"),
            f"lora_init is {how}, base_weights is {adapter.base_weights} and lora_dropout is {adapter.lora_dropout}: "
            "what adapters begin with is part of such a base, and would be dropped; leave one of the three out",
        )


def _together(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    model, data, validation = recipe.model, recipe.data, recipe.validation
    if not model.trainable_modules and not model.trainable_modules_low_learning_rate:
        yield ("trainable_modules",), "trainable_modules is empty, so nothing would learn; write . for everything"
    if model.add_full_ref_image_in_self_attention and model.train_mode not in (None, "control_ref"):
        yield (
            ("add_full_ref_image_in_self_attention", "train_mode"),
            f"add_full_ref_image_in_self_attention is true and train_mode is {model.train_mode}; only control_ref "
            "has such a reference picture; leave one of the two out",
        )
    if recipe.cache.cache_folder is not None and not recipe.cache.cache_variants:
        yield (
            ("cache_folder", "cache_variants"),
            f"cache_folder is {recipe.cache.cache_folder} and cache_variants is 0; it keeps a fixed number of ways in "
            "which a clip is read; set cache_variants, to 1 for pictures and clips of one window, to 4 for longer ones",
        )
    if data.validation_data_meta is not None and data.held_out_share:
        yield (
            ("validation_data_meta", "held_out_share"),
            f"validation_data_meta is {data.validation_data_meta} and held_out_share is {data.held_out_share}; "
            "held-out clips come from one of them; leave the other out",
        )
    yield from _sizes(recipe.sizes)
    if validation.negative_prompt and validation.guidance_scale == 1:
        yield (
            ("negative_prompt", "guidance_scale"),
            f"negative_prompt is {validation.negative_prompt} and guidance_scale is 1, which guides away from nothing; "
            "raise guidance_scale, or leave negative_prompt out",
        )
    yield from _engine(recipe)
    yield from _optimization(recipe.optimization)
    yield from _rates(recipe.optimization)
    yield from _prodigy(recipe)
    share = recipe.memory.gradient_checkpointing_share
    if share < 1 and not recipe.training.gradient_checkpointing:
        yield (
            ("gradient_checkpointing_share", "gradient_checkpointing"),
            f"gradient_checkpointing_share is {share} and gradient_checkpointing is false; it is a share of what that "
            "recomputes; set gradient_checkpointing to true",
        )
    yield from kernel_rules(recipe)
    if recipe.loss.uniform_sampling and recipe.loss.weighting_scheme in DENSITIES:
        yield (
            ("uniform_sampling", "weighting_scheme"),
            f"uniform_sampling is true and weighting_scheme is {recipe.loss.weighting_scheme}; each is a density of "
            "noise levels; leave one of the two out",
        )
    yield from _previews(recipe.validation)


def _sizes(sizes: Sizes) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go together in how sizes are drawn."""
    if sizes.fix_sample_size is not None:
        if min(sizes.fix_sample_size) < 16:
            yield (
                ("fix_sample_size",),
                f"fix_sample_size is {shown(sizes.fix_sample_size)}; height and width must be at least 16 pixels; "
                "give both, as 480 832",
            )
        if max(sizes.fix_sample_size) > MOST_SIDE:
            yield (
                ("fix_sample_size",),
                f"fix_sample_size is {shown(sizes.fix_sample_size)}; height and width must be at most {MOST_SIDE:,} "
                "pixels; give both, as 480 832",
            )
        if sizes.random_ratio_crop:
            yield (
                ("fix_sample_size", "random_ratio_crop"),
                "fix_sample_size and random_ratio_crop are both given; a fixed size leaves no ratio to draw; "
                "leave one of the two out",
            )
    by_budget = sizes.random_hw_adapt and sizes.training_with_video_token_length and sizes.fix_sample_size is None
    if by_budget and sizes.video_sample_size > sizes.image_sample_size:
        yield (
            ("video_sample_size", "image_sample_size"),
            f"video_sample_size is {sizes.video_sample_size} and image_sample_size is {sizes.image_sample_size}; with "
            "training_with_video_token_length, sides go from the first up to the second; raise image_sample_size",
        )


def _optimization(optimization: Optimization) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go together in an optimizer, its rate and its clipping."""
    optimizers = [name for name in OPTIMIZERS if getattr(optimization, name)]
    if len(optimizers) > 1:
        yield (
            tuple(optimizers),
            f"{' and '.join(optimizers)} are true; a run has one optimizer; leave all but one out",
        )
    if optimization.max_grad_norm is None and optimization.abnormal_norm_clip_start is not None:
        yield (
            ("max_grad_norm", "abnormal_norm_clip_start"),
            f"max_grad_norm is none and abnormal_norm_clip_start is {optimization.abnormal_norm_clip_start}, which "
            "clips at a multiple of it; give max_grad_norm, or leave abnormal_norm_clip_start out",
        )
    rules = optimization.lr_step_rules
    if (rules is not None) != (optimization.lr_scheduler == "piecewise_constant"):
        yield (
            ("lr_step_rules", "lr_scheduler"),
            f"lr_step_rules is {shown(rules)} and lr_scheduler is {optimization.lr_scheduler}; lr_step_rules and "
            "piecewise_constant need each other; give both or neither",
        )
    if rules is not None and not STEP_RULES.fullmatch(rules):
        yield (
            ("lr_step_rules",),
            f"lr_step_rules is {rules}; it must be factor:step pairs and a last factor, as 1:10,0.1:20,0.005",
        )
    elif rules is not None:
        steps = [int(step) for _, _, step in (pair.partition(":") for pair in rules.split(",")[:-1])]
        if steps != sorted(set(steps)) or 0 in steps:
            yield ("lr_step_rules",), f"lr_step_rules is {rules}; its steps must rise from 1 on, as 1:10,0.1:20,0.005"


def _rates(optimization: Optimization) -> Iterator[tuple[tuple[str, ...], str]]:
    """Rates at which the first step would leave nothing of the weights. Prodigy's multiplies the rate that it finds."""
    decay = optimization.adam_weight_decay
    for name in ("learning_rate", "low_expert_learning_rate"):
        rate = getattr(optimization, name)
        if rate is None or optimization.use_prodigy:
            continue
        if rate >= 1:
            yield (
                (name,),
                f"{name} is {rate}, by about which each step moves each weight; it must be less than 1 but with "
                "use_prodigy; 1e-5 to 1e-4 is usual",
            )
        elif rate * decay >= 1:
            yield (
                (name, "adam_weight_decay"),
                f"{name} is {rate} and adam_weight_decay is {decay}, whose product each step takes off each weight; it "
                "must be less than 1; lower adam_weight_decay, to 0.03 if in doubt",
            )


def _experts(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is said of one of two networks, where the other or both learn."""
    expert = values["expert"]
    for name in ("low_expert_learning_rate", "low_expert_max_grad_norm"):
        if values[name] is not None and expert != "both":
            own = name.removeprefix("low_expert_")
            yield (
                (name, "expert"),
                f"{name} is {values[name]} and expert is {shown(expert)}; it is of the second of two networks that "
                f"learn in one run; set {own} in its place, or expert to both",
            )
    for name in ("other_expert_path", "other_expert_adapter"):
        if values[name] is not None and expert == "both":
            own = "transformer_path" if name == "other_expert_path" else "adapter_path"
            yield (
                (name, "expert"),
                f"{name} is {values[name]} and expert is both, of which there is no other; begin with {own}, a folder "
                "that has both",
            )


def _previews(validation: Validation) -> Iterator[tuple[tuple[str, ...], str]]:
    prompts, drawn = len(validation.validation_prompts), validation.validation_control_from
    for name in ("validation_paths", "validation_control_from"):
        paths = len(getattr(validation, name))
        if paths and paths != prompts:
            yield (
                ("validation_prompts", name),
                f"validation_prompts has {prompts} and {name} {paths}; each prompt has one path; give as many",
            )
    if drawn and validation.validation_paths:
        yield (
            ("validation_paths", "validation_control_from"),
            "validation_paths and validation_control_from are both given; a prompt has one control, made already or to "
            "be drawn; leave one of the two out",
        )
    if drawn and validation.control_kind is None:
        yield (
            ("validation_control_from", "control_kind"),
            f"validation_control_from is {shown(drawn)} and control_kind is left out, which says what is drawn; give "
            "it, as canny",
        )


def _prodigy(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go with Prodigy, which finds one rate for all weights, from all of them at once."""
    if not recipe.optimization.use_prodigy:
        return
    for name in ("learning_rate", "low_expert_learning_rate"):
        rate = getattr(recipe.optimization, name)
        if rate is not None and rate < LEAST_OF_PRODIGY:
            yield (
                ("use_prodigy", name),
                f"use_prodigy is true and {name} is {rate}, by which it multiplies the rate that it finds; write 1, "
                f"or at least {LEAST_OF_PRODIGY}",
            )
    others = {
        "lora_plus_ratio": (recipe.adapter.lora_plus_ratio, Adapter.lora_plus_ratio),
        "trainable_modules_low_learning_rate": (recipe.model.trainable_modules_low_learning_rate, ()),
    }
    for name, (value, default) in others.items():
        if value != default:
            yield (
                ("use_prodigy", name),
                f"use_prodigy is true and {name} is {shown(value)}; it finds one rate for all weights; leave one of "
                "the two out",
            )


def _levers(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go with ways of sparing memory."""
    for lever, exclusion in choices.excluded(values):
        name, other = lever.setting, exclusion.setting
        both = f"{name} is {shown(values[name])} and {other} is {shown(values[other])}"
        if values[name] is True and values[other] is True:
            both = f"{other} and {name} are true"
        yield (other, name), both + exclusion.why


def _engine(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What does not go with an engine, beside levers."""
    engine, optimization = recipe.parallel.engine, recipe.optimization
    if engine is None:
        return
    if recipe.parallel.keep_gathered and engine != "fsdp":
        what = f"keep_gathered is true and engine is {engine}"
        yield ("keep_gathered", "engine"), f"{what}; it is of fsdp; use one, or leave it out"
    if engine == "ddp":
        return
    wholes = {"mixed_precision": (recipe.training.mixed_precision == "fp16", "fp16", "use bf16")}
    for name in ("use_prodigy", "use_muon"):
        wholes[name] = (getattr(optimization, name), "true", "use AdamW, or engine ddp")
    if engine != "fsdp":
        start = optimization.abnormal_norm_clip_start
        wholes["use_ema"] = (optimization.use_ema, "true", "use engine fsdp or ddp")
        wholes["abnormal_norm_clip_start"] = (start is not None, shown(start), "use engine fsdp or ddp")
    for name, (given, value, remedy) in wholes.items():
        if given:
            yield (name, "engine"), f"{name} is {value} and engine is {engine}, which has no such thing; {remedy}"
