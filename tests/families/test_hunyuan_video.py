"""HunyuanVideo: what its files say, what it makes of a batch, and whole runs. The tiny checkpoints are the goldens'."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Draw, Shape
from reeltune.diffusion.loss import settle
from reeltune.estimate.check import check
from reeltune.families import configs, weights
from reeltune.families.hunyuan_video import family as hunyuan
from reeltune.families.hunyuan_video import prompts
from reeltune.memory.blocks import blocks_of, recompute
from reeltune.run.data import gather, ledger_of
from reeltune.sampling.prompts import Request
from reeltune.sampling.sample import Setup, make_clip
from tests.families.every_family import derive, others
from tests.runs.small_run import data_set, recipe

CAPTIONS = ["a red fox runs", "two children fly a blue kite on the beach"]
MODES = ("normal", "i2v", "concat")


@pytest.fixture(scope="module")
def checkpoints(goldens, tmp_path_factory):
    """mode -> folder. The third is the second with an untrained network of the 33-channel kind."""
    found = {}
    for path in sorted((goldens / "multi").glob("*/transformer/config.json")):
        config = json.loads(path.read_text())
        if config["_class_name"] == hunyuan.CLASS:
            found["i2v" if config.get("image_condition_type") else "normal"] = path.parents[1]
    if len(found) < 2:
        pytest.skip("no tiny HunyuanVideo checkpoints among the goldens")
    i2v = found["i2v"]
    ((_, changes),) = others(families.find(i2v), configs.read_config(i2v / "transformer"))
    concat = derive(i2v, tmp_path_factory.mktemp("concat"), changes=changes)
    return found | {"concat": concat}


@pytest.fixture(scope="module")
def loaded(checkpoints):
    def one(path):
        family = families.find(path)
        return family, family.load(path, frozen_dtype=torch.float32)

    return {mode: one(path) for mode, path in checkpoints.items()}


def batch_of(frames=9, side=32, captions=CAPTIONS, seed=0, **keep):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(captions), frames, 3, side, side), generator=generator, dtype=torch.uint8)
    flags = {name: torch.tensor(kept) for name, kept in keep.items()}
    first = torch.zeros(len(captions), dtype=torch.int64)
    return Batch(draws=[], text=list(captions), pixels_BFCHW=pixels, ref_frame_B=first, keep=flags)


def setup_of(loaded, mode):
    family, parts = loaded[mode]
    return Setup(family, family.modes[0], parts, family.objective)


def picture_tokens(loaded, mode):
    """Every fourth patch of the picture with token replace, every second with channels of its own."""
    return prompts.picture_places(loaded[mode][1].frozen["text"]) // {"i2v": 4, "concat": 2}[mode]


# ---- files


def test_found_by_its_files(checkpoints):
    found = {mode: families.find(path) for mode, path in checkpoints.items()}
    names = ["hunyuan_video/t2v", "hunyuan_video/i2v", "hunyuan_video/i2v_concat"]
    assert [found[mode].name for mode in MODES] == names
    for mode, family in found.items():
        config = json.loads((checkpoints[mode] / "transformer/config.json").read_text())
        said = json.loads((checkpoints[mode] / "scheduler/scheduler_config.json").read_text())
        assert family.geometry.channels == config["out_channels"]
        assert family.objective.shift == said["shift"]
        assert family.size_law.first_weight == 0.75 and family.size_law.nearest_rung is None
        assert family.modes == (("normal",) if mode == "normal" else ("i2v",))


def test_schedule_is_the_checkpoints_own(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["normal"], tmp_path / "copy")
    file = folder / "scheduler/scheduler_config.json"
    said = json.loads(file.read_text())
    file.chmod(0o644)
    file.write_text(json.dumps(said | {"shift": 3.0}))
    assert families.find(folder).objective.shift == 3.0
    file.write_text(json.dumps(said | {"use_dynamic_shifting": True}))
    assert families.find(folder).objective.shift == 1.0  # that of sampling; training's levels are not shifted by size
    file.write_text(json.dumps(said | {"_class_name": "EulerDiscreteScheduler"}))
    with pytest.raises(UserError, match="EulerDiscreteScheduler"):
        families.find(folder)


def test_every_missing_part_is_named_at_once(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["i2v"], tmp_path / "copy")
    for name in ("image_processor", "text_encoder_2"):
        shutil.rmtree(folder / name)
    with pytest.raises(UserError) as told:
        families.find(folder)
    assert "no image_processor" in str(told.value) and "no text_encoder_2" in str(told.value)


def test_what_is_not_supported_says_what_is():
    with pytest.raises(UserError, match=r"latent_concat and 0 .*hunyuan_video/i2v_concat: latent_concat and 17"):
        hunyuan.variant({"image_condition_type": "latent_concat", "in_channels": 16, "out_channels": 16}, "here")


@pytest.mark.golden("released_keys/HunyuanVideo*")
@pytest.mark.parametrize("kind", [None, "token_replace"])
def test_keys_at_full_size(goldens, kind):
    files = [f for f in (goldens / "released_keys").glob("HunyuanVideo*") if ("I2V" in f.name) == (kind is not None)]
    assert files
    for file in files:
        names = json.loads(gzip.decompress(file.read_bytes()))
        given = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
        with torch.device("meta"):
            net = HunyuanVideoTransformer3DModel(image_condition_type=kind)
        ours = hunyuan.same(given, {})
        assert weights.differences(net.state_dict(), ours) == []
        back = hunyuan.same(ours, {})
        assert list(back) == list(given) and all(back[name] is given[name] for name in given)


def test_every_bad_key_of_all_shards_is_listed(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["normal"], tmp_path / "copy")
    config = folder / "transformer/config.json"
    said = json.loads(config.read_text())
    config.chmod(0o644)
    config.write_text(json.dumps(said | {"num_layers": said["num_layers"] + 1, "mlp_ratio": 2.0}))
    family = families.find(folder)
    with pytest.raises(UserError) as told:
        family.load(folder)
    assert f"missing: transformer_blocks.{said['num_layers']}.attn.to_q.weight" in str(told.value)
    assert "misshapen: transformer_blocks.0.ff.net.0.proj.weight" in str(told.value)


def test_a_bad_key_of_a_text_encoder(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["normal"], tmp_path / "copy")
    file = folder / "text_encoder/model.safetensors"
    state = weights.read(file)
    file.chmod(0o644)
    name = next(name for name in state if name.endswith("layers.1.mlp.up_proj.weight"))
    state["stray"] = state.pop(name)
    file.unlink()
    weights.write(state, file)
    family = families.find(folder)
    with pytest.raises(UserError, match=r"missing: layers\.1\.mlp\.up_proj\.weight(.|\n)*unexpected: stray"):
        family.load(folder)


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_read_again(checkpoints, loaded, tmp_path, mode):
    family, parts = loaded[mode]
    changed = {name: tensor + 1 for name, tensor in parts.net.state_dict().items()}
    family.save(tmp_path / "transformer", changed, parts.config)
    said = json.loads((tmp_path / "transformer/config.json").read_text())
    assert said == json.loads((checkpoints[mode] / "transformer/config.json").read_text())
    theirs = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "transformer").state_dict()
    again = family.load(checkpoints[mode], encoders=False, transformer_path=tmp_path)
    assert not again.null and not again.frozen
    for name, tensor in again.net.state_dict().items():
        assert torch.equal(tensor, changed[name]) and torch.equal(theirs[name], changed[name])


# ---- encode


@pytest.mark.parametrize("mode", MODES)
def test_shapes_and_conditions(loaded, mode):
    family, parts = loaded[mode]
    encoded = family.encode(parts, batch_of(), family.modes[0])
    channels, cells = family.geometry.channels, family.geometry.latent(Shape(9, 32, 32))
    assert encoded.x0.mean.shape == (2, channels, *cells)
    assert set(family.caption) <= set(encoded.cond)
    assert ("guidance" in encoded.cond) == parts.net.config.guidance_embeds
    assert encoded.loss_mask.shape == (2, 1, cells[0], 1, 1)
    assert encoded.loss_mask[:, 0, :, 0, 0].tolist() == [[0.0, 1.0, 1.0]] * 2
    picture, removed = (0, 0) if mode == "normal" else (picture_tokens(loaded, mode), prompts.HEADER_TOKENS)
    assert encoded.cond["text"].shape[1] == picture + prompts.TEXT_LENGTH - removed
    assert encoded.cond["text_mask"].shape == encoded.cond["text"].shape[:2]
    assert (encoded.cond["text_mask"][:, :picture] == 1).all()
    x0, cond = settle(encoded, [1, 2], parts.null)
    answer = family.denoise(parts.net, x0, torch.tensor([500.0, 20.0]), cond)
    assert answer.shape == x0.shape and answer.isfinite().all()
    assert family.decode(parts, x0).shape == (2, 9, 3, 32, 32)


def test_templates_are_cropped_at_the_caption(loaded):
    for mode, template, crop in (
        ("normal", prompts.TEMPLATE, prompts.CROP),
        ("i2v", prompts.PICTURE_TEMPLATE, prompts.PICTURE_CROP),
    ):
        tokenizer = loaded[mode][1].extras["tokenizer"]
        ids, _ = prompts.tokens_of(tokenizer, template, ["a red fox"], crop + 40)
        caption = tokenizer("a red fox<|eot_id|>", add_special_tokens=False).input_ids
        assert ids[0, crop : crop + len(caption)].tolist() == caption


@pytest.mark.parametrize("mode", ["normal", "i2v"])
def test_a_dropped_caption_is_the_empty_one_and_keeps_its_picture(loaded, mode):
    setup = setup_of(loaded, mode)
    dropped = setup.encode(batch_of(text=[True, False]))
    empty = setup.encode(batch_of(captions=[CAPTIONS[0], ""], text=[True, True]))
    _, cond = settle(dropped, [1, 2], setup.parts.null)
    _, wanted = settle(empty, [1, 2], setup.parts.null)
    for name in setup.family.caption:
        torch.testing.assert_close(cond[name], wanted[name], msg=name)
    kept = settle(setup.encode(batch_of(text=[True, True])), [1, 2], setup.parts.null)[1]
    assert all(not torch.equal(kept[name][1], cond[name][1]) for name in setup.family.caption)


@pytest.mark.slow
def test_a_caption_cut_anywhere_keeps_its_length(loaded):
    """The cut falls before, in and after the last turn's header."""
    family, parts = loaded["i2v"]
    tokenizer, limit = parts.extras["tokenizer"], prompts.TEXT_LENGTH + prompts.PICTURE_CROP
    lengths = {
        n: len(tokenizer(prompts.PICTURE_TEMPLATE.format("a " * n)).input_ids) for n in range(prompts.TEXT_LENGTH)
    }
    near = [n for n, length in lengths.items() if -1 <= length - limit <= prompts.HEADER_TOKENS + 2]
    assert len(near) > 3
    tokens = picture_tokens(loaded, "i2v") + prompts.TEXT_LENGTH - prompts.HEADER_TOKENS
    for n in near:
        encoded = family.encode(parts, batch_of(captions=["a fox", "a " * n], frames=1), "i2v")
        assert encoded.cond["text"].shape[1] == tokens
        assert encoded.cond["text_mask"][1].sum() > tokens - 2 * prompts.HEADER_TOKENS


