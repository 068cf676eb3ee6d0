"""The VAE's quick layers are diffusers' layers: its norms up to rounding, its convolutions to the bit."""

from functools import partial

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from reeltune.families.wan_fun import vae as quick
from reeltune.families.wan_fun.vae import ChannelNorm, with_quick_layers


def random_vae():
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4).eval()
    for name, weight in vae.named_parameters():
        if name.endswith("gamma"):
            weight.normal_(1, 0.1).copy_(weight.bfloat16())
    return vae


def farthest(ours, theirs):
    return [(one - other).abs().max().item() for one, other in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("way", ["_in_steps", "_fused"])
@torch.no_grad()
def test_quick_layers_change_nothing(way, monkeypatch):
    """`_fused` is a GPU's way. In bf16 each is as near to float32 as diffusers' layers, within a factor of two."""
    monkeypatch.setattr(ChannelNorm, "_in_steps", getattr(ChannelNorm, way))
    torch.manual_seed(1)
    clip, latents = torch.rand(1, 3, 5, 32, 32).mul(2).sub(1).bfloat16(), torch.randn(1, 16, 2, 4, 4).bfloat16()

    def outcome(vae, dtype):
        encoded = vae.to(dtype).encode(clip.to(dtype)).latent_dist.mean
        return [encoded.float(), vae.decode(latents.to(dtype)).sample.float()]

    exact, rounded = (outcome(random_vae(), dtype) for dtype in (torch.float32, torch.bfloat16))
    quick_vae = with_quick_layers(random_vae())
    assert list(quick_vae.state_dict()) == list(random_vae().state_dict())
    assert max(farthest(outcome(quick_vae, torch.float32), exact)) <= 5e-5
    found = farthest(outcome(with_quick_layers(random_vae()), torch.bfloat16), exact)
    assert all(ours <= 2 * theirs for ours, theirs in zip(found, farthest(rounded, exact), strict=True))


@pytest.mark.parametrize("way", ["_in_steps", "_fused"])
@torch.no_grad()
def test_a_black_cell_stays_black(way):
    """Where all channels are zero the norm divides by its smallest length, not by zero."""
    norm = with_quick_layers(AutoencoderKLWan(base_dim=4)).encoder.norm_out
    black = torch.zeros(1, norm.gamma.numel(), 1, 2, 2)
    assert torch.equal(getattr(norm, way)(black, 1), black)


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("kernel", [3, 1, (3, 1, 1)])
@torch.no_grad()
def test_what_comes_before_a_clip_is_zero(kernel, before):
    padding = tuple(side // 2 for side in ((kernel,) * 3 if isinstance(kernel, int) else kernel))
    conv = WanCausalConv3d(4, 6, kernel, padding=padding)
    clip, frames = torch.randn(2, 4, 4, 5, 7), torch.randn(2, 4, before, 5, 7) if before else None
    assert torch.equal(partial(quick.convolve, conv)(clip, frames), conv(clip, frames))
