"""Every network's sizes, from the shapes of its weights; config.json only for what shapes do not tell.

The transformer's config.json comes in four dialects: as released (in_dim, dim), as the original tools save it
(in_channels, hidden_size), DiffSynth's (has_image_input, has_ref_conv) and diffusers' (attention_head_dim).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import isqrt, prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import AGAIN, brief
from reeltune.families import configs
from reeltune.families.tensor_files import notice
from reeltune.families.wan_fun import keys

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, UMT5Config

State = dict[str, Tensor]

TEXT_LENGTH = 512  # diffusers' attention finds the image tokens by counting 512 text tokens from the end

NAMES = {  # ours: what the dialects call it
    "in_channels": ("in_dim", "in_channels"),
    "out_channels": ("out_dim", "out_channels"),
    "width": ("dim", "hidden_size"),
    "ffn_dim": ("ffn_dim",),
    "freq_dim": ("freq_dim",),
    "text_dim": ("text_dim",),
    "num_layers": ("num_layers",),
}
HEADS = ("num_heads", "num_attention_heads")
HEAD_DIM = 128  # of every released Wan transformer, where config.json does not say
RELEASED_HEADS = {1536: 12, 3072: 24, 5120: 40}  # of the 1.3B, 5B and 14B networks
CHANNELS_2_2 = 48  # of the latents of Wan2.2's small models
ADAPTER_SHRINK = {
    16: 8,
    CHANNELS_2_2: 16,
}  # latent channels: pixels per cell, where a camera model's config.json does not say


TYPES = {  # of what is read of any dialect
    **dict.fromkeys((*(key for keys in NAMES.values() for key in keys), *HEADS, "text_len"), int | None),
    "downscale_factor_control_adapter": int | None,
    "in_dim_ref_conv": int | None,
    **dict.fromkeys(("add_ref_conv", "has_ref_conv", "add_control_adapter", "has_image_input"), bool | None),
    "eps": float,
}


FLAGS = {  # what config.json may say of parts: the tensor that shows it
    "ref_conv.weight": ("add_ref_conv", "has_ref_conv"),
    "control_adapter.conv.weight": ("add_control_adapter",),
    "condition_embedder.image_embedder.norm1.weight": ("has_image_input",),
    "blocks.0.attn1.norm_q.weight": ("qk_norm",),
    "blocks.0.norm2.weight": ("cross_attn_norm",),
}


def is_wan(state: State) -> bool:
    """Whether these (in our names) are the tensors of a Wan transformer."""
    wanted = ("patch_embedding.weight", "condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight")
    return all(name in state for name in wanted)


def transformer(state: State, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of WanFunTransformer from its tensors, in our names.

    Raises UserError where config.json contradicts the weights, or names what is not supported.
    """
    configs.check_types(config, TYPES, where)
    embedders = {name: f"condition_embedder.{name}.linear_1.weight" for name in ("text_embedder", "time_embedder")}
    needed = dict.fromkeys((*embedders.values(), "proj_out.weight", "blocks.0.ffn.net.0.proj.weight"), 2)
    _need(state, {**needed, "patch_embedding.weight": 5}, where, "a Wan transformer")
    width, in_channels, *patch = state["patch_embedding.weight"].shape
    found = {
        "in_channels": in_channels,
        "out_channels": state["proj_out.weight"].shape[0] // prod(patch),
        "width": width,
        "ffn_dim": state["blocks.0.ffn.net.0.proj.weight"].shape[0],
        "freq_dim": state[embedders["time_embedder"]].shape[1],
        "text_dim": state[embedders["text_embedder"]].shape[1],
        "num_layers": count(state, "blocks.", where),
    }
    problems = []
    for name, size in found.items():
        said = {key: config[key] for key in NAMES[name] if config.get(key) is not None}
        if said and size not in said.values():  # one of two is enough: the original tools save both spellings
            problems.append(f"config.json has {said}, but the weights have {size}")
    for tensor, flags in FLAGS.items():
        problems += [
            f"config.json has {flag} {config[flag]}, but the weights have {'a' if tensor in state else 'no'} {tensor}"
            for flag in flags
            if config.get(flag) is not None and bool(config[flag]) != (tensor in state)
        ]
    if config.get("patch_size") not in (None, patch, tuple(patch)):
        problems.append(f"config.json has patch_size {brief(config['patch_size'])}, but the weights have {patch}")
    ref = state.get("ref_conv.weight")
    if ref is not None and config.get("in_dim_ref_conv") not in (None, ref.shape[1]):
        problems.append(f"in_dim_ref_conv is {config['in_dim_ref_conv']}, but the weights have {ref.shape[1]}")
    if not 0 < config.get("eps", 1e-6) <= 1:
        problems.append(f"eps is {config['eps']}; expected more than 0 and at most 1")
    heads = next((config[key] for key in HEADS if config.get(key)), width // HEAD_DIM)
    if width in RELEASED_HEADS and heads != RELEASED_HEADS[width]:
        problems.append(
            f"num_heads is {heads}, but every released network of width {width} has {RELEASED_HEADS[width]}"
        )
    if heads < 1 or width % heads:
        problems.append(f"{heads} attention heads do not divide the width {width}; config.json must give num_heads")
        heads = 1
    if config.get("text_len", TEXT_LENGTH) != TEXT_LENGTH:
        problems.append(f"text_len is {config['text_len']}; only {TEXT_LENGTH} is supported")
    refuse(where, problems)

    image = state.get("condition_embedder.image_embedder.norm1.weight")
    adapter = state.get("control_adapter.conv.weight")
    shrink = config.get("downscale_factor_control_adapter") or ADAPTER_SHRINK.get(found["out_channels"], 8)
    axes = {"condition_embedder.image_embedder.norm1.weight": 1, "ref_conv.weight": 4, "control_adapter.conv.weight": 4}
    _need(state, {name: ndim for name, ndim in axes.items() if name in state}, where, "a Wan transformer")
    del found["width"]
    return found | {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "eps": config.get("eps", 1e-6),
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
        "image_dim": None if image is None else image.shape[0],
        "added_kv_proj_dim": None if image is None else width,
        "ref_channels": 0 if ref is None else ref.shape[1],
        "camera_channels": 0 if adapter is None else adapter.shape[1] // shrink**2,
        "camera_shrink": shrink,
    }


def tell_heads(arguments: dict[str, Any], where: str) -> None:
    """A notice of heads that no release has: weights do not tell, and a wrong number trains and answers noise."""
    width = arguments["attention_head_dim"]
    if width != HEAD_DIM:
        rule = f"config.json gives attention heads of width {width}, where released networks have {HEAD_DIM}"
        notice(f"{where}: {rule}; fine for a small network of your own, as the demo's; else restore that file")


def released_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """The released dialect's config.json for a network of these arguments."""
    width = arguments["num_attention_heads"] * arguments["attention_head_dim"]
    extra = arguments["in_channels"] - arguments["out_channels"]
    by_token = arguments["out_channels"] == CHANNELS_2_2
    sees_clip = arguments["image_dim"] is not None or extra > arguments["out_channels"]
    config = {
        "_class_name": "WanModel",
        "model_type": "ti2v" if by_token else "i2v" if sees_clip else "t2v",
        "patch_size": list(arguments["patch_size"]),
        "in_dim": arguments["in_channels"],
        "out_dim": arguments["out_channels"],
        "dim": width,
        "ffn_dim": arguments["ffn_dim"],
        "freq_dim": arguments["freq_dim"],
        "text_dim": arguments["text_dim"],
        "text_len": TEXT_LENGTH,
        "num_heads": arguments["num_attention_heads"],
        "num_layers": arguments["num_layers"],
        "eps": arguments["eps"],
    }
    if arguments["ref_channels"]:
        config |= {"add_ref_conv": True, "in_dim_ref_conv": arguments["ref_channels"]}
    if arguments["camera_channels"]:
        config |= {
            "add_control_adapter": True,
            "in_dim_control_adapter": arguments["camera_channels"],
            "downscale_factor_control_adapter": arguments["camera_shrink"],
        }
    return config


def diffusers_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """diffusers' config.json; of what diffusers' class does not know, only what weights do not tell."""
    known = {name: value for name, value in arguments.items() if not name.startswith(("ref_", "camera_"))}
    if arguments["camera_channels"]:
        known["downscale_factor_control_adapter"] = arguments["camera_shrink"]
    return {"_class_name": "WanTransformer3DModel", **known, "patch_size": list(arguments["patch_size"])}


LATENTS_2_2 = {  # of Wan2.2's VAE (https://github.com/Wan-Video/Wan2.2/blob/main/wan/modules/vae2_2.py)
    "latents_mean": [
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
        *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
        *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ],
    "latents_std": [
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
        *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
        *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ],
}


def vae(state: State, config: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of AutoencoderKLWan. Statistics of latents: config.json's, or those of Wan2.1 or Wan2.2.

    Raises UserError where there is not one of each per latent channel.
    """
    _need(state, {"encoder.conv_in.weight": 5, "post_quant_conv.weight": 5}, where, "a Wan VAE")
    configs.check_types(config, dict.fromkeys(("latents_mean", "latents_std"), list[float]), where)
    channels = state["post_quant_conv.weight"].shape[0]
    is_2_2 = keys.is_vae_2_2(state)

    from diffusers import AutoencoderKLWan

    default = inspect.signature(AutoencoderKLWan.__init__).parameters  # those of Wan2.1
    known = LATENTS_2_2 if is_2_2 else {name: default[name].default for name in LATENTS_2_2}
    found = {name: config.get(name, known[name]) for name in known}
    refuse(
        where,
        [
            f"{channels} latent channels, but {name} has {len(values)} entries; give them in the VAE's config.json"
            for name, values in found.items()
            if len(values) != channels
        ],
    )
    base_dim, pixels = state["encoder.conv_in.weight"].shape[:2]
    found |= {"base_dim": base_dim, "z_dim": channels}
    if not is_2_2:
        return found
    _need(state, {"decoder.conv_out.weight": 5}, where, "a Wan2.2 VAE")
    return found | {
        "decoder_base_dim": state["decoder.conv_out.weight"].shape[1],
        "is_residual": True,
        "in_channels": pixels,  # of patches of 2 x 2 pixels
        "out_channels": pixels,
        "patch_size": isqrt(pixels // 3),
        "scale_factor_spatial": 8 * isqrt(pixels // 3),
    }


def text(state: State, where: str) -> UMT5Config:
    attention, feed = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    bias = f"{attention}.relative_attention_bias.weight"
    needed: dict[str, int] = dict.fromkeys(("shared.weight", f"{attention}.q.weight", bias, feed), 2)
    _need(state, needed, where, "a UMT5 encoder")
    vocabulary, width = state["shared.weight"].shape
    buckets, heads = state[bias].shape

    from transformers import UMT5Config

    return UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=state[f"{attention}.q.weight"].shape[0] // heads,
        d_ff=state[feed].shape[1],
        num_layers=count(state, "encoder.block.", where),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
    )


def image(state: State, config: dict[str, Any], where: str) -> CLIPVisionConfig:
    """CLIP ViT-H/14 or a smaller one; 16 heads and exact GELU as released (https://github.com/mlfoundations/open_clip)."""
    patches, positions = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
    needed = {patches: 4, positions: 2, "encoder.layers.0.mlp.fc1.weight": 2}
    _need(state, needed, where, "a CLIP picture tower")
    configs.check_types(config, {"num_attention_heads": int, "hidden_act": str}, where)
    width, _, _, patch = state[patches].shape
    places = state[positions].shape[0]

    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=count(state, "encoder.layers.", where),
        num_attention_heads=config.get("num_attention_heads", 16),
        image_size=patch * isqrt(places - 1),
        patch_size=patch,
        hidden_act=config.get("hidden_act", "gelu"),
        layer_norm_eps=1e-5,
    )


def count(state: State, prefix: str, where: str) -> int:
    """How many numbered layers there are under `prefix`. Raises UserError where the numbers are not 0, 1, 2, ..."""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)}
    if numbers != {str(i) for i in range(len(numbers))}:
        raise UserError(where, f"layers {prefix}0, 1, 2 and so on are not all there, or others are; {AGAIN}")
    return len(numbers)


def _need(state: State, axes: Mapping[str, int], where: str, what: str) -> None:
    """axes: name -> of how many axes the tensor is, none of them empty."""
    missing = [name for name in axes if name not in state]
    if missing:
        raise UserError(where, f"is not {what}: it has no {', '.join(missing)}, but {', '.join([*state][:3])}, …")
    refuse(
        where,
        [
            f"is not {what}: {name} is {tuple(state[name].shape)}, which should have {count} axes"
            for name, count in axes.items()
            if state[name].ndim != count or not state[name].numel()
        ],
    )