def test_a_caption_that_names_a_picture(loaded):
    """The template's own mark stands for the picture once only."""
    family, parts = loaded["i2v"]
    encoded = family.encode(parts, batch_of(captions=["an <image> of", "{} braces"], frames=1), "i2v")
    plain = family.encode(parts, batch_of(captions=["an image of", "{} braces"], frames=1), "i2v")
    torch.testing.assert_close(encoded.cond["text"], plain.cond["text"])


def test_the_known_frame_is_that_of_the_whole_clip_in_grey(loaded):
    """Tiles in time past the first are not encoded, and do not matter."""
    _, parts = loaded["i2v"]
    vae, pixels = parts.frozen["vae"], batch_of(frames=25, side=16).to("cpu").pixels_BFCHW
    grey = torch.zeros_like(pixels)
    grey[:, 0] = pixels[:, 0]
    cut = hunyuan.first_latent(hunyuan.encode_clip(vae, hunyuan.first_alone(vae, pixels)))
    whole = hunyuan.first_latent(hunyuan.encode_clip(vae, grey))
    torch.testing.assert_close(cut.mean, whole.mean)
    assert not torch.allclose(cut.mean, hunyuan.encode_clip(vae, pixels[:, :1]).mean, atol=1e-3)


def test_large_pictures_are_encoded_in_tiles(loaded):
    vae = loaded["normal"][1].frozen["vae"]
    side = vae.tile_sample_min_width + 16
    pixels = batch_of(frames=1, side=side, captions=["a"]).to("cpu").pixels_BFCHW
    with torch.no_grad():
        tiled = vae.tiled_encode(pixels.transpose(1, 2)).chunk(2, 1)[0] * vae.config.scaling_factor
    torch.testing.assert_close(hunyuan.encode_clip(vae, pixels).mean, tiled)


