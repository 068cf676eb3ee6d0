"""Wan2.1-Fun: control, camera control and inpainting video models (https://huggingface.co/alibaba-pai).

Conditions by name, as `encode` gives them and `denoise` takes them:
    text      float B 512 D, zeros after the caption's last token
    image     float B 257 D, CLIP tokens of the reference picture
    control   Posterior B C T h w, the control clip
    ref       Posterior B C 1 h w, the reference picture as first latent frame of its own channels
    full_ref  Posterior B C 1 h w, the same picture as tokens of its own (V1.1)
    camera    float B 24 T H W, packed rays
    inpaint   Posterior B 4+C T h w: the mask (1 = keep; known exactly, so its variance is 0), then the kept clip
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Described, Encoded, Geometry, MaskLaw, Posterior, SizeLaw
from reeltune.diffusion.objective import Flow
from reeltune.families import context, schedule, text, tokenizers
from reeltune.families.inpaint import join_mask, kept_unless_all_masked
from reeltune.families.spec import Family, Loading, Parts, TokenLimit, needed
from reeltune.families.wan_fun import keys, layout, sizes
from reeltune.families.wan_fun.net import TEXT_LENGTH

MASK_CHANNELS = 4  # one per pixel frame of a latent frame
IMAGE_TOKENS = 257  # CLIP's class token and 16 x 16 patches
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # https://github.com/openai/CLIP/blob/main/clip/clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# Where diffusers shards Wan's tokens, but for the timestep, of which all of a clip have the same here.
SPLIT = {name: how for name, how in WanTransformer3DModel._cp_plan.items() if name}


# ---- read


def read(folder: Path, family: Family, how: Loading) -> Parts:
    files: layout.Files = family.options["files"]
    net, config = layout.load_transformer(files.transformer, how)
    parts = Parts(net, config=config)
    parts.extras["image_dim"] = net.config["image_dim"]
    parts.loaders["vae"] = partial(layout.load_vae, files.vae, how.frozen_dtype, how.fake)
    parts.loaders["text"] = partial(layout.load_text, files.text, how.frozen_dtype, how.fake)
    if files.image is not None:
        parts.loaders["image"] = partial(layout.load_image, files.image, how.frozen_dtype, how.fake)
    parts.extras["tokenizer"] = tokenizers.load_tokenizer(files.tokenizer)
    return parts


# ---- encode


def encode_clips(parts: Parts, batch: Batch, mode: str, options: dict[str, Any]) -> Encoded:
    """What the frozen networks make of a batch, in float32.

    options: add_full_ref_image_in_self_attention.
    """
    pixels = batch.pixels_BFCHW
    cond: dict[str, Tensor | Posterior] = {}
    with parts.borrow("vae") as vae:
        latents = partial(encode_clip, vae)
        x0 = latents(pixels)
        if mode in ("control", "control_ref"):
            cond["control"] = latents(needed(batch.control_BFCHW))
        if mode in ("control_ref", "control_ref_camera"):
            cond["ref"] = latents(frames_at(pixels, batch.ref_frame_B)[:, None])
            if options.get("add_full_ref_image_in_self_attention"):
                cond["full_ref"] = cond["ref"]
        if mode in ("inpaint", "i2v"):
            mask_BFHW = needed(batch.mask_BFHW)
            given = latents(pixels * ~mask_BFHW[:, :, None])  # masked pixels are mid-grey, 0
            cond["inpaint"] = join_mask(pack_mask(mask_BFHW, given.mean.shape[-2:]), given)
    if mode == "control_ref_camera":
        cond["camera"] = pack_frames(needed(batch.camera_BFCHW))
    if mode != "control":
        seen_B = torch.zeros_like(batch.ref_frame_B) if "inpaint" in cond else batch.ref_frame_B
        cond["image"] = image_features(parts, cut_to_8_bit(frames_at(pixels, seen_B)))
    elif parts.extras["image_dim"] is not None:  # as the models are used without a picture
        cond["ref"] = torch.zeros_like(x0.mean[:, :, :1])
        cond["image"] = x0.mean.new_zeros(len(pixels), IMAGE_TOKENS, parts.extras["image_dim"])
    return Encoded(x0, cond)


def kept(batch: Batch, mode: str) -> dict[str, Tensor]:
    """The reference picture's channels are kept only where it is the first frame, its tokens only where it is not
    (measured on the reference, 2026-11); inpainting is dropped only where everything is to be generated.
    """
    keep, first_B = dict(batch.keep), batch.ref_frame_B == 0
    if mode in ("control_ref", "control_ref_camera"):
        for name, where_B in (("ref", first_B), ("full_ref", ~first_B)):
            keep[name] = keep.get(name, torch.ones_like(where_B)) & where_B
    if mode in ("inpaint", "i2v"):
        keep["inpaint"] = kept_unless_all_masked(keep, needed(batch.mask_BFHW))
    return keep


def describe(parts: Parts, captions: list[str], picture_BCHW: Tensor | None = None) -> Described:
    return Described({"text": encode_text(parts, captions)})


def encode_text(parts: Parts, captions: list[str]) -> Tensor:
    """float32 B 512 D."""
    with torch.no_grad(), parts.borrow("text") as encoder:
        return text.embed(parts.extras["tokenizer"], encoder, captions, TEXT_LENGTH)


def image_features(parts: Parts, image_u8_BCHW: Tensor) -> Tensor:
    """float32 B 257 D: CLIP's tokens before its last block."""
    with torch.no_grad(), parts.borrow("image") as tower:
        seen = clip_pixels(image_u8_BCHW, tower.config.image_size).to(next(tower.parameters()).dtype)
        return tower(pixel_values=seen, output_hidden_states=True).hidden_states[-2].float()


