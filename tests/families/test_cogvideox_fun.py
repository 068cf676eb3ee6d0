"""CogVideoX-Fun: what its files say, its names, and what it makes of a batch. The tiny checkpoints are the goldens'."""

import gzip
import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Draw, Shape
from reeltune.diffusion.loss import settle
from reeltune.families import configs, weights
from reeltune.families.cogvideox_fun import family as cogvideox
from reeltune.run.sizes import size_rules
from tests.families.every_family import derive, others
from tests.runs.small_run import recipe

CAPTIONS = ["a red fox runs", "two children fly a blue kite"]


@pytest.fixture(scope="module")
def released(goldens):
    """name -> folder of every tiny checkpoint."""
    found = {path.parents[1].name: path.parents[1] for path in (goldens / "multi").glob("*/transformer/config.json")}
    found = {name: path for name, path in sorted(found.items()) if "CogVideoX" in name}
    return found or pytest.skip("no tiny CogVideoX-Fun checkpoint among the goldens")


@pytest.fixture(scope="module")
def text_to_video(released, tmp_path_factory):
    """The same checkpoints without conditioning channels, untrained."""
    made = {}
    for name, path in released.items():
        ((_, changes),) = others(families.find(path), configs.read_config(path / "transformer"))
        made[name] = derive(path, tmp_path_factory.mktemp("t2v"), changes=changes)
    return made


def loaded(path):
    family = families.find(path)
    return family, family.load(path, frozen_dtype=torch.float32)


def batch_of(frames, mask=None, size=(32, 48)):
    count = len(CAPTIONS)
    pixels = torch.randint(0, 256, (count, frames, 3, *size), dtype=torch.uint8, generator=torch.Generator())
    draws = [Draw(i, Shape(frames, *size), None, tuple(range(frames)), 0, 5 + i) for i in range(count)]
    first = torch.zeros(count, dtype=torch.int64)
    return Batch(draws=draws, text=CAPTIONS, pixels_BFCHW=pixels, ref_frame_B=first, keep={}, mask_BFHW=mask).to("cpu")


# ---- files


@pytest.mark.parametrize(
    ("config", "name", "mode"),
    [
        ({"in_channels": 33}, "v1.0_2b_inp", "inpaint"),
        ({"in_channels": 16, "use_rotary_positional_embeddings": True}, "v1.0_5b_t2v", "normal"),
        ({"in_channels": 33, "add_noise_in_inpaint_model": True}, "v1.1_2b_inp", "inpaint"),
        ({"in_channels": 33, "patch_size_t": 2, "use_rotary_positional_embeddings": True}, "v1.5_5b_inp", "inpaint"),
    ],
)
def test_variants_are_told_by_their_config(config, name, mode):
    family = cogvideox.variant({"out_channels": 16, **config}, "here")
    assert (family.name, family.modes) == (f"cogvideox_fun/{name}", (mode,))
    assert family.drop == ({"inpaint": 0.9} if mode == "inpaint" else {})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"in_channels": 32}, r"16 conditioning channels; supported are 17 .* and 0"),
        ({"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings is True; only False"),
        ({"ofs_embed_dim": 512}, "ofs_embed_dim is 512; only None"),
    ],
)
def test_networks_of_others_are_refused(config, said):
    with pytest.raises(UserError, match=said):
        cogvideox.variant({"in_channels": 16, "out_channels": 16, **config}, "here")


@pytest.mark.golden("released_keys/CogVideoX*")
def test_released_names_are_the_networks_own(goldens):
    files = sorted((goldens / "released_keys").glob("CogVideoX*"))
    assert files
    for file in files:
        given = {
            name: torch.empty(shape, device="meta")
            for name, shape in json.loads(gzip.decompress(file.read_bytes())).items()
        }
        linear = given["patch_embed.proj.weight"].ndim == 2  # of time patches
        width = given["time_embedding.linear_1.weight"].shape[1]
        blocks = {int(name.split(".")[1]) for name in given if name.startswith("transformer_blocks.")}
        with torch.device("meta"):
            net = CogVideoXTransformer3DModel(
                num_attention_heads=width // 64,
                in_channels=given["patch_embed.proj.weight"].shape[1] // (8 if linear else 1),
                num_layers=len(blocks),
                patch_size_t=2 if linear else None,
                use_rotary_positional_embeddings=width != 30 * 64,
                patch_bias="patch_embed.proj.bias" in given,
            )
        assert weights.differences(net.state_dict(), cogvideox.same(given, {})) == []