# ---- denoise and sample


class Noting(torch.nn.Module):
    """Answers zeros, and keeps what it was asked."""

    def __init__(self, net):
        super().__init__()
        self.config, self.asked = net.config, []

    def forward(self, **asked):
        self.asked.append(asked)
        return (torch.zeros_like(asked["hidden_states"][:, : self.config.out_channels]),)


@pytest.mark.parametrize("mode", MODES)
def test_where_the_known_frame_goes(loaded, mode):
    family, parts = loaded[mode]
    x0, cond = settle(family.encode(parts, batch_of(), family.modes[0]), [1, 2], parts.null)
    net, x = Noting(parts.net), torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    family.denoise(net, x, torch.ones(2), cond)
    seen, C = net.asked[0]["hidden_states"], family.geometry.channels
    assert seen.shape[1] == net.config.in_channels
    if mode == "normal":
        assert torch.equal(seen, x)
    elif mode == "i2v":
        assert torch.equal(seen[:, :, :1], cond["ref"]) and torch.equal(seen[:, :, 1:], x[:, :, 1:])
    else:
        assert torch.equal(seen[:, :C], x) and torch.equal(seen[:, C : 2 * C, :1], cond["ref"])
        assert not seen[:, C:, 1:].any() and (seen[:, 2 * C, 0] == 1).all()
    guidance = net.asked[0]["guidance"]
    assert guidance is None if mode == "concat" else guidance.tolist() == [6000.0, 6000.0]