def cut_to_8_bit(pixels_BCHW: Tensor) -> Tensor:
    """uint8 of [-1, 1] pixels, cut and not rounded, as released models saw it (measured on the reference, 2026-11)."""
    return ((pixels_BCHW * 0.5 + 0.5) * 255).to(torch.uint8)


def clip_pixels(image_u8_BCHW: Tensor, side: int) -> Tensor:
    """A picture as CLIP sees it: stretched to a square (bicubic, no antialias), standardised."""
    pixels = image_u8_BCHW.float().div(255).sub(0.5).div(0.5)
    square = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)
    mean, std = (square.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (square * 0.5 + 0.5 - mean) / std


def encode_clip(vae: Any, pixels_BFCHW: Tensor) -> Posterior:
    """The mean in the network's units, (mean - m) / s per channel; the log-variance raw, as released models saw it."""
    latents = vae.encode(pixels_BFCHW.transpose(1, 2).to(vae.dtype)).latent_dist
    mean, std = _statistics(vae, pixels_BFCHW.device)
    return Posterior((latents.mean.float() - mean) / std, latents.logvar.float())


def _statistics(vae: Any, device: torch.device) -> list[Tensor]:
    values = (vae.config.latents_mean, vae.config.latents_std)
    return [torch.tensor(per_channel, device=device)[:, None, None, None] for per_channel in values]


def frames_at(pixels_BFCHW: Tensor, frame_B: Tensor) -> Tensor:
    """pixels_BCHW of one frame of each clip."""
    return pixels_BFCHW[torch.arange(len(frame_B), device=frame_B.device), frame_B]


def pack_frames(x_BFCHW: Tensor) -> Tensor:
    """B 4C T H W, one latent frame's pixel frames side by side: the first frame four times, then groups of four.

    Channel 4 c + place in the group (measured on the reference, 2026-11).
    """
    order = [0, 0, 0, *range(x_BFCHW.shape[1])]
    return x_BFCHW[:, order].unflatten(1, (-1, 4)).permute(0, 3, 2, 1, 4, 5).flatten(1, 2)


def pack_mask(mask_BFHW: Tensor, cells: Sequence[int]) -> Tensor:
    """float B 4 T h w, 1 = keep, of a mask where True is to be generated; bilinear to latent cells."""
    packed = pack_frames(~mask_BFHW[:, :, None]).float()
    return F.interpolate(packed, (packed.shape[2], *cells), mode="trilinear", align_corners=False)


# ---- denoise and decode


def denoise(net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The network's answer; conditioning channels in the released order: control, reference or mask and clip."""
    channels = [x_BCThw, *(cond[name] for name in ("control", "inpaint") if name in cond)]
    if "ref" in cond:
        channels.append(F.pad(cond["ref"], (0, 0, 0, 0, 0, x_BCThw.shape[2] - 1)))
    full_ref = cond["full_ref"][:, :, 0] if "full_ref" in cond else None
    joined = torch.cat([part.to(x_BCThw) for part in channels], dim=1)
    return net(joined, timestep_B, cond["text"], cond.get("image"), full_ref, cond.get("camera"))


@torch.no_grad()
def decode(parts: Parts, x0_BCThw: Tensor) -> Tensor:
    """pixels_BFCHW float32 in [-1, 1]."""
    with parts.borrow("vae") as vae:
        mean, std = _statistics(vae, x0_BCThw.device)
        z = (x0_BCThw.float() * std + mean).to(vae.dtype)
        return vae.decode(z).sample.float().transpose(1, 2)


# ---- the family and its variants

DROP = {"control": 0.1, "ref": 0.1, "image": 0.1}  # measured on the reference, 2026-11
FIRST_FRAME_GIVEN = MaskLaw(clip={"after_first": 1.0}, picture={"all": 1.0})  # as Wan2.1 is trained image to video
BASE = Family(
    name="wan_fun/control_v1.0",
    source="https://huggingface.co/alibaba-pai/Wan2.1-Fun-14B-Control",
    geometry=Geometry(time_stride=4, space_stride=8, patch=2, channels=16),
    objective=Flow(shift=5.0, steps=1000),
    modes=("control_ref", "control"),
    needs={"control_ref": ("control", "ref"), "control": ("control",)},
    drop=DROP,
    blocks=("WanTransformerBlock",),
    native_fps=16.0,  # sample_fps in https://github.com/Wan-Video/Wan2.1/blob/main/wan/configs
    size_law=SizeLaw(),
    read=read,
    encode_clips=encode_clips,
    describe=describe,
    keep=kept,
    denoise=denoise,
    split=partial(context.split, plan=SPLIT),
    decode=decode,
    to_released=keys.to_released,
    from_released=keys.from_released,
    save=layout.save_transformer,
)
CONTROL_V1_1 = replace(
    BASE,
    name="wan_fun/control_v1.1",
    source="https://huggingface.co/alibaba-pai/Wan2.1-Fun-V1.1-14B-Control",
    drop=DROP | {"full_ref": 0.1},
)
CAMERA = replace(
    BASE,
    name="wan_fun/control_camera",
    source="https://huggingface.co/alibaba-pai/Wan2.1-Fun-V1.1-14B-Control-Camera",
    modes=("control_ref_camera",),
    needs={"control_ref_camera": ("camera", "ref")},
    drop={"ref": 0.1, "image": 0.1},
)
INP = replace(
    BASE,
    name="wan_fun/inp",
    source="https://huggingface.co/alibaba-pai/Wan2.1-Fun-14B-InP",
    modes=("inpaint", "i2v"),
    needs={"inpaint": ("mask",), "i2v": ("mask", "ref")},
    drop={"image": 0.1, "inpaint": 0.9},  # inpaint: of samples where everything is to be generated
    masks={"i2v": FIRST_FRAME_GIVEN},
    size_law=SizeLaw(nearest_rung=None),
)
CONTROL_T2V = replace(
    BASE,
    name="wan_fun/control_t2v",
    source="the released control models' channels on a text-to-video network",
    modes=("control",),
    needs={"control": ("control",)},
    drop={"control": 0.1},
)


TWO_NETWORKS = ("high_noise_model", "low_noise_model", "transformer_2")  # folders of Wan2.2's larger models
NOT_YET = {  # a tensor that only this model has
    "condition_embedder.image_embedder.pos_embed": "Wan2.1-FLF2V",
    "img_emb.emb_pos": "Wan2.1-FLF2V",
    "vace_patch_embedding.weight": "Wan2.1-VACE",
    "casual_audio_encoder.weights": "Wan2.2-S2V",
}
SUPPORTED = "supported are the models of Wan2.1-Fun"
CHANNELS_2_2 = 48  # of the latents of Wan2.2's small models


def variant(network: dict[str, Any], where: str) -> Family:
    """Which variant a network of these arguments is. Raises UserError naming what was found and what is supported."""
    channels = network["out_channels"]
    if channels == CHANNELS_2_2:
        raise UserError(where, f"a Wan2.2 network of {channels} latent channels, not supported yet; {SUPPORTED}")
    extra = network["in_channels"] - channels
    found = (extra, network["image_dim"] is not None, network["ref_channels"] > 0, network["camera_channels"] > 0)
    supported = {
        (2 * channels, True, False, False): BASE,
        (2 * channels, True, True, False): CONTROL_V1_1,
        (channels, True, False, True): CAMERA,
        (channels + MASK_CHANNELS, True, False, False): INP,
        (channels, False, False, False): CONTROL_T2V,
    }
    if found not in supported:
        raise UserError(
            where,
            f"a Wan network with {_words(*found)}; supported are "
            + "; ".join(f"{family.name}: {_words(*key)}" for key, family in supported.items()),
        )
    return supported[found]


def _words(extra: int, image: bool, ref: bool, camera: bool) -> str:
    parts = [f"{extra} conditioning channels"]
    parts += [
        word for word, there in (("picture features", image), ("ref_conv", ref), ("control_adapter", camera)) if there
    ]
    return ", ".join(parts)


def find(folder: Path, settings: dict[str, Any]) -> Family | None:
    """The variant in a checkpoint folder, from headers and JSON alone; None if its transformer is no Wan.

    settings: the guides' model yaml, already read. Raises UserError for a Wan that is not supported, or lacks files.
    """
    if not settings and any((folder / name).is_dir() for name in TWO_NETWORKS):
        raise UserError(str(folder), f"a Wan2.2 model of two networks, which is not supported yet; {SUPPORTED}")
    path = layout.transformer_in(folder, settings)
    if path is None:
        return None
    outlines, config = layout.peek_transformer(path)
    if not sizes.is_wan(outlines):
        return None
    if unlike := next((model for name, model in NOT_YET.items() if name in outlines), None):
        raise UserError(str(path), f"a Wan network of {unlike}, which is not supported yet; {SUPPORTED}")
    network = sizes.transformer(outlines, config, str(path))
    sizes.tell_heads(network, str(path))
    family = variant(network, str(path))
    files = layout.locate(folder, settings, path, with_image=network["image_dim"] is not None)
    _, patch, _ = network["patch_size"]
    return replace(
        family,
        geometry=replace(BASE.geometry, patch=patch, channels=network["out_channels"]),
        objective=_schedule(settings.get("scheduler_kwargs") or {}),
        options={"files": files},
        frozen_files=files.for_encoding(),
        token_limits=(TokenLimit("the text encoder", files.tokenizer, TEXT_LENGTH),),
    )


def _schedule(said: dict[str, Any]) -> Flow:
    said = schedule.checked(said, "config_path: scheduler_kwargs")
    if said.get("use_dynamic_shifting"):
        raise UserError("config_path", "scheduler_kwargs.use_dynamic_shifting is true; only a fixed shift is supported")
    return Flow(shift=float(said.get("shift", 5.0)), steps=said.get("num_train_timesteps", 1000))
