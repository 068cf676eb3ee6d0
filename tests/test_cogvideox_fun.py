import gzip
import json
import shutil

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from reeltune import families
from reeltune.diffusion.loss import settle
from reeltune.errors import UserError
from reeltune.families import weights
from reeltune.families.cogvideox_fun import family as cogvideox
from reeltune.train import train
from reeltune.types import Batch, Draw, Shape
from small_run import data_set, recipe

CAPTIONS = ["a red fox runs", "two children fly a blue kite"]


@pytest.fixture(scope="module")
def released(goldens):
    """name -> folder of every tiny checkpoint."""
    found = {path.parents[1].name: path.parents[1] for path in (goldens / "multi").glob("*/transformer/config.json")}
    found = {name: path for name, path in sorted(found.items()) if "CogVideoX" in name}
    return found or pytest.skip("no tiny CogVideoX-Fun checkpoint among the goldens")


@pytest.fixture(scope="module")
def text_to_video(released, tmp_path_factory):
    """The same checkpoints without conditioning channels, untrained, in diffusers' layout."""
    made = {}
    for name, path in released.items():
        folder = tmp_path_factory.mktemp("t2v") / name
        shutil.copytree(path, folder, ignore=shutil.ignore_patterns("transformer"))
        config = json.loads((path / "transformer/config.json").read_text())
        torch.manual_seed(0)
        sized = weights.arguments_of(CogVideoXTransformer3DModel, config | {"in_channels": config["out_channels"]})
        CogVideoXTransformer3DModel(**sized).save_pretrained(folder / "transformer")
        made[name] = folder
    return made


def loaded(path):
    family = families.find(path)
    return family, family.load(path, family, frozen_dtype=torch.float32)


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


@pytest.mark.golden
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
        parts = family.load(path, family, encoders=False)
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
        frames = family.geometry.legal_frames(frames)
        mask = torch.zeros(2, frames, 32, 48, dtype=torch.bool) if mode == "inpaint" else None
        encoded = family.encode(parts, batch_of(frames, mask), mode)
        x0, cond = settle(encoded, [1, 2], parts.null)
        assert x0.shape[2:] == family.geometry.latent(Shape(frames, 32, 48))
        answer = family.denoise(parts.net, x0, torch.tensor([500, 20]), cond)
        assert answer.shape == x0.shape and answer.isfinite().all()
        assert family.decode(parts, x0).shape == (2, frames, 3, 32, 48)


@pytest.mark.golden
def test_time_patches_take_an_even_number_of_latent_frames(released):
    laws = {families.find(path).geometry.patch_time: families.find(path).geometry for path in released.values()}
    assert [laws[1].legal_frames(n) for n in (1, 5, 49)] == [1, 5, 49]
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
def test_a_clip_without_positions_is_refused(released):
    for path in released.values():
        family, parts = loaded(path)
        if not parts.net.config.use_rotary_positional_embeddings:
            frames = parts.net.config.sample_frames
            cogvideox.check_length(parts.net, family.geometry.latent(Shape(frames, 32, 32))[0])
            with pytest.raises(UserError, match=f"positions for 13; set video_sample_n_frames to {frames}"):
                cogvideox.check_length(parts.net, family.geometry.latent(Shape(frames + 4, 32, 32))[0])


# ---- runs


@pytest.mark.golden
@pytest.mark.parametrize("mode", ["inpaint", "normal"])
def test_a_run_and_its_exact_resume(released, text_to_video, tmp_path, mode):
    torch.set_num_threads(1)
    data = data_set(tmp_path / "data", clips=5)
    for name, path in (released if mode == "inpaint" else text_to_video).items():
        settings = {"train_mode": None, "max_train_steps": 2, "text_drop_ratio": 0.5, "checkpointing_steps": 1}
        whole, halves = tmp_path / name / "whole", tmp_path / name / "halves"
        train(recipe(path, data, whole, preview_count=1, preview_steps=1, **settings))
        assert (whole / "previews/step-2/0.mp4").is_file()
        train(recipe(path, data, halves, **settings | {"max_train_steps": 1}))
        train(recipe(path, data, halves, resume_from_checkpoint="latest", **settings))
        ends = [weights.read(out / "checkpoint-2/transformer") for out in (whole, halves)]
        start = weights.read(path / "transformer")
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in start)
        assert any(not torch.equal(ends[0][key], start[key].float()) for key in start)