@pytest.mark.parametrize("mode", ["normal", "i2v"])
def test_the_blind_pass_lacks_the_whole_caption(loaded, mode, tmp_path, monkeypatch):
    setup = setup_of(loaded, mode)
    family, parts = setup.family, setup.parts
    batch = batch_of(captions=CAPTIONS[:1])
    batch.draws = [Draw(0, Shape(9, 32, 32), None, tuple(range(9)), 0, 5)]
    net, decoded = Noting(parts.net), []
    noted = replace(family, decode=lambda parts, x0: decoded.append(x0) or family.decode(parts, x0))
    request = Request(CAPTIONS[0], lambda: batch, seed=7, fps=8.0)
    make_clip(replace(setup, family=noted), net, request, batch, tmp_path / "a.mp4", steps=2, guidance_scale=2.0)
    full, blind = net.asked[:2]
    _, empty = settle(setup.encode(batch_of(captions=[""])), [7], parts.null)
    asked = {
        "text": "encoder_hidden_states",
        "text_mask": "encoder_attention_mask",
        "pooled": "pooled_projections",
    }
    for name, argument in asked.items():
        torch.testing.assert_close(blind[argument], empty[name])
        assert not torch.equal(blind[argument], full[argument])
    if mode == "i2v":
        assert torch.equal(decoded[0][:, :, :1], full["hidden_states"][:, :, :1])


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_blocks_give_the_same_gradients(checkpoints, loaded, mode):
    family, parts = loaded[mode]
    again = family.load(checkpoints[mode], encoders=False).net
    recompute(blocks_of(again, family.blocks))
    blocks = [*parts.net.transformer_blocks, *parts.net.single_transformer_blocks]
    assert {type(block).__name__ for block in blocks} == set(family.blocks)
    x0, cond = settle(family.encode(parts, batch_of(frames=5), family.modes[0]), [1, 2], parts.null)
    gradients = []
    for net in (parts.net, again):
        net.zero_grad()
        family.denoise(net, x0, torch.tensor([500.0, 20.0]), cond).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in net.named_parameters()})
    parts.net.zero_grad()
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        assert gradient is None or torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("mode", MODES)
def test_autocast(loaded, mode):
    family, parts = loaded[mode]
    x0, cond = settle(family.encode(parts, batch_of(frames=5), family.modes[0]), [1, 2], parts.null)
    with torch.no_grad():
        exact = family.denoise(parts.net, x0, torch.tensor([500.0, 20.0]), cond)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = family.denoise(parts.net, x0, torch.tensor([500.0, 20.0]), cond)
    assert 0 < (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


# ---- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("data"), clips=5, stills=3)


def test_images_and_single_frames_are_left_out_with_a_line(checkpoints, data, tmp_path):
    settings = recipe(checkpoints["normal"], data, tmp_path, train_mode="normal")
    family = families.find(checkpoints["normal"])
    inputs = gather(settings, family, "normal", show_progress=False)
    assert len(inputs.train) + len(inputs.held_out) == 5 and inputs.train.kind_video.all()
    assert inputs.held_out.kind_video.all()
    lines = list(check(settings))
    assert "unused   3 entries that teach this model nothing" in lines
    assert sum("learns nothing from fewer than 5 sampled frames" in line for line in lines) == 3
    ledger = ledger_of(settings, inputs)
    ledger.failures[0] = (1, "broke")
    ledger.max_bad_share = 0.2  # of 8 entries: one broken file, and images are not bad
    assert ledger.too_many_bad() is None
    summary = ledger.write(tmp_path)
    assert summary["left_out"] == 4 and summary["entries"] == 8
    stride = recipe(checkpoints["normal"], data, tmp_path, train_mode="normal", video_sample_stride=6)
    with pytest.raises(UserError, match="only images and clips of fewer than 5 sampled frames"):
        gather(stride, family, "normal", show_progress=False)
    budget = {"random_hw_adapt": True, "training_with_video_token_length": True, "image_sample_size": 64}
    with pytest.raises(UserError, match="cut to 1 frames, and this model learns nothing from fewer than 5"):
        gather(recipe(checkpoints["normal"], data, tmp_path, **budget), family, "normal", show_progress=False)
