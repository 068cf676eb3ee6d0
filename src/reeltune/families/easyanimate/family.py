"""EasyAnimate V5.1 and V5: control, camera control, inpainting and text to video (https://huggingface.co/alibaba-pai).

Conditions by name, as `encode` gives them and `denoise` takes them:
    text      float B L D, states of Qwen2-VL (V5.1) or BERT (V5)
    text_t5   float B L D', states of T5 (V5)
    control   Posterior B C T h w, the control clip
    camera    float B 6 T h w, rays in latent cells
    ref       Posterior B C 1 h w, the reference picture as first latent frame of its own channels
    inpaint   Posterior B 1+C T h w: the mask (1 = keep; known exactly, so its variance is 0), then the kept clip
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.core.errors import UserError, refuse
from reeltune.core.types import Batch, Described, Encoded, Geometry, MaskLaw, Posterior, SizeLaw
from reeltune.diffusion.objective import Flow
from reeltune.families import configs, inpaint, latents, schedule, tokenizers, weights
from reeltune.families.easyanimate import prompts
from reeltune.families.easyanimate.keys import from_released, to_released
from reeltune.families.easyanimate.prompts import encode_text
from reeltune.families.spec import Family, Loading, Parts, needed

CLASS = "EasyAnimateTransformer3DModel"
TEXT_DIMS = ("text_embed_dim", "text_embed_dim_t5")  # null where there is no such encoder
CAMERA_SCALE = 6.0  # of the rays, as released models saw them (measured on the reference, 2026-11)
CAMERA_CHANNELS = 6


# ---- read


def read(folder: Path, family: Family, how: Loading) -> Parts:
    from diffusers import AutoencoderKLMagvit, EasyAnimateTransformer3DModel

    from reeltune.families.easyanimate.net import corrected

    config = configs.read_config(folder / "transformer")
    net = weights.load_component(
        EasyAnimateTransformer3DModel,
        folder / "transformer",
        how.dtype,
        how.device,
        replacement=how.transformer_path,
        names=partial(from_released, config=config),
        fake=how.fake,
        quantisation=how.quantisation,
    )
    parts = Parts(corrected(net), config=config)
    parts.loaders["vae"] = partial(weights.load_frozen, AutoencoderKLMagvit, folder / "vae", how.frozen_dtype, how.fake)
    parts.extras["tokenizer"] = tokenizers.load_tokenizer(folder / "tokenizer")
    if "text_t5" in family.caption:
        from transformers import BertModel, T5EncoderModel

        for name, cls in (("", BertModel), ("_2", T5EncoderModel)):
            parts.loaders[f"text{name}"] = partial(
                weights.load_encoder, cls, folder / f"text_encoder{name}", how.frozen_dtype, how.fake
            )
        parts.extras["tokenizer_2"] = tokenizers.load_tokenizer(folder / "tokenizer_2")
    else:
        tokenizers.check_chat_template(parts.extras["tokenizer"], folder / "tokenizer")
        parts.loaders["text"] = partial(_load_qwen, folder / "text_encoder", how.frozen_dtype, how.fake)
    return parts


def _load_qwen(folder: Path, dtype: torch.dtype | None, fake: AbstractContextManager | None) -> nn.Module:
    from transformers import Qwen2VLForConditionalGeneration

    qwen = weights.load_encoder(Qwen2VLForConditionalGeneration, folder, dtype, fake).model
    qwen.visual = None  # only captions are read
    return qwen


# ---- encode


def encode_clips(parts: Parts, batch: Batch, mode: str, options: dict[str, Any]) -> Encoded:
    pixels = batch.pixels_BFCHW
    network: Any = parts.net
    cond: dict[str, Tensor | Posterior] = {}
    with parts.borrow("vae") as vae:
        encoded = partial(latents.encode_clip, vae)
        x0 = encoded(pixels)
        if mode in ("control", "control_ref"):
            cond["control"] = encoded(needed(batch.control_BFCHW))
        if mode in ("control_ref", "control_ref_camera"):
            shown = torch.arange(len(pixels), device=pixels.device), batch.ref_frame_B
            cond["ref"] = encoded(pixels[shown][:, None])
        if mode == "inpaint":
            cond["inpaint"] = inpaint.condition(
                encoded,
                pixels,
                needed(batch.mask_BFHW),
                x0.mean.shape[2:],
                scale=vae.config.scaling_factor,
                seeds=batch.seen_seeds if network.config.add_noise_in_inpaint_model else None,
            )
    if mode == "control_ref_camera":
        rays_BCFHW = needed(batch.camera_BFCHW).transpose(1, 2)
        cond["camera"] = latents.to_cells(rays_BCFHW, x0.mean.shape[2:]) * CAMERA_SCALE
    return Encoded(x0, cond)


def describe(parts: Parts, captions: list[str], picture_BCHW: Tensor | None = None) -> Described:
    return Described(encode_text(parts, captions))


# ---- denoise and decode


def denoise(net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The network's answer; conditioning channels in the released order: control, camera or inpainting, reference."""
    channels = [cond[name] for name in ("control", "camera", "inpaint") if name in cond]
    if "ref" in cond:
        channels.append(F.pad(cond["ref"], (0, 0, 0, 0, 0, x_BCThw.shape[2] - 1)))
    return net(
        hidden_states=x_BCThw,
        timestep=timestep_B,
        encoder_hidden_states=cond["text"].to(x_BCThw),
        encoder_hidden_states_t5=cond["text_t5"].to(x_BCThw) if "text_t5" in cond else None,
        control_latents=torch.cat(channels, 1).to(x_BCThw) if channels else None,
        return_dict=False,
    )[0]


