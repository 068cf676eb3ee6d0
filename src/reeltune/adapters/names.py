"""What the names of tensors in an adapter's file say: which tool's form it is, and which part of which module.

Read from the tools' sources and files, 2026-11: ComfyUI, WanVideoWrapper, diffusers, PEFT, kohya's scripts and
musubi-tuner, DiffSynth-Studio, VideoX-Fun and EasyAnimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["A", "B", "alpha", "magnitude", "diff", "diff_b", "bias", "whole"]
UNKNOWN = "is no part of an adapter that is known; give a file without it"


@dataclass(frozen=True)
class Form:
    """How a tool begins the name of a module, and what it puts between its parts."""

    tool: str
    prefix: str
    joined: str = "."


OWN_WHOLE = Form("reeltune", "whole.")
PEFT = Form("PEFT", "base_model.model.")
FORMS = (  # a longer beginning before what it begins with
    Form("VideoX-Fun's own form", "lora_unet__", "_"),
    Form("kohya's form", "lora_unet_", "_"),
    Form("LyCORIS", "lycoris_", "_"),
    Form("ComfyUI's form", "model.diffusion_model."),
    Form("ComfyUI's form", "diffusion_model."),
    PEFT,
    Form("DiffSynth-Studio's form", "pipe.dit."),
    Form("diffusers' form", "transformer."),
    OWN_WHOLE,
    Form("names without a beginning", ""),
)
KINDS: dict[str, Kind] = {
    ".lora_A.weight": "A",
    ".lora_A.default.weight": "A",
    ".lora_down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.default.weight": "B",
    ".lora_up.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_B.default.bias": "bias",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".dora_layer.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".diff": "diff",
    ".diff_b": "diff_b",
}
OTHER_KINDS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon, of convolutions",
    "glora": "GLoRA",
    "boft_": "BOFT",
    "lora_embedding": "a LoRA of embeddings",
    "scaled_fp8": "quantised",
}
OF_TEXT = ("lora_te", "text_encoder")


@dataclass(frozen=True)
class Named:
    key: str
    form: Form
    module: str  # as the file has it, without its beginning
    kind: Kind


def parse(key: str) -> Named | str:
    """What the tensor is, or in words what it is that is not read."""
    if key.startswith(OF_TEXT):
        return "is of a text encoder, which stays as it is here; give a file without such tensors"
    if other := next((what for mark, what in OTHER_KINDS.items() if mark in key), None):
        return f"is {other}, which is not read; give an adapter of low-rank pairs, .diff and .diff_b"
    form = next(form for form in FORMS if key.startswith(form.prefix))
    module = key.removeprefix(form.prefix)
    if module.endswith(".diff_m"):
        return Named(key, form, f"{module.removesuffix('.diff_m')}.modulation", "diff")
    if form == OWN_WHOLE:
        return Named(key, form, module, "whole")
    for suffix, kind in KINDS.items():
        if module.endswith(suffix):
            return Named(key, form, module.removesuffix(suffix), kind)
    if form == PEFT and module.endswith((".weight", ".bias")):  # of modules_to_save
        return Named(key, form, module, "whole")
    return UNKNOWN


def form_of(named: Iterable[Named]) -> Form | str:
    """The one form of a file, or in words that there are several."""
    found = {one.form.prefix: one for one in named if one.form != OWN_WHOLE}
    if len(found) > 1:
        keys = " and ".join(one.key for one in list(found.values())[:2])
        return f"has names of several forms, such as {keys}; save the adapters to files of their own"
    return next((one.form for one in found.values()), OWN_WHOLE)
