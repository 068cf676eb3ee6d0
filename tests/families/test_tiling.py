"""Tiles of the VAE: which families have sound ones, and what follows from using them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool3d, interpolate

from reeltune import families
from reeltune.cache.entries import keys_of
from reeltune.config.recipe import Cache, Memory, Model, Recipe
from reeltune.core.errors import UserError
from tests.families.every_family import Pair

HEIGHT, WIDTH, FRAMES = 480, 832, 5  # larger than every family's tile


class Local(nn.Module):
    """Stands in for an encoder or decoder: each latent cell and its 8 x 8 pixels say the same, whatever is around."""

    def __init__(self, change, *, with_state: bool):
        super().__init__()
        self.change, self.with_state, self.areas = change, with_state, []

    def forward(self, x, *_, **__):
        self.areas.append(x.shape[-2] * x.shape[-1])
        return (self.change(x), {}) if self.with_state else self.change(x)


def local_vae(vae, channels: int):
    """Its own tiling around networks of which every answer is known."""

    def shrink(x):
        return avg_pool3d(x[:, :, ::4], (1, 8, 8)).repeat(1, -(-2 * channels // 3), 1, 1, 1)[:, : 2 * channels]

    patch = getattr(vae.config, "patch_size", None) or 1  # pixels that are channels there

    def enlarge(z):
        return z[:, :3].repeat_interleave(patch**2, 1).repeat_interleave(8, 3).repeat_interleave(8, 4)

    with_state = "CogVideoX" in type(vae).__name__
    vae.encoder, vae.decoder = Local(shrink, with_state=with_state), Local(enlarge, with_state=with_state)
    return vae.float()


@pytest.fixture
def checkpoint(any_checkpoint: Pair, tmp_path):
    torch.set_num_threads(1)
    model = any_checkpoint.lay_out(tmp_path)
    return model, families.find(model)


@pytest.mark.quick_by_family
def test_tiles_lie_where_they_belong_or_are_refused(checkpoint):
    model, family = checkpoint
    if not family.vae_tiles:
        with pytest.raises(UserError, match=f"vae_tiling is true, which {family.name} has not"):
            family.load(model, encoders=False, vae_tiling=True)
        return
    vaes = []
    for tiled in (False, True):
        parts = family.load(model, encoders=False, vae_tiling=tiled)
        vaes.append(local_vae(parts.loaders["vae"](), family.geometry.channels))
    side = family.geometry.space_stride
    cells = HEIGHT // side, WIDTH // side
    coarse = torch.rand(1, 3, FRAMES, *cells, generator=torch.Generator().manual_seed(0))
    clip = interpolate(coarse, scale_factor=(1, side, side), mode="nearest")
    with torch.no_grad():
        whole, tiled = (vae.encode(clip).latent_dist.mean for vae in vaes)
        assert whole.shape[-2:] == cells and torch.allclose(tiled, whole, rtol=0, atol=1e-6 * whole.abs().max().item())
        back, tiled_back = (vae.decode(whole).sample for vae in vaes)
        assert torch.allclose(tiled_back, back, rtol=0, atol=1e-6 * back.abs().max().item())
    most = [max(vae.encoder.areas) for vae in vaes]
    whole_area = HEIGHT * WIDTH // (side // 8) ** 2  # as the encoder sees it
    assert most[1] <= min(256 * 384, whole_area - 1)
    assert most[0] == whole_area or vaes[0].use_tiling  # HunyuanVideo always has tiles


@pytest.mark.quick_by_family
def test_a_clip_of_one_tile_is_encoded_alike(checkpoint):
    model, family = checkpoint
    if not family.vae_tiles:
        pytest.skip("no tiles")
    clip = torch.rand(1, 3, 5, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for tiled in (False, True):
        vae = family.load(model, encoders=False, vae_tiling=tiled).loaders["vae"]()
        with torch.no_grad():
            found.append(vae.encode(clip.to(vae.dtype)).latent_dist.mean)
    assert torch.equal(*found)


def test_a_cache_knows_whether_it_was_made_in_tiles(tmp_path):
    from reeltune.families.toy.family import FAMILY

    made = Recipe(model=Model("."), cache=Cache(str(tmp_path), 1))
    plain = keys_of(made, FAMILY, "control")
    tiled = keys_of(replace(made, memory=Memory(vae_tiling=True)), FAMILY, "control")
    assert plain.facts | {"vae_tiling": True} == tiled.facts and plain.null != tiled.null
