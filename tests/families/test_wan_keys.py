"""Key maps: every released tensor lands exactly once, and back under its own name."""

import gzip
import json

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import CLIPVisionModel, UMT5EncoderModel

from reeltune.core.errors import UserError
from reeltune.families import weights
from reeltune.families.wan_fun import keys, sizes
from reeltune.families.wan_fun.family import variant
from reeltune.families.wan_fun.net import WanFunTransformer
from tests.families.tiny_wan import VARIANTS, filled, network

NAMED = {  # variant: the released repositories whose key lists are of it
    "t2v": ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"),
    "inp": ("Wan2.1-I2V-14B-480P",),
    "2.2_a14b_inp": ("Wan2.2-Fun-A14B-InP",),
    "2.2_a14b_control": ("Wan2.2-Fun-A14B-Control",),
    "2.2_a14b_control_camera": ("Wan2.2-Fun-A14B-Control-Camera",),
    "2.2_5b_ti2v": ("Wan2.2-TI2V-5B",),
    "2.2_5b_inp": ("Wan2.2-Fun-5B-InP",),
    "2.2_5b_control": ("Wan2.2-Fun-5B-Control",),
}


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_keeps_the_very_tensors(variant):
    ours = network(variant).state_dict()
    released = keys.to_released(ours)
    assert len(released) == len(ours)
    back = keys.from_released(released)
    assert list(back) == list(ours)
    assert all(back[name] is ours[name] for name in ours)
    assert not [name for name in released if name.startswith(("condition_embedder", "proj_out", "scale_shift"))]


def test_the_two_norms_are_not_exchanged():
    """Released norm3 is the one with weights, which diffusers calls norm2."""
    released = keys.to_released(network("control_v1.0").state_dict())
    assert {name for name in released if ".norm" in name and "attn" not in name} == {
        f"blocks.{i}.norm3.{kind}" for i in range(2) for kind in ("weight", "bias")
    }


def test_vae_round_trip_is_bit_equal():
    ours = filled(AutoencoderKLWan(base_dim=4), 0).state_dict()
    released = keys.vae_to_released(ours)
    assert "decoder.upsamples.4.shortcut.weight" in released
    assert "decoder.upsamples.7.time_conv.bias" in released
    back = keys.vae_from_released(released)
    assert back.keys() == ours.keys()
    assert all(back[name] is ours[name] for name in ours)


def test_names_of_two_forms_together_are_refused():
    mixed = {"head.head.weight": torch.zeros(1), "proj_out.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="two names become one"):
        keys.from_released(mixed)


# ---- the released lists at full size


@pytest.fixture(scope="module")
def released(goldens):
    """name -> outlines of the released tensors, on the meta device."""

    def outlines(path):
        names = json.loads(gzip.decompress(path.read_bytes()))
        return {name: torch.empty(shape, device="meta") for name, shape in names.items()}

    return {path.name.removesuffix(".json.gz"): outlines(path) for path in goldens.glob("**/released_keys/*.json.gz")}


@pytest.mark.slow
@pytest.mark.golden("**/released_keys/Wan2.*")
def test_transformers_at_full_size(released):
    for file in [name for name in released if name.startswith("Wan2.") and "VAE" not in name]:
        given = released[file]
        ours = keys.from_released(given)
        with torch.device("meta"):
            net = WanFunTransformer(**sizes.transformer(ours, {}, file))  # no config.json: 128 channels a head
        assert weights.differences(net.state_dict(), ours) == []
        assert shapes(keys.to_released(net.state_dict())) == shapes(given)
        channels = net.config.out_channels
        extras = {0, channels + 4, 2 * channels + 4} | {extra for extra, *_ in VARIANTS.values()}
        assert net.config.in_channels in {channels + extra for extra in extras}


@pytest.mark.golden("**/released_keys/Wan2.*")
def test_released_networks_are_told_apart(released):
    with_experts = [name for name in released if "A14B" in name]
    found = {}
    for file in [name for name in released if name.startswith("Wan2.") and "VAE" not in name]:
        network = sizes.transformer(keys.from_released(released[file]), {}, file)
        if file == "Wan2.2-Fun-5B-Control-Camera":  # nothing of its files is known to be so
            with pytest.raises(UserError, match="52 conditioning channels, control_adapter"):
                variant(network, file)
            continue
        found[file] = variant(network, file, experts=file in with_experts).name.removeprefix("wan_fun/")
        if file in with_experts and network["in_channels"] > network["out_channels"]:
            with pytest.raises(UserError, match="one network of two"):
                variant(network, file)
    told = {name: kind for kind, names in NAMED.items() for name in names if name in found}
    assert told == {name: kind for name, kind in found.items() if "2.1-Fun" not in name}


@pytest.mark.golden("**/released_keys/Wan*VAE.json.gz")
def test_vae_at_full_size(released):
    for given in [outlines for name, outlines in released.items() if name.startswith("Wan") and name.endswith("VAE")]:
        ours = keys.vae_from_released(given)
        with torch.device("meta"):
            net = AutoencoderKLWan(**sizes.vae(ours, {}, "vae"))
        assert weights.differences(net.state_dict(), ours) == []
        assert shapes(keys.vae_to_released(net.state_dict())) == shapes(given)


@pytest.mark.golden("released_keys/umt5*")
def test_text_encoder_at_full_size(released):
    for given in [outlines for name, outlines in released.items() if name.startswith("umt5")]:
        ours = keys.text_from_released(given)
        with torch.device("meta"):
            net = UMT5EncoderModel(sizes.text(ours, "text"))
        assert weights.differences(net.state_dict(), ours) == []
        assert shapes(keys.text_to_released(net.state_dict())) == shapes(given)


@pytest.mark.golden("released_keys/clip*")
def test_picture_tower_at_full_size(released):
    for given in [outlines for name, outlines in released.items() if name.startswith("clip")]:
        used = {name: tensor for name, tensor in given.items() if not name.startswith(keys.IMAGE_LEFT)}
        assert all(name.startswith("visual.") for name in used)
        left = {name.split(".")[0] if name.startswith("textual") else name for name in given.keys() - used.keys()}
        assert left == {"textual", "log_scale", "visual.head"}
        ours = keys.image_from_released(given)
        with torch.device("meta"):
            net = CLIPVisionModel(sizes.image(ours, {}, "image"))
        assert weights.differences(getattr(net, "vision_model", net).state_dict(), ours) == []
        assert shapes(keys.image_to_released(ours)) == shapes(used)
