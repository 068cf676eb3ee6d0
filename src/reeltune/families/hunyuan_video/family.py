"""HunyuanVideo: text to video, and picture to video (https://huggingface.co/hunyuanvideo-community).

Conditions by name, as `encode` gives them and `denoise` takes them:
    text       float B L D, states of the language model; with a picture its states come first
    text_mask  int B L, 1 where there is a token
    pooled     float B D', CLIP's vector of the caption
    guidance   float B, the scale that guidance-distilled networks are told, times 1000
    ref        Posterior B C 1 h w, the first frame: put in the place of the first latent frame (token replace), or
               given in channels of its own beside a mask (latent concat)
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Described, Encoded, Geometry, Posterior, SizeLaw
from reeltune.diffusion.objective import Flow
from reeltune.families import configs, context, schedule, tokenizers, weights
from reeltune.families.hunyuan_video import prompts
from reeltune.families.hunyuan_video.prompts import encode_text, encode_text_and_picture
from reeltune.families.latents import decode_clip, encode_clip
from reeltune.families.spec import Family, Loading, Parts

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo

CLASS = "HunyuanVideoTransformer3DModel"
GUIDANCE = 6.0 * 1000  # what networks with a guidance embedding are always told (measured on the reference, 2026-11)
INTERLEAVE = {"token_replace": 4, "latent_concat": 2}  # every n-th state of the picture, as the released pipeline takes
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


# ---- read


def read(folder: Path, family: Family, how: Loading) -> Parts:
    from diffusers import HunyuanVideoTransformer3DModel
    from transformers import CLIPTextModel, LlamaModel, LlavaForConditionalGeneration

    with_picture = family.caption_sees_picture
    net = weights.load_component(
        HunyuanVideoTransformer3DModel,
        folder / "transformer",
        how.dtype,
        how.device,
        replacement=how.transformer_path,
        fake=how.fake,
        quantisation=how.quantisation,
    )
    config = configs.read_config(folder / "transformer")
    parts = Parts(net, config=config)
    parts.loaders["vae"] = partial(_load_vae, folder / "vae", how.frozen_dtype, how.fake)
    model = LlavaForConditionalGeneration if with_picture else LlamaModel
    parts.loaders["text"] = partial(weights.load_encoder, model, folder / "text_encoder", how.frozen_dtype, how.fake)
    parts.loaders["text_2"] = partial(
        weights.load_encoder, CLIPTextModel, folder / "text_encoder_2", how.frozen_dtype, how.fake
    )
    for name in ("tokenizer", "tokenizer_2"):  # by its files: the class that checkpoints name reads Llama 3's wrong
        parts.extras[name] = tokenizers.load_tokenizer(folder / name)
    if with_picture:
        from transformers import CLIPImageProcessorPil

        parts.extras["image_processor"] = tokenizers.load_image_processor(
            CLIPImageProcessorPil, folder / "image_processor"
        )
    return parts


def _load_vae(folder: Path, dtype: torch.dtype | None, fake: AbstractContextManager | None) -> nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo

    vae = weights.load_frozen(AutoencoderKLHunyuanVideo, folder, dtype, fake)
    vae.enable_tiling()  # released models saw latents of blended tiles (measured on the reference, 2026-11)
    return vae


# ---- encode


def encode_clips(parts: Parts, batch: Batch, mode: str, options: dict[str, Any]) -> Encoded:
    """What the frozen networks make of a batch, in float32.

    The first latent frame is left out of the loss (measured on the reference, 2026-11, in both modes).
    """
    pixels = batch.pixels_BFCHW
    config: Any = parts.net.config
    with parts.borrow("vae") as vae:
        latents = partial(encode_clip, vae)
        x0 = latents(pixels)
        cond: dict[str, Tensor | Posterior] = {}
        if mode == "i2v":
            concat = config.image_condition_type == "latent_concat"
            cond["ref"] = latents(pixels[:, :1]) if concat else first_latent(latents(first_alone(vae, pixels)))
    if config.guidance_embeds:
        cond["guidance"] = torch.full((len(pixels),), GUIDANCE, device=pixels.device)
    loss_mask = torch.ones_like(x0.mean[:, :1, :, :1, :1])
    loss_mask[:, :, 0] = 0
    return Encoded(x0, cond, loss_mask=loss_mask)


def describe(parts: Parts, captions: list[str], picture_BCHW: Tensor | None = None) -> Described:
    """A dropped caption keeps its picture, so that the null text of i2v depends on the sample."""
    if picture_BCHW is None:
        return Described(encode_text(parts, captions))
    picture_u8 = ((picture_BCHW * 0.5 + 0.5) * 255).to(torch.uint8)  # cut, not rounded, as released models saw it
    config: Any = parts.net.config
    interleave = INTERLEAVE[config.image_condition_type]
    with_picture = partial(encode_text_and_picture, parts, interleave=interleave)
    return Described(with_picture(captions, picture_u8), with_picture([""] * len(captions), picture_u8))


def first_alone(vae: AutoencoderKLHunyuanVideo, pixels_BFCHW: Tensor) -> Tensor:
    """The first frame, then mid-grey: normalisation spans time, so its latent is not that of the picture alone.

    Frames past the VAE's first tile in time do not touch the first latent frame.
    """
    shown = torch.zeros_like(pixels_BFCHW[:, : vae.tile_sample_min_num_frames + 1])
    shown[:, 0] = pixels_BFCHW[:, 0]
    return shown


def first_latent(clip: Posterior) -> Posterior:
    return Posterior(clip.mean[:, :, :1], clip.logvar[:, :, :1])


# ---- denoise and decode


def denoise(
    net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: dict[str, Tensor], *, concat: bool = False
) -> Tensor:
    """The network's answer. A known first frame is in its place, or with a mask (1 = known) in channels of its own."""
    x = x_BCThw
    if "ref" in cond:
        ref = cond["ref"].to(x)
        if concat:
            known = torch.cat([ref, torch.ones_like(ref[:, :1])], 1)
            x = torch.cat([x, F.pad(known, (0, 0, 0, 0, 0, x.shape[2] - 1))], 1)
        else:
            x = torch.cat([ref, x[:, :, 1:]], 2)
    return net(
        hidden_states=x,
        timestep=timestep_B,
        encoder_hidden_states=cond["text"].to(x),
        encoder_attention_mask=cond["text_mask"],
        pooled_projections=cond["pooled"].to(x),
        guidance=cond.get("guidance"),
        return_dict=False,
    )[0]


