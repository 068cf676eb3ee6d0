"""EasyAnimate: what its files say, its names, and what it makes of a batch. The tiny checkpoints are the goldens'."""

import gzip
import json
import shutil

import pytest
import torch
from diffusers import EasyAnimateTransformer3DModel

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Draw, Shape
from reeltune.diffusion.loss import settle
from reeltune.families import configs, inpaint, latents, weights
from reeltune.families.easyanimate import family as easyanimate
from reeltune.families.easyanimate.keys import from_released, to_released
from tests.families.every_family import derive, others

CAPTIONS = ["a red fox runs", "two children fly a blue kite"]
EXTRA = {  # conditioning channels for C latent channels: (how many times C, and how many beside)
    "control_ref": (2, 0),
    "control": (1, 0),
    "control_ref_camera": (1, 6),
    "inpaint": (1, 1),
    "normal": (0, 0),
}


def extra(mode, channels):
    times, beside = EXTRA[mode]
    return times * channels + beside


@pytest.fixture(scope="module")
def released(goldens):
    """The tiny V5.1 checkpoint."""
    for path in sorted((goldens / "multi").glob("EasyAnimate*/transformer/config.json")):
        if json.loads(path.read_text()).get("text_embed_dim_t5") is None:
            return path.parents[1]
    pytest.skip("no tiny EasyAnimate V5.1 checkpoint among the goldens")


@pytest.fixture(scope="module")
def checkpoints(released, tmp_path_factory):
    """mode -> folder: the tiny one, and untrained networks with other channels in diffusers' layout."""
    family, config = families.find(released), configs.read_config(released / "transformer")
    changed = others(family, config)
    made = {mode: derive(released, tmp_path_factory.mktemp(mode), changes=changes) for mode, changes in changed}
    return made | dict.fromkeys(family.modes, released)


@pytest.fixture(scope="module")
def loaded(checkpoints):
    def one(path):
        family = families.find(path)
        return family, family.load(path, frozen_dtype=torch.float32)

    return {mode: one(path) for mode, path in checkpoints.items()}


def batch_of(mode, frames=5, size=(32, 48), mask=None):
    generator = torch.Generator().manual_seed(0)
    count, (height, width) = len(CAPTIONS), size

    def clip():
        return torch.randint(0, 256, (count, frames, 3, *size), generator=generator, dtype=torch.uint8)

    draw = [Draw(i, Shape(frames, height, width), None, tuple(range(frames)), 0, 5 + i) for i in range(count)]
    more = {"camera_BFCHW": torch.rand(count, frames, 6, *size)} if mode == "control_ref_camera" else {}
    more |= {"control_BFCHW": clip()} if mode in ("control", "control_ref") else {}
    more |= {"mask_BFHW": mask} if mask is not None else {}
    first = torch.zeros(count, dtype=torch.int64)
    return Batch(draws=draw, text=CAPTIONS, pixels_BFCHW=clip(), ref_frame_B=first, keep={}, **more).to("cpu")


# ---- files


def test_found_by_its_channels(checkpoints):
    for mode, path in checkpoints.items():
        family = families.find(path)
        assert family.modes == (mode,)
        assert family.objective.shift == 1.0  # dynamic shifting is not applied in training
        assert (family.size_law.first_weight, family.size_law.nearest_rung) == (0.75, None)
    drops = {mode: families.find(path).drop for mode, path in checkpoints.items()}
    assert drops["control_ref"] == {"control": 0.2, "ref": 0.2} and drops["control_ref_camera"] == {"ref": 0.2}


def test_v5_is_told_by_its_second_encoder():
    family = easyanimate.variant({"in_channels": 32, "out_channels": 16, "text_embed_dim_t5": 2048}, "here")
    assert family.name == "easyanimate/v5_control" and family.caption == ("text", "text_t5")
    assert family.source.endswith("EasyAnimateV5-12b-zh-Control")


@pytest.mark.parametrize(
    "version, config, vae",
    [
        ("V4", {"_class_name": "HunyuanTransformer3DModel"}, {"_class_name": "AutoencoderKLMagvit"}),
        ("V3", {"_class_name": "Transformer3DModel"}, {"slice_compression_vae": True}),
        ("V2", {"_class_name": "Transformer3DModel"}, {"slice_mag_vae": True}),
        ("V1", {"_class_name": "Transformer3DModel"}, {"_class_name": "AutoencoderKL"}),
    ],
)
def test_older_versions_are_named(tmp_path, version, config, vae):
    for name, said in {"transformer": config, "vae": vae}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(said))
    with pytest.raises(
        UserError, match=rf"an EasyAnimate {version} checkpoint; supported are EasyAnimate V5\.1 and V5"
    ):
        families.find(tmp_path)


def test_what_is_not_supported_says_what_is():
    with pytest.raises(UserError, match=r"5 conditioning channels; supported are 32 \(easyanimate/v5\.1_control_ref\)"):
        easyanimate.variant({"in_channels": 21, "out_channels": 16}, "here")
    with pytest.raises(UserError, match="2 problems"):
        easyanimate.variant({"in_channels": 48, "resize_inpaint_mask_directly": False, "clip_channels": 8}, "here")