def decode(parts: Parts, x0_BCThw: Tensor) -> Tensor:
    """pixels_BFCHW float32, about [-1, 1]."""
    with parts.borrow("vae") as vae:
        return latents.decode_clip(vae, x0_BCThw)


# ---- files: those of both layouts differ in a few tensors' names alone


def save(folder: Path, state: dict[str, Tensor], config: dict[str, Any], *, diffusers: bool = False) -> None:
    """config is written back as it was read, but for what the other layout's class does not know or asks for."""
    if diffusers:
        from diffusers import EasyAnimateTransformer3DModel

        own = {name: value for name, value in config.items() if name.startswith("_")}
        weights.write_component(folder, state, own | configs.arguments_of(EasyAnimateTransformer3DModel, config))
    else:
        with_ref = "ref" in variant(config, str(folder)).drop
        asked = {"add_ref_latent_in_control_model": True} if with_ref else {}
        weights.write_component(folder, to_released(state, config), config | asked)


# ---- the family and its variants

CONTROL_REF = Family(
    name="easyanimate/v5.1_control_ref",
    source="https://huggingface.co/alibaba-pai/EasyAnimateV5.1-12b-zh-Control",
    geometry=Geometry(time_stride=4, space_stride=8, patch=2, channels=16),
    objective=Flow(shift=1.0, steps=1000),
    modes=("control_ref",),
    needs={"control_ref": ("control", "ref")},
    drop={"control": 0.2, "ref": 0.2},  # measured on the reference, 2026-11
    blocks=("EasyAnimateTransformerBlock",),
    vae_tiles=False,  # diffusers 0.42 put encoded tiles side by side with their overlaps (measured, 2026-11)
    native_fps=8.0,  # https://github.com/aigc-apps/EasyAnimate
    size_law=SizeLaw(first_weight=0.75, nearest_rung=None),
    read=read,
    encode_clips=encode_clips,
    describe=describe,
    keep=inpaint.kept,
    denoise=denoise,
    decode=decode,
    to_released=to_released,
    from_released=from_released,
    save=save,
)
CONTROL = replace(
    CONTROL_REF,
    name="easyanimate/v5.1_control",
    modes=("control",),
    needs={"control": ("control",)},
    drop={"control": 0.2},
)
CAMERA = replace(
    CONTROL_REF,
    name="easyanimate/v5.1_control_camera",
    source="https://huggingface.co/alibaba-pai/EasyAnimateV5.1-12b-zh-Control-Camera",
    modes=("control_ref_camera",),
    needs={"control_ref_camera": ("camera", "ref")},
    drop={"ref": 0.2},
)
INP = replace(
    CONTROL_REF,
    name="easyanimate/v5.1_inp",
    source="https://huggingface.co/alibaba-pai/EasyAnimateV5.1-12b-zh-InP",
    modes=("inpaint",),
    needs={"inpaint": ("mask",)},
    drop={"inpaint": 0.9},  # of samples where everything is to be generated
    masks={"inpaint": MaskLaw(picture={"block": 0.2, "all": 0.8}, spots_on_all_frames=True)},  # in its own training
)
T2V = replace(
    CONTROL_REF,
    name="easyanimate/v5.1_t2v",
    source="https://huggingface.co/alibaba-pai/EasyAnimateV5.1-12b-zh",
    modes=("normal",),
    needs={"normal": ()},
    drop={},
)


