"""What the Fun models add to diffusers' Wan transformer: reference tokens and camera control; and times by token.

Also two tables that diffusers keeps in less precision than the models were trained with, or that lose it when the
network is cast: the timestep's sinusoid and the rotary angles are computed here in float64 at each call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reeltune.core.imports import lean_imports

with lean_imports():
    from diffusers import WanTransformer3DModel

THETA = 10_000.0  # of rotary angles and of the timestep's sinusoid (https://github.com/Wan-Video/Wan2.1, model.py)


class Rope(nn.Module):
    """Rotary angles over (T, h, w) tokens, in the form that diffusers' attention takes.

    It has no buffers: casting the network cannot round them, and it needs nothing to leave the meta device.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        side = 2 * (head_dim // 6)
        self.dims = (head_dim - 2 * side, side, side)  # channels turned by time, height, width

    def forward(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each float32[1, T*h*w, 1, head_dim]; the angles of a pair of channels are equal."""
        axes = []
        for axis, (places, dim) in enumerate(zip(grid, self.dims, strict=True)):
            speeds = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
            angles = torch.outer(torch.arange(places, dtype=torch.float64, device=device), speeds)
            shape = [1, 1, 1, -1]
            shape[axis] = places
            axes.append(angles.repeat_interleave(2, dim=1).reshape(shape).expand(*grid, -1))
        angles = torch.cat(axes, dim=-1).reshape(1, -1, 1, sum(self.dims))
        return angles.cos().float(), angles.sin().float()


def sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """float32[..., channels]: cosines, then sines (https://arxiv.org/abs/1706.03762, section 3.5, halves swapped)."""
    half = channels // 2
    speeds = THETA ** -(torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angles = timestep.double()[..., None] * speeds
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class UncastRMSNorm(nn.RMSNorm):
    """Answers in the precision of what it is given, as the released models' own norm does, in every torch: from 2.12 on
    a GPU's autocast answers in fp32 (https://github.com/pytorch/pytorch/issues/188955). Queries and keys would take
    twice the room, and of another precision than values, with which a shared clip's attention has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """Packed camera rays to one vector per token, latent frame by latent frame (Wan2.1-Fun-V1.1-Control-Camera)."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int], shrink: int):
        super().__init__()
        self.shrink = shrink  # pixels per latent cell
        self.conv = nn.Conv2d(channels * shrink**2, width, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(ResidualBlock(width))

    def forward(self, camera_BCTHW: Tensor) -> Tensor:
        frames = camera_BCTHW.transpose(1, 2).flatten(0, 1)
        tokens = self.residual_blocks(self.conv(F.pixel_unshuffle(frames, self.shrink)))
        return tokens.unflatten(0, (len(camera_BCTHW), -1)).transpose(1, 2)


class WanFunTransformer(WanTransformer3DModel):
    """diffusers' network, its blocks and names unchanged, with `ref_conv` and `control_adapter` where asked for.

    ref_channels: latent channels of a full reference picture; 0 is none.
    camera_channels: channels of packed camera rays; 0 is none. camera_shrink: their pixels per latent cell.
    """

    def __init__(self, *, ref_channels: int = 0, camera_channels: int = 0, camera_shrink: int = 8, **wan):
        super().__init__(**wan)
        self.register_to_config(ref_channels=ref_channels, camera_channels=camera_channels, camera_shrink=camera_shrink)
        width, patch = self.patch_embedding.out_channels, tuple(self.config["patch_size"][1:])
        self.rope = Rope(self.config["attention_head_dim"])
        self.token_times = nn.Identity()  # a place to shard them at
        for module in [*self.modules()]:
            for name, norm in module.named_children():
                if isinstance(norm, nn.RMSNorm):
                    setattr(module, name, UncastRMSNorm([*norm.normalized_shape], norm.eps, norm.elementwise_affine))
        if ref_channels:
            self.ref_conv = nn.Conv2d(ref_channels, width, kernel_size=patch, stride=patch)
        if camera_channels:
            self.control_adapter = CameraAdapter(camera_channels, width, patch, camera_shrink)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  called by its family alone
        self,
        x_BCThw: Tensor,
        timestep: Tensor,
        text_BLD: Tensor,
        image_BLD: Tensor | None = None,
        ref_BChw: Tensor | None = None,
        camera_BCTHW: Tensor | None = None,
    ) -> Tensor:
        """x holds the noisy latents, then the conditioning channels; the answer B C T h w has the latents' channels.

        timestep in 0..1000, not rounded, one for each clip (B) or for each token of it (B L); then the reference's
        tokens have that of the last (measured on the reference, 2026-11). Text is zero-padded to 512 tokens, which are
        all attended to; image 257 tokens where the network has an image embedding; ref one latent frame, placed before
        the first as tokens of its own.
        """
        x = self.patch_embedding(x_BCThw)
        if camera_BCTHW is not None:
            x = x + self.control_adapter(camera_BCTHW)
        T, h, w = x.shape[2:]
        by_token = timestep.ndim == 2
        if ref_BChw is not None:
            x = torch.cat([self.ref_conv(ref_BChw)[:, :, None], x], dim=2)
            if by_token:
                timestep = torch.cat([timestep[:, -1:].expand(-1, h * w), timestep], dim=1)
        rotary = self.rope(tuple(x.shape[2:]), x.device)
        x_BLD = x.flatten(2).transpose(1, 2).contiguous()

        embedder = self.condition_embedder
        with torch.autocast(x.device.type, enabled=False):  # the models were trained with this path in float32
            dtype = embedder.time_proj.weight.dtype
            if by_token:
                timestep = self.token_times(timestep)
            time = embedder.time_embedder(sinusoid(timestep, self.config["freq_dim"]).to(dtype))  # B D, or B L D
            modulation = embedder.time_proj(F.silu(time)).unflatten(-1, (6, -1))
        context_BLD = embedder.text_embedder(text_BLD)
        if image_BLD is not None:
            assert embedder.image_embedder is not None
            context_BLD = torch.cat([embedder.image_embedder(image_BLD), context_BLD], dim=1)

        for block in self.blocks:
            x_BLD = block(x_BLD, context_BLD, modulation, rotary)

        time_BLD = time if by_token else time[:, None]
        shift, scale = (self.scale_shift_table[:, None] + time_BLD[:, :, None]).unbind(2)
        x_BLD = (self.norm_out(x_BLD.float()) * (1 + scale) + shift).type_as(x_BLD)
        answer_BLD = self.proj_out(x_BLD)[:, -T * h * w :]  # without the reference's tokens
        return self._unpatch(answer_BLD, (T, h, w))

    def _unpatch(self, x_BLD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        p_t, p_h, p_w = self.config["patch_size"]
        x = x_BLD.unflatten(2, (p_t, p_h, p_w, -1)).unflatten(1, grid)  # B T h w p_t p_h p_w C
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
