"""Adapters written in the form that a tool loads at the strength they were trained with.

The scale is in B, so that a tool that knows no alpha, or takes it for something else, applies the whole change.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reeltune.adapters import fused
from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.adapters.loaders import KOHYA, PEFT, Tensors
from reeltune.adapters.networks import Layer, Network, Spelling, general
from reeltune.core.errors import refuse
from reeltune.core.reading import few, grouped

MERGE = "`reeltune export CHECKPOINT FOLDER --merge` puts it into the model's weights"


@dataclass(frozen=True)
class Form:
    """How a layer's tensors are named and kept."""

    prefix: str
    spelling: Spelling
    joined: str = "."
    pair: tuple[str, str] = PEFT[0]
    alpha: bool = False
    """With alpha = rank; without, tools take it for that."""
    changes: bool = False
    """Whole weights go with it, as their change."""


@dataclass(frozen=True)
class Dialect:
    title: str
    forms: Mapping[str, Form]
    """Network -> how its adapters are written."""
    tools: tuple[str, ...]
    """Whose rules the file is held to, where they run the network."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Network -> what to do instead."""


LOW = {"joined": "_", "pair": KOHYA[0], "alpha": True}
FUN = Form("diffusion_model.", "released")
DIFFUSERS = Form("transformer.", "diffusers")
DIALECTS = {
    "comfyui": Dialect(
        "ComfyUI",
        {"wan_fun": replace(FUN, changes=True), "hunyuan_video": Form("diffusion_model.", "original")},
        ("ComfyUI", "WanVideoWrapper"),
        {"cogvideox_fun": "--for diffusers or videox_fun", "easyanimate": "--for videox_fun"},
    ),
    "diffusers": Dialect(
        "diffusers",
        {"wan_fun": DIFFUSERS, "hunyuan_video": DIFFUSERS, "cogvideox_fun": DIFFUSERS},
        ("diffusers",),
        {"easyanimate": "diffusers loads no adapters of it; " + MERGE},
    ),
    "videox_fun": Dialect(
        "VideoX-Fun",
        {
            "wan_fun": FUN,
            "hunyuan_video": FUN,
            "cogvideox_fun": FUN,
            "easyanimate": Form("lora_unet__", "released", **LOW),
        },
        ("VideoX-Fun", "EasyAnimate"),
    ),
    "musubi": Dialect(
        "musubi-tuner",
        {"wan_fun": Form("lora_unet_", "released", **LOW), "hunyuan_video": Form("lora_unet_", "original", **LOW)},
        ("musubi-tuner",),
        dict.fromkeys(("cogvideox_fun", "easyanimate"), "musubi-tuner has no such network; --for videox_fun"),
    ),
}
FILE_TYPES = {"as_stored": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ARCHITECTURES = {  # the values that UIs show of modelspec.architecture, and whose code runs the network
    "wan_fun": ("wan2.1/lora", "https://github.com/Wan-Video/Wan2.1"),
    "hunyuan_video": ("hunyuan-video/lora", "https://github.com/Tencent-Hunyuan/HunyuanVideo"),
    "cogvideox_fun": ("cogvideox/lora", "https://github.com/zai-org/CogVideo"),
    "easyanimate": ("easyanimate-v5/lora", "https://github.com/aigc-apps/EasyAnimate"),
}
OURS = "reeltune.trained"  # the key by which a file that was written here is known
MODULES = {"wan_fun": "networks.lora_wan", "hunyuan_video": "networks.lora"}  # of musubi-tuner, which reads them


def written(adapter: Adapter, network: Network, dialect: str, dtype: torch.dtype | None = None) -> Tensors:
    """The tensors of its file. dtype: None is as they are.

    adapter: with whole weights as `changes`. Raises UserError for what the tool would not load, or not as trained.
    """
    form = _form(adapter, network, DIALECTS[dialect])
    by_name: dict[str, dict[int, LowRank]] = defaultdict(dict)
    fusions: dict[str, list[Layer]] = {}
    for released, pair in adapter.layers.items():
        text, layer, siblings = _named(network, released, form)
        by_name[text][layer.part] = pair
        fusions[text] = siblings
    tensors: dict[str, Tensor] = {}
    whole: dict[str, tuple[Tensor, torch.dtype]] = {}  # before rounding, and the type that the file had
    for text, parts in by_name.items():
        pair = _one(parts, fusions[text]) if len(fusions[text]) > 1 else _scaled(*parts.values())
        name, first = form.prefix + text.replace(".", form.joined), next(iter(parts.values()))
        whole[name + form.pair[0]] = pair.A_RI, pair.A_RI.dtype
        whole[name + form.pair[1]] = pair.B_OR, first.B_OR.dtype
        if form.alpha:
            tensors[f"{name}.alpha"] = torch.tensor(float(pair.rank))
    for released, tensor in adapter.changes.items():
        whole[form.prefix + _change_name(released)] = tensor, tensor.dtype
    rounded = {name: tensor.to(dtype or stored).contiguous() for name, (tensor, stored) in whole.items()}
    lost = [(name, rule) for name, new in rounded.items() if (rule := _lost(whole[name][0], new))]
    refuse("export", few(grouped(lost)))
    return tensors | rounded


def _form(adapter: Adapter, network: Network, dialect: Dialect) -> Form:
    form = dialect.forms.get(network.name)
    if form is None:
        remedy = dialect.refused.get(network.name, "there is no form that it takes")
        refuse("export", [f"an adapter of {network.title} for {dialect.title}: {remedy}"])
        raise AssertionError
    problems = []
    if any(pair.magnitude_O is not None for pair in adapter.layers.values()):
        problems.append(f"{dialect.title} applies a DoRA otherwise than it was trained, or in part; {MERGE}")
    if adapter.changes and not form.changes:
        names = ", ".join(few(sorted(adapter.changes), 3))
        problems.append(f"{dialect.title} takes no whole weights, and {names} were trained so; {MERGE}")
    nameless = [
        released
        for released in adapter.layers
        if (layer := network.layer(released)) is None or not layer.name(form.spelling)
    ]
    problems += few(
        [f"{name} has no name that {dialect.title} knows; train without it, or {MERGE}" for name in nameless]
    )
    refuse("export", problems)
    return form


def _named(network: Network, released: str, form: Form) -> tuple[str, Layer, list[Layer]]:
    """(the module's name in the file, the layer, all that are one with it there)"""
    layer, numbers = network.layer(released), network.numbers(released)
    assert layer is not None
    text = layer.name(form.spelling).format(*numbers)
    return text, layer, [one for one, _ in network.find(text, form.spelling)]


def _one(parts: Mapping[int, LowRank], layers: list[Layer]) -> LowRank:
    """Layers that are one in the file: sizes as the pairs have them, of others as the tables say."""
    width = next(iter(parts.values())).A_RI.shape[1]
    known = {place: pair.B_OR.shape[0] for place, pair in parts.items()}
    wide = known.get(3, 4 * width)  # a block's feed-forward layer, where it is not in the adapter
    outputs = [known.get(layer.part, wide if layer.part == 3 else width) for layer in layers]
    return fused.fuse(dict(sorted(parts.items())), outputs)


def _scaled(pair: LowRank) -> LowRank:
    """The same change with alpha = rank; B in fp32, to be rounded once."""
    return replace(pair, B_OR=pair.B_OR.float() * pair.scale, alpha=float(pair.rank), rank_stabilised=False)


def _change_name(parameter: str) -> str:
    for kind, ending in ((".weight", ".diff"), (".bias", ".diff_b")):
        if parameter.endswith(kind):
            return parameter.removesuffix(kind) + ending
    return f"{parameter}.diff"


def _lost(tensor: Tensor, rounded: Tensor) -> str:
    """What is wrong with it where its numbers are above or below those that its new type holds; else empty."""
    new = rounded.float()
    if not new.isfinite().all():
        return "has numbers that its type does not hold; give --dtype fp32 or bf16"
    if (new - tensor.float()).norm() > torch.finfo(rounded.dtype).eps * tensor.float().norm():
        return "has numbers so small that its type rounds them away; give --dtype fp32 or bf16"
    return ""


# ---- what the file says of itself


def metadata(adapter: Adapter, network: Network, tensors: Tensors, facts: Mapping[str, str]) -> dict[str, str]:
    """Keys that tools and UIs read (ss_* of kohya's scripts, modelspec.* of https://github.com/Stability-AI/ModelSpec).

    facts: title, base_model, steps, trigger, recipe_sha256, where they are known.
    """
    ranks = {pair.rank for pair in adapter.layers.values()}
    rank = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
    architecture, implementation = ARCHITECTURES[network.name]
    about = {
        "format": "pt",
        "ss_network_module": MODULES.get(network.name, "reeltune"),
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_base_model_version": architecture.partition("/")[0],
        "ss_sd_model_name": facts.get("base_model", ""),
        "ss_output_name": facts.get("title", ""),
        "ss_steps": facts.get("steps", ""),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": implementation,
        "modelspec.title": facts.get("title", ""),
        "modelspec.trigger_phrase": facts.get("trigger", ""),
        "reeltune.recipe_sha256": facts.get("recipe_sha256", ""),
        "reeltune.targets": ", ".join(targets(adapter)),
        OURS: json.dumps(adapter.about, sort_keys=True, default=str),
    }
    return {key: value for key, value in about.items() if value}


def targets(adapter: Adapter) -> list[str]:
    """Layers' names without the blocks' numbers."""
    return sorted({general(name)[0].rpartition("{}.")[2] for name in adapter.layers})


def most_error(dtype: torch.dtype | None, tensors: Tensors) -> float:
    """How far a change can be from the trained one, relative, by the rounding of its file's type alone."""
    types = {dtype} if dtype is not None else {tensor.dtype for tensor in tensors.values() if tensor.ndim}
    rounding = max(torch.finfo(one).eps for one in types)
    return max(1e-5, math.sqrt(2) * rounding)