def variant(config: dict[str, Any], where: str) -> Family:
    """Which variant a transformer of this config.json is. Raises UserError naming what was found."""
    fixed = {  # what the network is not written for: the only value of it
        "time_position_encoding_type": "3d_rope",
        "resize_inpaint_mask_directly": True,
        "enable_clip_in_inpaint": False,
        "clip_channels": None,
        "ref_channels": None,
        "swa_layers": None,
    }
    configs.require(config, fixed, where)
    channels = config.get("out_channels") or 16
    extra = (config.get("in_channels") or 16) - channels
    supported = {
        2 * channels: CONTROL_REF,
        channels: CONTROL,
        CAMERA_CHANNELS + channels: CAMERA,
        1 + channels: INP,
        0: T2V,
    }
    if extra not in supported:
        raise UserError(
            where,
            f"an EasyAnimate network with {extra} conditioning channels; supported are "
            + ", ".join(f"{count} ({family.name})" for count, family in supported.items()),
        )
    family = supported[extra]
    if config.get("text_embed_dim_t5") is None:
        return family
    return replace(
        family,
        name=family.name.replace("v5.1", "v5"),
        source=family.source.replace("V5.1", "V5"),
        caption=("text", "text_t5"),
    )


def find(folder: Path, settings: dict[str, Any]) -> Family | None:
    """The variant in a checkpoint folder, from its JSON files alone; None if its transformer is no EasyAnimate.

    Raises UserError for one that is not supported, or lacks files.
    """
    config = configs.read_config(folder / "transformer")
    vae = configs.read_config(folder / "vae")
    refuse_older(str(folder), config, (settings.get("vae_kwargs") or {}) | vae)
    if config.get("_class_name") != CLASS:
        return None

    from diffusers import AutoencoderKLMagvit, EasyAnimateTransformer3DModel

    configs.check(EasyAnimateTransformer3DModel, config, str(folder / "transformer/config.json"), TEXT_DIMS)
    configs.check(AutoencoderKLMagvit, vae, str(folder / "vae/config.json"))
    family = variant(config, str(folder / "transformer"))
    refuse_other_yaml(settings, family, folder)
    two = ("text_encoder_2", "tokenizer_2") if "text_t5" in family.caption else ()
    paths = weights.components(folder, ("transformer", "vae", "text_encoder", "tokenizer", *two, "scheduler"))
    scales = len(vae.get("block_out_channels", (128, 256, 512, 512)))
    geometry = Geometry(
        time_stride=2 ** (scales - 2),
        space_stride=2 ** (scales - 1),
        patch=config.get("patch_size") or 2,
        channels=config.get("out_channels") or 16,
    )
    return replace(
        family,
        geometry=geometry,
        objective=schedule.read(paths["scheduler"]),
        frozen_files=weights.encoding_files(paths),
        token_limits=prompts.token_limits({name: paths[name] for name in paths if name.startswith("tokenizer")}),
    )


def refuse_older(where: str, config: dict[str, Any], vae: dict[str, Any]) -> None:
    """Raises UserError for EasyAnimate V1 to V4, told apart by their classes and kinds of VAE."""
    found = {"HunyuanTransformer3DModel": "V4", "Transformer3DModel": "V2"}.get(config.get("_class_name", ""))
    if found == "V2" and "AutoencoderKL" in (vae.get("_class_name"), vae.get("vae_type")):
        found = "V1"
    elif found == "V2" and vae.get("slice_compression_vae"):
        found = "V3"
    if found:
        raise UserError(where, f"an EasyAnimate {found} checkpoint; supported are EasyAnimate V5.1 and V5")


def refuse_other_yaml(settings: dict[str, Any], family: Family, folder: Path) -> None:
    """Raises UserError for the yaml of another version than the checkpoint."""
    own = {"transformer_type": CLASS, "enable_multi_text_encoder": "text_t5" in family.caption}
    said = (settings.get("transformer_additional_kwargs") or {}) | (settings.get("text_encoder_kwargs") or {})
    refuse(
        "config_path",
        [
            f"{name} is {said[name]}, but {folder} is {family.name}, where it is {value}; leave config_path out, or "
            "give that version's yaml"
            for name, value in own.items()
            if said.get(name, value) != value
        ],
    )
