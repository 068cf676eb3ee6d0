"""Single rules of tools that read adapters: what they rename first, and where they stop or go wrong.

Each is as `loaders` takes it: (a file's tensors, the network) -> renamed tensors, or the reason in words, or None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from reeltune.adapters.networks import Network, general

Tensors = Mapping[str, Tensor]

# ---- ComfyUI (comfy/lora_convert.py, comfy/weight_adapter/base.py)


def of_fun(tensors: Tensors, network: Network) -> dict[str, Tensor]:
    """VideoX-Fun's own form is known by one tensor; then its names lose a low line."""
    if "lora_unet__blocks_0_cross_attn_k.lora_down.weight" not in tensors:
        return dict(tensors)
    return {_begin(name, "lora_unet__", "lora_unet_"): tensor for name, tensor in tensors.items()}


def magnitudes_of_the_base(tensors: Tensors, network: Network) -> str | None:
    if any(name.endswith(".dora_scale") for name in tensors):
        return "it divides a DoRA's rows by the norm of the base's, not of the changed ones, which is another weight"
    return None


# ---- WanVideoWrapper (nodes_model_loading.py)

OF_RSLORA = "base_model.model.blocks.0.cross_attn.k.lora_A.weight"
FIRST = (  # anywhere in names that begin so
    ("transformer.", "transformer.", "diffusion_model."),
    ("pipe.dit.", "pipe.dit.", "diffusion_model."),
    ("blocks.", "blocks.", "diffusion_model.blocks."),
)
LYCORIS = (
    ("lycoris_blocks_", "blocks."),
    ("_cross_attn_", ".cross_attn."),
    ("_self_attn_", ".self_attn."),
    ("_ffn_net_0_proj", ".ffn.0"),
    ("_ffn_net_2", ".ffn.2"),
    ("to_out_0", "o"),
)
ALWAYS = ((".default.", "."), (".diff_m", ".modulation.diff"), ("base_model.model.", "diffusion_model."))
OF_ATTENTION = ((".to_k.", ".k."), (".to_q.", ".q."), (".to_v.", ".v."), (".to_out.0.", ".o."))


def standardised(tensors: Tensors, network: Network) -> dict[str, Tensor]:
    """Both attentions under diffusers' names become cross_attn, and the later of two equal names counts."""
    return {_standard(name, network): tensor for name, tensor in _with_alpha(tensors).items()}


