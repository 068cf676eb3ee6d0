"""The VAE's quick norms are diffusers' norms, up to rounding."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from reeltune.families.wan_fun.vae import with_quick_norms


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_quick_norms_change_nothing(dtype, allowed):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4).eval().to(dtype)
    names = list(vae.state_dict())
    clip = torch.rand(1, 3, 5, 32, 32).to(dtype) * 2 - 1

    def outcome() -> list[torch.Tensor]:
        latents = vae.encode(clip).latent_dist.mean
        return [latents, vae.decode(latents).sample]

    before = outcome()
    assert list(with_quick_norms(vae).state_dict()) == names
    for old, new in zip(before, outcome(), strict=True):
        assert (old - new).abs().max() <= allowed


@torch.no_grad()
def test_a_black_cell_stays_black():
    """Where all channels are zero the norm divides by its smallest length, not by zero."""
    vae = with_quick_norms(AutoencoderKLWan(base_dim=4))
    norm = vae.encoder.norm_out
    assert torch.equal(norm(torch.zeros(1, norm.gamma.numel(), 1, 2, 2)), torch.zeros(1, norm.gamma.numel(), 1, 2, 2))
