"""What Wan is conditioned on: made of a batch, given to the network, and put back into what it made.

Conditions by name, as `encode_clips` gives them and `denoise` takes them:
    text         float B 512 D, zeros after the caption's last token
    image        float B 257 D, CLIP tokens of the reference picture (Wan2.1)
    control      Posterior B C T h w, the control clip
    ref          Posterior B C 1 h w, the reference picture as first latent frame of its own channels (Wan2.1-Fun)
    full_ref     Posterior B C 1 h w, the same picture as tokens of its own (Wan2.1-Fun V1.1, Wan2.2-Fun)
    camera       float B 24 T H W, packed rays
    inpaint      Posterior B 4+C T h w: the mask (1 = keep; known exactly, so its variance is 0), then the kept clip
    first_frame  Posterior B 1+C T h w: where the clip is known, then the kept clip, which rides in x there (TI2V-5B)
    known        float B 1 T h w: where the clip of `inpaint` rides in x too (Wan2.2-Fun-5B)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.core.types import Batch, Described, Encoded, Posterior
from reeltune.families import text
from reeltune.families.inpaint import join_mask, kept_unless_all_masked
from reeltune.families.latents import dtype_of
from reeltune.families.spec import Parts, needed
from reeltune.families.wan_fun.sizes import CHANNELS_2_2, TEXT_LENGTH

MASK_CHANNELS = 4  # one per pixel frame of a latent frame
IMAGE_TOKENS = 257  # CLIP's class token and 16 x 16 patches
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # https://github.com/openai/CLIP/blob/main/clip/clip.py
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# ---- encode


def encode_clips(parts: Parts, batch: Batch, mode: str, options: dict[str, Any]) -> Encoded:
    """What the frozen networks make of a batch, in float32.

    options: add_full_ref_image_in_self_attention.
    """
    pixels, network = batch.pixels_BFCHW, parts.extras["network"]
    inpaints = "control" not in mode or has_inpaint_beside(network)
    cond: dict[str, Tensor | Posterior] = {}
    with parts.borrow("vae") as vae:
        latents = partial(encode_clip, vae)
        x0 = latents(pixels)
        if mode in ("control", "control_ref"):
            cond["control"] = latents(needed(batch.control_BFCHW))
        if mode in ("control_ref", "control_ref_camera"):
            ref = latents(frames_at(pixels, batch.ref_frame_B)[:, None])
            if not inpaints:
                cond["ref"] = ref
            if options.get("add_full_ref_image_in_self_attention"):
                cond["full_ref"] = ref
        if mode != "normal" and inpaints:
            mask_BFHW = needed(batch.mask_BFHW)
            given = latents(pixels * ~mask_BFHW[:, :, None])  # masked pixels are mid-grey, 0
            cond |= inpaint_conditions(mask_BFHW, given, mode)
    if mode == "control_ref_camera":
        cond["camera"] = pack_frames(needed(batch.camera_BFCHW))
    if network["image_dim"] is None:
        return Encoded(x0, cond)
    if mode != "control":
        seen_B = torch.zeros_like(batch.ref_frame_B) if "inpaint" in cond else batch.ref_frame_B
        cond["image"] = image_features(parts, cut_to_8_bit(frames_at(pixels, seen_B)))
    else:  # as the models are used without a picture
        cond["ref"] = torch.zeros_like(x0.mean[:, :, :1])
        cond["image"] = x0.mean.new_zeros(len(pixels), IMAGE_TOKENS, network["image_dim"])
    return Encoded(x0, cond)


def has_inpaint_beside(network: dict[str, Any]) -> bool:
    """Whether a control network of these arguments takes a mask and a kept clip too, as Wan2.2-Fun's do."""
    extra = network["in_channels"] - network["out_channels"]
    return network["image_dim"] is None and extra > network["out_channels"]


def inpaint_conditions(mask_BFHW: Tensor, given: Posterior, mode: str) -> dict[str, Tensor | Posterior]:
    """`inpaint`, with `known` for networks of 48 latent channels; in mode ti2v `first_frame` in its place."""
    cells = given.mean.shape[-2:]
    if mode == "ti2v":
        return {"first_frame": join_mask(1 - to_make(mask_BFHW, cells), given)}
    found: dict[str, Tensor | Posterior] = {"inpaint": join_mask(pack_mask(mask_BFHW, cells), given)}
    if given.mean.shape[1] == CHANNELS_2_2:
        found["known"] = known_first_frame(to_make(mask_BFHW, cells))
    return found


def to_make(mask_BFHW: Tensor, cells: Sequence[int]) -> Tensor:
    """float B 1 T h w of a mask where True is to be generated: the first pixel frame of each latent frame, bilinear to
    latent cells from corner to corner (measured on the reference, 2026-11)."""
    first = mask_BFHW[:, [0, *range(1, mask_BFHW.shape[1], 4)]].float()
    return F.interpolate(first[:, None], (first.shape[1], *cells), mode="trilinear", align_corners=True)