def _with_alpha(tensors: Tensors) -> dict[str, Tensor]:
    """PEFT's form is taken for rank-stabilised: alpha becomes rank * rank // sqrt(rank)."""
    if OF_RSLORA not in tensors:
        return dict(tensors)
    rank = tensors[OF_RSLORA].shape[0]
    alpha = torch.tensor(float(rank * rank // rank**0.5))
    added = {name.replace(".lora_A.weight", ".alpha"): alpha for name in tensors if name.endswith(".lora_A.weight")}
    return {**tensors, **added}


def _standard(name: str, network: Network) -> str:
    if name.startswith("lycoris_blocks_"):
        name = _replaced(name, LYCORIS)
    for begin, old, new in FIRST:
        if name.startswith(begin):
            name = name.replace(old, new)
    name = _replaced(name, ALWAYS)
    if name.startswith("lora_unet__"):
        module, _, ending = name.removeprefix("lora_unet__").partition(".")
        known = network.module(module, "released", "_")
        ending = ending.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
        name = name if known is None else f"diffusion_model.{known}.{ending}"
    for attention in (".attn1.", ".attn2."):
        if attention in name:
            return _replaced(name.replace(attention, ".cross_attn."), OF_ATTENTION)
    return name


def taken_for_control(tensors: Tensors, network: Network) -> str | None:
    if "diffusion_model.patch_embedding.lora_A.weight" in standardised(tensors, network):
        return "it takes a patch_embedding.lora_A for a control LoRA, and changes the network's inputs"
    return magnitudes_of_the_base(tensors, network)


# ---- diffusers (loaders/lora_pipeline.py, loaders/lora_conversion_utils.py)

INVALID = "ValueError: Invalid LoRA checkpoint"
WIDTH = 3072  # at which it cuts the fused layers of HunyuanVideo
OUTSIDE = ("text_embedding", "time_embedding", "time_projection", "head.head", "img_emb.proj")
OF_BLOCKS = (*(f"{side}_attn_{x}" for side in ("self", "cross") for x in "qkvo"), "ffn_0", "ffn_2")


def of_diffusers(tensors: Tensors, network: Network) -> str | None:
    if network.name == "wan_fun" and any(name.startswith("diffusion_model.") for name in tensors):
        return _released_wan(tensors)
    if network.name == "wan_fun" and any(name.startswith("lora_unet_") for name in tensors):
        return _kohya_wan(tensors)
    if any("dora_scale" in name for name in tensors):
        return "it leaves the magnitudes of a DoRA out, and applies the rest as if it were all"
    if network.name == "hunyuan_video" and any("img_attn_qkv" in name for name in tensors):
        return _original_hunyuan(tensors)
    if strange := next((name for name in tensors if "lora" not in name), None):
        return f"{INVALID}, for {strange} has no lora in its name"
    return None


def _released_wan(tensors: Tensors) -> str | None:
    names = {name.removeprefix("diffusion_model.") for name in tensors}
    if not any(name.startswith("blocks.") for name in names):
        return "ValueError: min() of an empty set, for no layer of a block is in it"
    if any("k_img" in name for name in names) != any("v_img" in name for name in names):
        return "ValueError: of k_img and v_img it takes both or none"
    left = sorted(name for name in names if not _taken(name))
    if left and not all(".diff" in name for name in left):
        return f"ValueError: `state_dict` should be empty, but has {left[0]}"
    return None


def _taken(name: str) -> bool:
    pattern = general(name)[0]
    if pattern.startswith("blocks.{}."):
        layer = pattern.removeprefix("blocks.{}.").partition(".lora_")[0].removesuffix(".alpha").removesuffix(".diff_b")
        return layer.replace(".", "_") in (*OF_BLOCKS, "cross_attn_k_img", "cross_attn_v_img")
    return name.startswith(OUTSIDE) and ".lora_" in name


def _kohya_wan(tensors: Tensors) -> str | None:
    names = {name.removeprefix("lora_unet_") for name in tensors}
    blocks = {name.split("blocks_")[1].split("_")[0] for name in names if "blocks_" in name}
    images = ["cross_attn_k_img", "cross_attn_v_img"]
    wanted = [*OF_BLOCKS, *(images if all(any(x in name for name in names) for x in ("k_img", "v_img")) else [])]
    whole = {
        f"blocks_{block}_{layer}.{part}"
        for block in range(len(blocks))
        for layer in wanted
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    if missing := sorted(whole - names):
        return f"KeyError: '{missing[0]}', for it takes this form only with every layer and alpha of all blocks"
    left = sorted(names - whole)
    return f"ValueError: `state_dict` should be empty, but has {left[0]}" if left else None


def _original_hunyuan(tensors: Tensors) -> str | None:
    if alpha := next((name for name in tensors if name.endswith(".alpha")), None):
        return f"it ends in an error at {alpha}"
    if refiner := next((name for name in tensors if "self_attn_qkv.lora_A" in name), None):
        return f"it cuts {refiner} in three"
    cut = [name for name, tensor in tensors.items() if "linear1.lora_A" in name and tensor.shape[1] != WIDTH]
    return f"it cuts {cut[0]} at a width of {WIDTH}" if cut else None


# ---- musubi-tuner, VideoX-Fun, EasyAnimate


def magnitudes_left_out(tensors: Tensors, network: Network) -> str | None:
    strange = next((name for name in tensors if name.endswith(("dora_scale", "dora_layer.weight"))), None)
    return None if strange is None else f"whether it takes {strange} depends on its version"


def pairs_and_alphas_alone(tensors: Tensors, network: Network) -> str | None:
    """VideoX-Fun puts a dot back before the endings that it knows, and takes a name apart at it."""
    known = ("lora_up.weight", "lora_down.weight", "_default.weight", "alpha")
    known += tuple(f"lora_{x}{slot}.weight" for x in "AB" for slot in ("", ".default"))
    strange = next((name for name in tensors if not name.endswith(known)), None)
    return None if strange is None else f"ValueError: {strange} is none of the tensors that it knows"


def kohya_alone(tensors: Tensors, network: Network) -> str | None:
    ending = (".lora_up.weight", ".lora_down.weight", ".alpha")
    strange = next((n for n in tensors if not (n.startswith("lora_unet_") and n.endswith(ending))), None)
    return None if strange is None else f"KeyError: it reads lora_unet__ names alone, and there is {strange}"


# ---- names


def _begin(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _replaced(name: str, table: Iterable[tuple[str, str]]) -> str:
    for old, new in table:
        name = name.replace(old, new)
    return name
