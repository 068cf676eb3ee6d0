"""The CogVideoX transformer and the decoder of its VAE: diffusers' classes, with what differs put right.

diffusers 0.42 (https://github.com/huggingface/diffusers: embeddings.py, autoencoder_kl_cogvideox.py) differs from the
released code in three things (measured on the reference, 2026-11):
    the 2b network's table of positions is made anew for each size; released networks resize the one they learnt with
    the rotary grid of positions is stretched wherever it does not start at 0 (families/rope.py)
    the VAE decodes an odd latent frame together with the first two; released ones decode the first frame alone
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.core.imports import lean_imports
from reeltune.families.rope import open_grid

with lean_imports():
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed
    from diffusers.models.upsampling import CogVideoXUpsample3D
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

CHUNK = 2  # latent frames that the decoder takes at a time, after the first


class CogVideoXFun(CogVideoXTransformer3DModel):
    """The network with its own rotary positions, a time patch filled up with zero frames."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  called by its family alone
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor
    ) -> Tensor:
        """hidden_states B T C h w, encoder_hidden_states B L D, timestep int B; the answer B T C h w."""
        frames, (height, width) = hidden_states.shape[1], hidden_states.shape[3:]
        filled = F.pad(hidden_states, (0, 0, 0, 0, 0, 0, 0, -frames % (self.config["patch_size_t"] or 1)))
        answer = super().forward(
            filled,
            encoder_hidden_states,
            timestep,  # pyright: ignore[reportArgumentType]  diffusers names the integer tensors alone
            image_rotary_emb=rotary(self.config, frames, height, width, hidden_states.device),
            return_dict=False,
        )[0]
        return answer[:, :frames]


def corrected(net: CogVideoXFun) -> CogVideoXFun:
    """The same network, whose weights may be on the meta device; its table of positions is that of the released code,
    on the CPU.
    """
    patches: Any = net.patch_embed
    if patches.use_positional_embeddings:
        patches.use_positional_embeddings = False  # ours are added behind it
        patches.register_buffer("pos_embedding", table_of(patches), persistent=False)
        patches.register_forward_hook(add_positions)
    return net


def table_of(patches: Any) -> Tensor:
    """Positions L D of a clip of the size in config.json."""
    patch, frames = patches.patch_size, (patches.sample_frames - 1) // patches.temporal_compression_ratio + 1
    table_TLD = get_3d_sincos_pos_embed(
        patches.embed_dim,
        (patches.sample_width // patch, patches.sample_height // patch),
        frames,
        patches.spatial_interpolation_scale,
        patches.temporal_interpolation_scale,
        device=torch.device("cpu"),
        output_type="pt",
    )
    return table_TLD.flatten(0, 1)


def add_positions(patches: Any, given: tuple[Tensor, Tensor], tokens_BLD: Tensor) -> Tensor:
    """The table, resized to the clip's size and cut to its frames, added to the tokens behind the text's."""
    text_BLD, x_BTChw = given
    patch, (used, _, height, width) = patches.patch_size, x_BTChw.shape[1:]
    frames = (patches.sample_frames - 1) // patches.temporal_compression_ratio + 1
    grid = frames, patches.sample_height // patch, patches.sample_width // patch
    table_DTHW = patches.pos_embedding.T.unflatten(1, grid)
    resized_DTHW = F.interpolate(table_DTHW[None], (frames, height // patch, width // patch), mode="trilinear")[0]
    clip_LD = resized_DTHW[:, :used].flatten(1).T
    return tokens_BLD + F.pad(clip_LD, (0, 0, text_BLD.shape[1], 0)).to(tokens_BLD.dtype)


def rotary(config: Any, frames: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """(cos, sin) of latent cells' positions, L D; None for a network with a table of positions."""
    if not config.use_rotary_positional_embeddings:
        return None
    embed: Any = get_3d_rotary_pos_embed  # its type has other forms of the answer too
    patch = config.patch_size
    grid, base = (height // patch, width // patch), (config.sample_height // patch, config.sample_width // patch)
    if config.patch_size_t is not None:
        steps = -(-frames // config.patch_size_t)
        slices = {"grid_type": "slice", "max_size": base}
        return embed(config.attention_head_dim, None, grid, steps, device=device, **slices)
    region = open_grid(*get_resize_crop_region_for_grid(grid, base[1], base[0]), grid)
    return embed(config.attention_head_dim, region, grid, frames, device=device)


def decode_in_pairs(vae: AutoencoderKLCogVideoX, z_BCThw: Tensor) -> Tensor:
    """pixels_BCFHW: the first latent frame alone, then two at a time, each chunk with the last one's end in view."""
    if vae.post_quant_conv is not None:
        z_BCThw = vae.post_quant_conv(z_BCThw)
    cache, pieces = None, []
    for chunk in (z_BCThw[:, :, :1], *z_BCThw[:, :, 1:].split(CHUNK, dim=2)):
        if chunk.shape[2]:
            with ExitStack() as hooks:
                if pieces:
                    for module in vae.decoder.modules():
                        if isinstance(module, CogVideoXUpsample3D) and module.compress_time:
                            handle = module.register_forward_hook(double_alone)
                            hooks.callback(handle.remove)
                piece, cache = vae.decoder(chunk, conv_cache=cache)
            pieces.append(piece)
    return torch.cat(pieces, 2)


def double_alone(module: nn.Module, inputs: tuple[Tensor], output_BCTHW: Tensor) -> Tensor:
    """One frame stands for two everywhere but at the start of a clip; diffusers leaves it one."""
    return output_BCTHW.repeat_interleave(2, 2) if inputs[0].shape[2] == 1 else output_BCTHW