@pytest.mark.golden
def test_saved_as_released_and_for_diffusers(released, tmp_path):
    for name, path in released.items():
        family = families.find(path)
        parts = family.load(path, encoders=False)
        stored, state = weights.read(path / "transformer"), parts.net.state_dict()
        family.save(tmp_path / name, state, parts.config)
        family.save(tmp_path / f"{name}-d", state, parts.config, diffusers=True)
        written = weights.read(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text()) == parts.config
        assert written.keys() == stored.keys()
        assert all(torch.equal(written[key], stored[key].float()) for key in stored)
        theirs = CogVideoXTransformer3DModel.from_pretrained(tmp_path / f"{name}-d").state_dict()
        assert theirs.keys() == state.keys() and all(torch.equal(theirs[key], state[key]) for key in state)


# ---- encode and denoise


@pytest.mark.golden
@pytest.mark.parametrize("frames", [1, 13])
def test_conditions_fill_the_channels_and_a_clip_comes_back(released, text_to_video, frames):
    for path in [*released.values(), *text_to_video.values()]:
        family, parts = loaded(path)
        mode = family.modes[0]
        count = family.geometry.legal_frames(frames)
        mask = torch.zeros(2, count, 32, 48, dtype=torch.bool) if mode == "inpaint" else None
        encoded = family.encode(parts, batch_of(count, mask), mode)
        x0, cond = settle(encoded, [1, 2], parts.null)
        assert x0.shape[2:] == family.geometry.latent(Shape(count, 32, 48))
        answer = family.denoise(parts.net, x0, torch.tensor([500, 20]), cond)
        assert answer.shape == x0.shape and answer.isfinite().all()
        assert family.decode(parts, x0).shape == (2, count, 3, 32, 48)


@pytest.mark.golden
def test_time_patches_take_an_even_number_of_latent_frames(released):
    laws = {families.find(path).geometry.patch_time: families.find(path).geometry for path in released.values()}
    assert [laws[1].legal_frames(n) for n in (1, 5, 49)] == [1, 5, 49]
    if 2 not in laws:
        pytest.skip("no V1.5 in this set, whose patches take two latent frames")
    assert [laws[2].legal_frames(n) for n in (1, 5, 9, 49)] == [1, 5, 5, 45]
    assert laws[2].tokens(Shape(45, 32, 48)) * 2 == laws[1].tokens(Shape(45, 32, 48))


@pytest.mark.golden
def test_noise_on_the_kept_clip_is_the_samples_own(released):
    by_noise = {}
    for path in released.values():
        family, parts = loaded(path)
        mask = torch.ones(2, 5, 32, 48, dtype=torch.bool)
        mask[:, 0] = False
        batch = batch_of(5, mask)
        one = family.encode(parts, batch, "inpaint").cond["inpaint"]
        batch.draws = [Draw(0, Shape(5, 32, 48), None, (0,), 0, 77), batch.draws[1]]
        other = family.encode(parts, batch, "inpaint").cond["inpaint"]
        assert torch.equal(one.mean[1], other.mean[1])
        by_noise[bool(parts.config["add_noise_in_inpaint_model"])] = not torch.equal(one.mean[0], other.mean[0])
    assert by_noise == {noise: noise for noise in by_noise}


@pytest.mark.golden
def test_clips_longer_than_the_table_of_positions_are_refused(released, tmp_path):
    for path in released.values():
        family, config = families.find(path), json.loads((path / "transformer/config.json").read_text())
        if config["use_rotary_positional_embeddings"]:
            assert family.most_frames is None
            continue
        most = config["sample_frames"]
        assert family.most_frames == most
        assert size_rules(recipe(path, tmp_path, tmp_path, video_sample_n_frames=most + 3), family)
        with pytest.raises(UserError, match=f"is {most + 4}, .* set video_sample_n_frames to {most} or less"):
            size_rules(recipe(path, tmp_path, tmp_path, video_sample_n_frames=most + 4), family)


@pytest.mark.golden
def test_the_table_of_positions_goes_where_the_weights_go(released):
    for path in released.values():
        family = families.find(path)
        net = family.load(path, encoders=False, device="meta").net
        assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
