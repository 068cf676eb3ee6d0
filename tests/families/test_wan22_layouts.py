"""Wan2.1 and Wan2.2 in every layout: which network is found, and where its experts meet."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.families import weights
from reeltune.families.wan_fun import family as wan
from reeltune.families.wan_fun import keys, layout
from tests.families.tiny_wan import NEXT_VARIANTS, tiny_checkpoint

CONFIGS = Path(__file__).parents[2] / "config" / "wan2.2"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """variant -> folder in the released layout, laid out once."""
    folders = {}

    def get(variant):
        if variant not in folders:
            folders[variant] = tiny_checkpoint(tmp_path_factory.mktemp("model") / variant, variant)
        return folders[variant]

    return get


def in_diffusers(released: Path, folder: Path, **index) -> Path:
    """The same networks in diffusers' folders and names."""
    family = families.find(released)
    for name, one in (family.experts or {"high": family}).items():
        parts = one.load(released, encoders=False)
        place = folder / layout.EXPERTS_IN_DIFFUSERS[name]
        family.save(place, parts.net.state_dict(), parts.config, diffusers=True)
    files = family.options["files"]
    vae = keys.vae_from_released(weights.read(files.vae))
    weights.write(vae, folder / "vae/diffusion_pytorch_model.safetensors")
    weights.write(weights.read(files.text), folder / "text_encoder/model.safetensors")
    (folder / "tokenizer").symlink_to(files.tokenizer)
    if index:
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("variant", NEXT_VARIANTS)
def test_a_variant_is_found_whatever_model_type_says(variant, made, tmp_path):
    released = made(variant)
    family = families.find(released)
    assert family.name == f"wan_fun/{variant}"
    assert (set(family.experts) == {"high", "low"}) == ("a14b" in variant) == (family.boundary is not None)
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in released.iterdir():
        (copy / part.name).symlink_to(part)
    for config in released.rglob("config.json"):
        place = copy / config.relative_to(released)
        if place.parent.is_symlink():
            place.parent.unlink()
            place.parent.mkdir()
            for file in config.parent.iterdir():
                (place.parent / file.name).symlink_to(file)
        place.unlink()
        place.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "t2v"}))
    assert families.find(copy).name == family.name


@pytest.mark.parametrize("variant", ["2.2_a14b_control", "2.2_5b_ti2v"])
def test_the_same_networks_are_read_in_diffusers_layout(variant, made, tmp_path):
    released = made(variant)
    other = in_diffusers(released, tmp_path)
    ours, theirs = families.find(released), families.find(other)
    assert theirs.name == ours.name and theirs.experts.keys() == ours.experts.keys()
    for one, two in zip([*ours.experts.values()] or [ours], [*theirs.experts.values()] or [theirs], strict=True):
        first, second = one.load(released), two.load(other)
        for left, right in ((first.net, second.net), (first.frozen["vae"], second.frozen["vae"])):
            state = right.state_dict()
            assert all(torch.equal(tensor, state[name]) for name, tensor in left.state_dict().items())


def test_experts_are_not_exchanged(made):
    released = made("2.2_a14b_control")
    for name, one in families.find(released).experts.items():
        stored = weights.read(released / f"{name}_noise_model")
        net = one.load(released, encoders=False).net
        assert all(torch.equal(w, stored[key]) for key, w in keys.to_released(net.state_dict()).items())
        assert one.expert == name and one.weights == released / f"{name}_noise_model"


@pytest.mark.parametrize(
    ("variant", "config", "shift", "boundary", "parted"),
    [
        ("2.2_a14b_t2v", None, 12.0, 0.875, 632),
        ("2.2_a14b_t2v", "wan_civitai_t2v.yaml", 12.0, 0.875, 632),
        ("2.2_a14b_control", None, 5.0, 0.9, 358),
        ("2.2_a14b_control", "wan_civitai_i2v.yaml", 5.0, 0.9, 358),
        ("2.2_a14b_control", "wan_civitai_t2v.yaml", 12.0, 0.875, 632),  # another's: said, and taken
    ],
)
def test_where_experts_meet(variant, config, shift, boundary, parted, made, caplog):
    wan.notice.cache_clear()
    family = families.find(made(variant), config_path=config and CONFIGS / config)
    assert (family.objective.shift, family.boundary) == (shift, boundary)
    assert family.experts["high"].objective.end == family.experts["low"].objective.first == parted
    foreign = variant == "2.2_a14b_control" and boundary == 0.875
    assert ("its experts meet at noise level 0.875" in caplog.text) == foreign


def test_a_boundary_of_diffusers_index_counts_and_nonsense_is_refused(made, tmp_path):
    other = in_diffusers(made("2.2_a14b_control"), tmp_path / "model", boundary_ratio=0.8)
    assert families.find(other).boundary == 0.8
    for value in (1.5, "high", True):
        said = {"transformer_additional_kwargs": {"boundary": value}}
        (tmp_path / "model.yaml").write_text(yaml.safe_dump(said))
        with pytest.raises(UserError, match=r"boundary is .*; expected a noise level between 0 and 1"):
            families.find(other, config_path=tmp_path / "model.yaml")


def test_the_5b_yaml_names_its_vae(made):
    family = families.find(made("2.2_5b_control"), config_path=CONFIGS / "wan_civitai_5b.yaml")
    assert family.options["files"].vae.name == "Wan2.2_VAE.pth" and family.geometry.multiple == 32


def test_a_vae_of_another_model_is_refused(made, tmp_path):
    folder = tiny_checkpoint(tmp_path / "model", "2.2_5b_ti2v")
    (folder / "Wan2.2_VAE.pth").unlink()
    (folder / "Wan2.2_VAE.pth").symlink_to(made("t2v") / "Wan2.1_VAE.pth")
    with pytest.raises(UserError, match="has 16 latent channels, and the transformer 48"):
        families.find(folder).load(folder)


def test_two_networks_of_different_sizes_are_refused(tmp_path):
    folder = tiny_checkpoint(tmp_path / "one", "2.2_a14b_t2v")
    other = tiny_checkpoint(tmp_path / "two", "2.2_a14b_inp")
    high = folder / "high_noise_model"
    for file in high.iterdir():
        file.unlink()
        file.symlink_to(other / "high_noise_model" / file.name)
    with pytest.raises(UserError, match=r"its two networks \(high and low noise\) are of different sizes"):
        families.find(folder)
