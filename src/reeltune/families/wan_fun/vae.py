"""diffusers' Wan VAE, with the one layer that costs more time on a CPU than its convolutions written anew."""

from __future__ import annotations

from torch import Tensor, nn

from reeltune.core.imports import lean_imports

with lean_imports():
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm


class ChannelNorm(nn.Module):
    """The same norm without torch's vector_norm, which is slow over an axis that is not the last.

    An encoding of 13 frames of 80x80 pixels takes 0.18 s instead of 0.40 s of one core, and differs by at most 7e-7
    (measured, 2026-11, torch 2.13).
    """

    def __init__(self, norm: WanRMS_norm):
        super().__init__()
        self.channel_first, self.scale = norm.channel_first, norm.scale
        self.gamma, self.bias = norm.gamma, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        axis = 1 if self.channel_first else -1
        full = x.float()
        length = full.square().sum(axis, keepdim=True).sqrt().clamp_min(1e-12)  # F.normalize's eps
        return (full / length).to(x.dtype) * self.scale * self.gamma + self.bias


def with_quick_norms(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same network, its weights and names untouched."""
    for name, module in [*vae.named_modules()]:
        if isinstance(module, WanRMS_norm):
            vae.set_submodule(name, ChannelNorm(module))
    return vae
