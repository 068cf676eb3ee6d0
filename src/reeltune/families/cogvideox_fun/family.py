"""CogVideoX-Fun 2b and 5b, V1.0 to V1.5: inpainting and text to video (https://huggingface.co/alibaba-pai).

Conditions by name, as `encode` gives them and `denoise` takes them:
    text      float B L D, states of T5
    inpaint   Posterior B 1+C T h w: the mask (1 = keep; known exactly, so its variance is 0), then the kept clip
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Described, Encoded, Geometry, Posterior, SizeLaw
from reeltune.diffusion.objective import Ddpm
from reeltune.families import configs, inpaint, latents, schedule, tokenizers, weights
from reeltune.families.spec import Family, Loading, Parts, TokenLimit, needed
from reeltune.families.text import embed_padded

CLASS = "CogVideoXTransformer3DModel"
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


# ---- read


def read(folder: Path, family: Family, how: Loading) -> Parts:
    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5EncoderModel

    from reeltune.families.cogvideox_fun.net import CogVideoXFun, corrected

    place = folder / "transformer"
    net = weights.load_component(
        CogVideoXFun,
        place,
        how.dtype,
        how.device,
        replacement=how.transformer_path,
        correct=corrected,
        fake=how.fake,
        quantisation=how.quantisation,
    )
    parts = Parts(net, config=configs.read_config(place))
    parts.loaders["vae"] = partial(
        weights.load_frozen, AutoencoderKLCogVideoX, folder / "vae", how.frozen_dtype, how.fake
    )
    parts.loaders["text"] = partial(
        weights.load_encoder, T5EncoderModel, folder / "text_encoder", how.frozen_dtype, how.fake
    )
    parts.extras["tokenizer"] = tokenizers.load_tokenizer(folder / "tokenizer")
    return parts


# ---- encode


def encode_text(parts: Parts, captions: list[str]) -> Tensor:
    """float32 B L D, L = the network's text length (226)."""
    with parts.borrow("text") as encoder:
        return embed_padded(parts.extras["tokenizer"], encoder, captions, _text_length(parts.net))


def _text_length(net: Any) -> int:
    return net.config.max_text_seq_length


def describe(parts: Parts, captions: list[str], picture_BCHW: Tensor | None = None) -> Described:
    return Described({"text": encode_text(parts, captions)})


def encode_clips(parts: Parts, batch: Batch, mode: str, options: dict[str, Any]) -> Encoded:
    pixels = batch.pixels_BFCHW
    cond: dict[str, Tensor | Posterior] = {}
    with parts.borrow("vae") as vae:
        encoded = partial(latents.encode_clip, vae)
        x0 = encoded(pixels)
        if mode == "inpaint":
            cond["inpaint"] = inpaint.condition(
                encoded,
                pixels,
                needed(batch.mask_BFHW),
                x0.mean.shape[2:],
                scale=vae.config.scaling_factor,
                seeds=batch.seen_seeds if parts.config.get("add_noise_in_inpaint_model") else None,
            )
    return Encoded(x0, cond)


# ---- denoise and decode