def known_first_frame(to_make_B1Thw: Tensor) -> Tensor:
    """1 in the first latent frame of samples that know it whole, else 0 (measured on the reference, 2026-11).

    Sample by sample; the reference gives it to none of a batch in which one lacks it.
    """
    whole_B = to_make_B1Thw[:, :, 0].flatten(1).amax(1) == 0
    known = torch.zeros_like(to_make_B1Thw)
    known[:, :, 0] = whole_B.to(known).reshape(-1, 1, 1, 1)
    return known


def kept(batch: Batch, mode: str) -> dict[str, Tensor]:
    """The reference picture's channels are kept only where it is the first frame, its tokens only where it is not
    (measured on the reference, 2026-11); inpainting is dropped only where everything is to be generated.
    """
    keep, first_B = dict(batch.keep), batch.ref_frame_B == 0
    if mode in ("control_ref", "control_ref_camera"):
        for name, where_B in (("ref", first_B), ("full_ref", ~first_B)):
            keep[name] = keep.get(name, torch.ones_like(where_B)) & where_B
    if mode != "ti2v" and batch.mask_BFHW is not None:
        keep["inpaint"] = kept_unless_all_masked(keep, batch.mask_BFHW)
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
        seen = clip_pixels(image_u8_BCHW, tower.config.image_size).to(dtype_of(tower))
        return tower(pixel_values=seen, output_hidden_states=True).hidden_states[-2].float()


def cut_to_8_bit(pixels_BCHW: Tensor) -> Tensor:
    """uint8 of [-1, 1] pixels, cut and not rounded, as released models saw it (measured on the reference, 2026-11)."""
    return ((pixels_BCHW * 0.5 + 0.5) * 255).to(torch.uint8)


def clip_pixels(image_u8_BCHW: Tensor, side: int) -> Tensor:
    """A picture as CLIP sees it: stretched to a square (bicubic, no antialias), standardised."""
    pixels = image_u8_BCHW.float().div(255).sub(0.5).div(0.5)
    square = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False)
    tables = (torch.tensor(values).to(square, non_blocking=True) for values in (CLIP_MEAN, CLIP_STD))
    mean, std = (table[:, None, None] for table in tables)
    return (square * 0.5 + 0.5 - mean) / std


def encode_clip(vae: Any, pixels_BFCHW: Tensor) -> Posterior:
    """The mean in the network's units, (mean - m) / s per channel; the log-variance raw, as released models saw it."""
    latents = vae.encode(pixels_BFCHW.transpose(1, 2).to(dtype_of(vae))).latent_dist
    mean, std = _statistics(vae, pixels_BFCHW.device)
    return Posterior((latents.mean.float() - mean) / std, latents.logvar.float())


def _statistics(vae: Any, device: torch.device) -> list[Tensor]:
    values = (vae.config.latents_mean, vae.config.latents_std)
    tables = (torch.tensor(per_channel).to(device, non_blocking=True) for per_channel in values)
    return [table[:, None, None, None] for table in tables]


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
    """The network's answer; conditioning channels in the released order: control, mask and clip, or reference.

    Where a frame is known, it takes the place of the noisy one, and its tokens have time 0.
    """
    time, fixed = timestep_B, rides_in_x(cond)
    if fixed is not None:
        x_BCThw = put_in(x_BCThw, *fixed)
        unknown = (1 - fixed[0]).to(timestep_B)[:, 0, :, ::2, ::2]  # of the first cell of each token's 2 x 2
        time = (unknown * timestep_B[:, None, None, None]).flatten(1)
    channels = [x_BCThw, *(cond[name] for name in ("control", "inpaint") if name in cond)]
    if "ref" in cond:
        channels.append(F.pad(cond["ref"], (0, 0, 0, 0, 0, x_BCThw.shape[2] - 1)))
    full_ref = cond["full_ref"][:, :, 0] if "full_ref" in cond else None
    joined = torch.cat([part.to(x_BCThw) for part in channels], dim=1)
    return net(joined, time, cond["text"], cond.get("image"), full_ref, cond.get("camera"))


def rides_in_x(cond: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """(where the clip is known B 1 T h w, its latents B C T h w), for networks that see it in x."""
    if "first_frame" in cond:
        return cond["first_frame"][:, :1], cond["first_frame"][:, 1:]
    if "known" in cond:
        return cond["known"], cond["inpaint"][:, MASK_CHANNELS:]
    return None


def put_in(x_BCThw: Tensor, known: Tensor, latents: Tensor) -> Tensor:
    known, latents = known.to(x_BCThw), latents.to(x_BCThw)
    return known * latents + (1 - known) * x_BCThw


def finish(x0_BCThw: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The known frame of a clip as it was given."""
    fixed = rides_in_x(cond)
    return x0_BCThw if fixed is None else put_in(x0_BCThw, *fixed)


@torch.no_grad()
def decode(parts: Parts, x0_BCThw: Tensor) -> Tensor:
    """pixels_BFCHW float32 in [-1, 1]."""
    with parts.borrow("vae") as vae:
        mean, std = _statistics(vae, x0_BCThw.device)
        z = (x0_BCThw.float() * std + mean).to(dtype_of(vae))
        return vae.decode(z).sample.float().transpose(1, 2)