@pytest.mark.golden("released_keys/EasyAnimate*")
def test_keys_at_full_size(goldens):
    files = sorted((goldens / "released_keys").glob("EasyAnimate*"))
    assert files
    for file in files:
        names = json.loads(gzip.decompress(file.read_bytes()))
        given = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
        ours = from_released(given, {})
        blocks = {int(name.split(".")[1]) for name in given if name.startswith("transformer_blocks.")}
        mmdit = {int(name.split(".")[1]) for name in given if ".attn2." in name}
        t5 = given.get("text_proj_t5.weight")
        with torch.device("meta"):
            net = EasyAnimateTransformer3DModel(
                in_channels=given["proj.weight"].shape[1],
                out_channels=16,
                patch_size=2,
                num_layers=len(blocks),
                mmdit_layers=len(mmdit),
                add_norm_text_encoder="text_proj.0.weight" in given,
                text_embed_dim=given.get("text_proj.1.weight", given.get("text_proj.weight")).shape[1],
                text_embed_dim_t5=None if t5 is None else t5.shape[1],
            )
        assert weights.differences(net.state_dict(), ours) == []
        back = to_released(ours, {})
        assert list(back) == list(given) and all(back[name] is given[name] for name in given)


def test_a_network_in_either_layout_is_the_same(released, tmp_path):
    family = families.find(released)
    parts = family.load(released, encoders=False)
    family.save(tmp_path / "hub", parts.net.state_dict(), parts.config)
    family.save(tmp_path / "own/transformer", parts.net.state_dict(), parts.config, diffusers=True)
    assert json.loads((tmp_path / "hub/config.json").read_text()) == parts.config
    stored = weights.read(released / "transformer")
    assert weights.read(tmp_path / "hub").keys() == stored.keys()
    theirs = EasyAnimateTransformer3DModel.from_pretrained(tmp_path / "own/transformer").state_dict()
    again = family.load(released, encoders=False, transformer_path=tmp_path / "own")
    for name, tensor in parts.net.state_dict().items():
        assert torch.equal(theirs[name], tensor) and torch.equal(again.net.state_dict()[name], tensor)


def test_every_bad_key_is_listed(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["control"], tmp_path / "copy")
    state = weights.read(folder / "transformer")
    state["stray"] = state.pop("proj_out.bias")
    weights.write(state, folder / "transformer/diffusion_pytorch_model.safetensors")
    family = families.find(folder)
    with pytest.raises(UserError, match=r"missing: proj_out\.bias(.|\n)*unexpected: stray"):
        family.load(folder, encoders=False)


# ---- encode and denoise


@pytest.mark.parametrize("mode", EXTRA)
def test_conditions_fill_the_channels(loaded, mode):
    family, parts = loaded[mode]
    mask = torch.zeros(2, 5, 32, 48, dtype=torch.bool)
    encoded = family.encode(parts, batch_of(mode, mask=mask if mode == "inpaint" else None), mode)
    x0, cond = settle(encoded, [1, 2], parts.null)
    seen = []
    family.denoise(lambda **asked: seen.append(asked) or (x0,), x0, torch.ones(2), cond)
    joined = seen[0]["control_latents"]
    assert (0 if joined is None else joined.shape[1]) == extra(mode, family.geometry.channels)
    answer = family.denoise(parts.net, x0, torch.tensor([500.0, 20.0]), cond)
    assert answer.shape == x0.shape and answer.isfinite().all()
    assert family.decode(parts, x0).shape == (2, 5, 3, 32, 48)


def test_a_mask_in_latent_cells(loaded):
    """1 = keep, times the VAE's scale; of samples that are to be generated throughout, the drop alone decides."""
    family, parts = loaded["inpaint"]
    mask = torch.ones(2, 5, 32, 48, dtype=torch.bool)
    mask[1, 0] = False  # the first frame of the second is kept
    batch = batch_of("inpaint", mask=mask)
    batch.keep["inpaint"] = torch.tensor([False, False])
    encoded = family.encode(parts, batch, "inpaint")
    found, scale = encoded.cond["inpaint"], parts.frozen["vae"].config.scaling_factor
    torch.testing.assert_close(found.mean[1, 0, 0], torch.full((4, 6), scale))
    assert not found.mean[0, 0].any() and not found.mean[1, 0, 1].any()
    assert (found.logvar[:, 0] == -torch.inf).all() and found.logvar[:, 1:].isfinite().all()
    assert encoded.keep["inpaint"].tolist() == [False, True]


def test_noise_on_what_is_kept_alone():
    pixels = torch.rand(2, 5, 3, 16, 16) * 0.5
    pixels[:, 1:] = -1
    noisy = inpaint.noisy(pixels, [3, 4])
    assert torch.equal(noisy[:, 1:], pixels[:, 1:]) and torch.equal(noisy, inpaint.noisy(pixels, [3, 4]))
    assert 0.005 < (noisy - pixels)[:, 0].std() < 0.5
    assert torch.equal(inpaint.noisy(pixels[1:], [4]), noisy[1:])


def test_the_first_frame_has_cells_of_its_own():
    x = torch.zeros(1, 1, 5, 8, 8)
    x[:, :, 0] = 1
    cells = latents.to_cells(x, (2, 2, 2))
    assert torch.equal(cells[0, 0, :, 0, 0], torch.tensor([1.0, 0.0]))
    assert latents.to_cells(x[:, :, :1], (1, 2, 2)).shape == (1, 1, 1, 2, 2)