def denoise(net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The network's answer; mask and kept clip follow the noisy clip. The network has time before channels."""
    x = torch.cat([x_BCThw, cond["inpaint"].to(x_BCThw)], 1) if "inpaint" in cond else x_BCThw
    return net(x.transpose(1, 2), cond["text"].to(x), timestep_B).transpose(1, 2)


@torch.no_grad()
def decode(parts: Parts, x0_BCThw: Tensor) -> Tensor:
    """pixels_BFCHW float32 in [-1, 1]."""
    from reeltune.families.cogvideox_fun.net import decode_in_pairs

    with parts.borrow("vae") as vae:
        z = (x0_BCThw.float() / vae.config.scaling_factor).to(latents.dtype_of(vae))
        return decode_in_pairs(vae, z).float().transpose(1, 2)


# ---- files: both layouts name their tensors alike


def same(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    return dict(state)


def save(folder: Path, state: dict[str, Tensor], config: dict[str, Any], *, diffusers: bool = False) -> None:
    """config is written back as it was read; for diffusers without what its class does not know."""
    if diffusers:
        from diffusers import CogVideoXTransformer3DModel

        own = {name: value for name, value in config.items() if name.startswith("_")}
        config = own | configs.arguments_of(CogVideoXTransformer3DModel, config)
    weights.write_component(folder, state, config)


# ---- the family and its variants

INP = Family(
    name="cogvideox_fun/v1.1_5b_inp",
    source="https://huggingface.co/alibaba-pai/CogVideoX-Fun-V1.1-5b-InP",
    geometry=Geometry(time_stride=4, space_stride=8, patch=2, channels=16),
    objective=Ddpm("v_prediction", rescale_betas_zero_snr=True),
    modes=("inpaint",),
    needs={"inpaint": ("mask",)},
    drop={"inpaint": 0.9},  # of samples where everything is to be generated (measured on the reference, 2026-11)
    blocks=("CogVideoXBlock",),
    native_fps=8.0,  # https://github.com/aigc-apps/CogVideoX-Fun
    size_law=SizeLaw(first_weight=0.75, nearest_rung=None),
    read=read,
    encode_clips=encode_clips,
    describe=describe,
    keep=inpaint.kept,
    denoise=denoise,
    decode=decode,
    to_released=same,
    from_released=same,
    save=save,
)


def variant(config: dict[str, Any], where: str) -> Family:
    """Which variant a transformer of this config.json is. Raises UserError naming what was found."""
    fixed = {"use_learned_positional_embeddings": False, "ofs_embed_dim": None}  # those of the I2V networks of others
    configs.require(config, fixed, where)
    channels = config.get("out_channels") or 16
    extra = config.get("in_channels", 16) - channels
    if extra not in (0, channels + 1):
        raise UserError(
            where,
            f"a CogVideoX network with {extra} conditioning channels; supported are {channels + 1} (inpainting) and "
            "0 (text to video)",
        )
    version = "V1.5-" if config.get("patch_size_t") else "V1.1-" if config.get("add_noise_in_inpaint_model") else ""
    size = "5b" if config.get("use_rotary_positional_embeddings") else "2b"
    family = replace(
        INP,
        name=f"cogvideox_fun/{(version or 'V1.0-').lower().replace('-', '_')}{size}_{'inp' if extra else 't2v'}",
        source=f"https://huggingface.co/alibaba-pai/CogVideoX-Fun-{version}{size}-InP",
    )
    return family if extra else replace(family, modes=("normal",), needs={"normal": ()}, drop={})


def find(folder: Path, settings: dict[str, Any]) -> Family | None:
    """The variant in a checkpoint folder, from its JSON files alone; None if its transformer is no CogVideoX.

    Raises UserError for one that is not supported, or lacks files.
    """
    config = configs.read_config(folder / "transformer")
    if config.get("_class_name") != CLASS:
        return None

    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    configs.check(CogVideoXTransformer3DModel, config, str(folder / "transformer/config.json"))
    family = variant(config, str(folder / "transformer"))
    paths = weights.components(folder, COMPONENTS)
    vae = configs.read_config(paths["vae"])
    configs.check(AutoencoderKLCogVideoX, vae, str(paths["vae"] / "config.json"))
    geometry = Geometry(
        time_stride=int(vae.get("temporal_compression_ratio", 4)),
        space_stride=2 ** (len(vae.get("block_out_channels", (128, 256, 256, 512))) - 1),
        patch=config.get("patch_size", 2),
        patch_time=config.get("patch_size_t") or 1,
        channels=config.get("out_channels") or 16,
    )
    table = not config.get("use_rotary_positional_embeddings")
    return replace(
        family,
        geometry=geometry,
        objective=schedule.read(paths["scheduler"]),
        frozen_files=weights.encoding_files(paths),
        token_limits=(TokenLimit("the text encoder", paths["tokenizer"], config.get("max_text_seq_length", 226)),),
        most_frames=geometry.legal_frames(config.get("sample_frames", 49)) if table else None,
    )