def sharded() -> dict[str, Any]:
    """What is sharded over the processes of a clip: tokens of clip and text, and their rotary angles."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    tokens = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
    return {
        "": {"encoder_attention_mask": ContextParallelInput(split_dim=1, expected_dims=2)},
        "rope": {i: ContextParallelInput(split_dim=0, expected_dims=2, split_output=True) for i in (0, 1)},
        "x_embedder": {0: tokens},
        "context_embedder": {0: tokens},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def split(net: nn.Module, mesh: DeviceMesh) -> None:
    """diffusers has no plan for this network, but its attention takes part: it gathers masks that are sharded."""
    group = mesh["ulysses"].get_group()

    def with_even_text(_: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        names = "encoder_hidden_states", "encoder_attention_mask"
        text_BLD, mask_BL = (named[name] for name in names)
        return inputs, named | dict(zip(names, even_text(text_BLD, mask_BL, group.size()), strict=True))

    def with_whole_mask(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The text's own layers come before its tokens are sharded."""
        text_BLD, timestep_B, mask_BL = inputs
        parts = [torch.empty_like(mask_BL) for _ in range(group.size())]
        dist.all_gather(parts, mask_BL.contiguous(), group)
        return text_BLD, timestep_B, torch.cat(parts, 1)

    def with_own_frame(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Blocks take the first frame's tokens from the start of what they are given: here those of this process."""
        *others, first = inputs
        count = inputs[0].shape[1]
        return *others, min(max(first - group.rank() * count, 0), count)

    context.split(net, mesh, sharded())
    net.register_forward_pre_hook(with_even_text, with_kwargs=True)
    network: Any = net
    network.context_embedder.register_forward_pre_hook(with_whole_mask)
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        block.register_forward_pre_hook(with_own_frame)


def even_text(text_BLD: Tensor, mask_BL: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Filled up with tokens that nothing attends to, until their number is a multiple of count."""
    missing = -mask_BL.shape[1] % count
    return F.pad(text_BLD, (0, 0, 0, missing)), F.pad(mask_BL, (0, missing))


def finish(x0_BCThw: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The first latent frame is the one given."""
    return torch.cat([cond["ref"].to(x0_BCThw), x0_BCThw[:, :, 1:]], 2)


def decode(parts: Parts, x0_BCThw: Tensor) -> Tensor:
    """pixels_BFCHW float32, about [-1, 1]."""
    with parts.borrow("vae") as vae:
        return decode_clip(vae, x0_BCThw)


# ---- files: the released layout is diffusers' own


def same(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Released names are the network's own."""
    return dict(state)


def save(folder: Path, state: dict[str, Tensor], config: dict[str, Any], *, diffusers: bool = False) -> None:
    weights.write_component(folder, state, config)


# ---- the family and its variants

T2V = Family(
    name="hunyuan_video/t2v",
    source="https://huggingface.co/hunyuanvideo-community/HunyuanVideo",
    geometry=Geometry(time_stride=4, space_stride=8, patch=2, channels=16),
    objective=Flow(shift=7.0, steps=1000),
    modes=("normal",),
    needs={"normal": ()},
    drop={},
    blocks=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    native_fps=24.0,  # sample_video.py in https://github.com/Tencent-Hunyuan/HunyuanVideo
    size_law=SizeLaw(first_weight=0.75, nearest_rung=None),
    read=read,
    encode_clips=encode_clips,
    describe=describe,
    denoise=denoise,
    split=split,
    decode=decode,
    to_released=same,
    from_released=same,
    caption=("text", "text_mask", "pooled"),
    least_frames=5,  # two latent frames, of which the first does not count
    save=save,
)
I2V = replace(
    T2V,
    name="hunyuan_video/i2v",
    source="https://huggingface.co/hunyuanvideo-community/HunyuanVideo-I2V",
    modes=("i2v",),
    needs={"i2v": ("ref",)},
    caption_sees_picture=True,
    blocks=("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock"),
    finish=finish,
)
I2V_CONCAT = replace(
    I2V,
    name="hunyuan_video/i2v_concat",
    source="https://huggingface.co/hunyuanvideo-community/HunyuanVideo-I2V-33ch",
    blocks=T2V.blocks,
    denoise=partial(denoise, concat=True),
    finish=None,
)


def variant(config: dict[str, Any], where: str) -> Family:
    """Which variant a transformer of this config.json is. Raises UserError naming what was found."""
    channels = config.get("out_channels") or 16
    found = (config.get("image_condition_type"), config.get("in_channels", 16) - channels)
    supported = {(None, 0): T2V, ("token_replace", 0): I2V, ("latent_concat", channels + 1): I2V_CONCAT}
    if found not in supported:
        raise UserError(
            where,
            "a HunyuanVideo network with image_condition_type {} and {} conditioning channels; supported are ".format(
                *found
            )
            + "; ".join(f"{family.name}: {kind} and {extra}" for (kind, extra), family in supported.items()),
        )
    return supported[found]


def find(folder: Path, settings: dict[str, Any]) -> Family | None:
    """The variant in a checkpoint folder, from its JSON files alone; None if its transformer is no HunyuanVideo.

    Raises UserError for one that is not supported, or lacks files.
    """
    config = configs.read_config(folder / "transformer")
    if config.get("_class_name") != CLASS:
        return None

    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

    configs.check(HunyuanVideoTransformer3DModel, config, str(folder / "transformer/config.json"))
    family = variant(config, str(folder / "transformer"))
    paths = weights.components(folder, (*COMPONENTS, *(("image_processor",) if "i2v" in family.modes else ())))
    vae = configs.read_config(paths["vae"])
    configs.check(AutoencoderKLHunyuanVideo, vae, str(paths["vae"] / "config.json"))
    geometry = Geometry(
        time_stride=vae.get("temporal_compression_ratio", 4),
        space_stride=vae.get("spatial_compression_ratio", 8),
        patch=config.get("patch_size", 2),
        patch_time=config.get("patch_size_t", 1),
        channels=config.get("out_channels") or 16,
    )
    return replace(
        family,
        geometry=geometry,
        objective=schedule.read(paths["scheduler"], shift=7.0),
        frozen_files=weights.encoding_files(paths),
        token_limits=prompts.token_limits(paths, with_picture=family.caption_sees_picture),
    )
