"""Wan2.1-Fun on tiny random checkpoints: finding, loading, encoding, denoising, saving."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Draw, Posterior
from reeltune.diffusion.loss import settle
from reeltune.families import text, weights
from reeltune.families.spec import check_mode
from reeltune.families.wan_fun import family as wan
from reeltune.families.wan_fun import keys, layout, sizes
from reeltune.families.wan_fun.net import Rope, sinusoid
from reeltune.memory.blocks import recompute
from tests.families.tiny_wan import CHANNELS, VARIANTS, filled, network, tiny_checkpoint

FRAMES, HEIGHT, WIDTH = 5, 32, 48
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """variant -> folder, written once."""
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = tiny_checkpoint(tmp_path_factory.mktemp(variant.replace(".", "_")), variant)
        return made[variant]

    return get


@pytest.fixture(scope="module")
def loaded(checkpoint):
    """variant -> (family, parts), loaded once; tests leave the weights as they are."""
    made = {}

    def get(variant):
        if variant not in made:
            family = families.find(checkpoint(variant))
            made[variant] = family, family.load(checkpoint(variant))
        return made[variant]

    return get


@pytest.fixture
def copy(checkpoint, tmp_path):
    """variant -> a folder that the test may change."""
    return lambda variant: shutil.copytree(checkpoint(variant), tmp_path / "copy")


def rewrite(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def batch(mode, count=2, ref_frames=(0, 3), keep=None) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def pixels(channels=3):
        shape = (count, FRAMES, channels, HEIGHT, WIDTH)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    mask = torch.ones(count, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    mask[0, :2, :, : WIDTH // 2] = False  # the first sample has something to keep
    draws = [Draw(i, None, None, (), 0, seed=i) for i in range(count)]
    return Batch(
        draws,
        ["a cat.", "two dogs"][:count],
        pixels(),
        torch.tensor(ref_frames[:count]),
        keep or {},
        control_BFCHW=pixels() if mode.startswith("control") and "camera" not in mode else None,
        camera_BFCHW=pixels(6).float() / 255 if "camera" in mode else None,
        mask_BFHW=mask if mode in ("inpaint", "i2v") else None,
    ).to("cpu")


# ---- finding


@pytest.mark.parametrize("variant", VARIANTS)
def test_found_by_its_files(checkpoint, variant):
    family = families.find(checkpoint(variant))
    assert family.name == f"wan_fun/{variant}"
    assert family.geometry.channels == CHANNELS
    assert family.objective.shift == 5.0
    assert set(family.needs) == set(family.modes)


DIALECTS = {
    "saved": lambda c: {"in_channels": c["in_dim"], "hidden_size": c["dim"], "num_heads": c["num_heads"], "in_dim": 16},
    "diffsynth": lambda c: {
        "has_image_input": c["model_type"] == "i2v",
        "has_ref_conv": c.get("add_ref_conv", False),
        "dim": c["dim"],
        "in_dim": c["in_dim"],
        "num_heads": c["num_heads"],
    },
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_config_build_the_same_network(copy, loaded, dialect):
    folder = copy("control_v1.1")
    rewrite(folder / "config.json", DIALECTS[dialect])
    family = families.find(folder)
    parts = family.load(folder, encoders=False)
    assert family.name == "wan_fun/control_v1.1"
    assert dict(parts.net.config) == dict(loaded("control_v1.1")[1].net.config)


@pytest.mark.parametrize("with_index", [True, False])
def test_shards(copy, loaded, with_index):
    folder = copy("control_t2v")
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, folder / shard)
    if with_index:
        table = {name: shard for shard, part in shards.items() for name in part}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": table}))
    family = families.find(folder)
    ours = family.load(folder, encoders=False).net.state_dict()
    theirs = loaded("control_t2v")[1].net.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    next(folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is missing"):
        families.find(folder)


@pytest.mark.parametrize("variant", ["control_camera", "inp"])
def test_diffusers_layout(copy, loaded, tmp_path, variant):
    """transformer, vae, text_encoder, image_encoder, tokenizer, all under the libraries' names."""
    _, parts = loaded(variant)
    folder = tmp_path / "diffusers"
    layout.save_transformer(folder / "transformer", parts.net.state_dict(), parts.config, diffusers=True)
    parts.frozen["vae"].save_pretrained(folder / "vae")
    parts.frozen["text"].save_pretrained(folder / "text_encoder")
    parts.frozen["image"].save_pretrained(folder / "image_encoder")
    parts.extras["tokenizer"].save_pretrained(folder / "tokenizer")
    family = families.find(folder)
    assert family.name == f"wan_fun/{variant}"
    again = family.load(folder)
    mode = family.modes[0]
    ours, theirs = (family.encode(p, batch(mode), mode) for p in (again, parts))
    assert torch.equal(ours.x0.mean, theirs.x0.mean)
    for name in ("text", "image"):
        assert torch.equal(ours.cond[name], theirs.cond[name])
    state = parts.net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.net.state_dict().items())


def test_schedule_and_file_names_from_the_model_yaml(copy, tmp_path):
    folder = copy("control_t2v")
    (folder / "Wan2.1_VAE.pth").rename(folder / "other.pth")
    with pytest.raises(UserError, match=r"no vae at Wan2.1_VAE.pth or vae"):
        families.find(folder)
    yaml = tmp_path / "model.yaml"
    yaml.write_text("vae_kwargs: {vae_subpath: other.pth}\nscheduler_kwargs: {shift: 3.0, num_train_timesteps: 500}")
    family = families.find(folder, config_path=yaml)
    assert (family.objective.shift, family.objective.steps) == (3.0, 500)
    with family.load(folder, encoders=False).borrow("vae") as vae:
        assert vae.config.latents_mean
    yaml.write_text("scheduler_kwargs: {use_dynamic_shifting: true}\nvae_kwargs: {vae_subpath: other.pth}")
    with pytest.raises(UserError, match="use_dynamic_shifting"):
        families.find(folder, config_path=yaml)


def test_every_missing_part_is_named_at_once(copy):
    folder = copy("control_v1.0")
    for name in layout.RELEASED.values():
        if name.endswith(".pth"):
            (folder / name).unlink()
    with pytest.raises(UserError) as error:
        families.find(folder)
    assert [problem.split(" at ")[0] for problem in error.value.problems] == ["no vae", "no text", "no image"]


def test_what_is_not_supported_says_what_is(copy, tmp_path):
    folder = copy("control_t2v")
    state = load_file(folder / WEIGHTS)
    save_file(state | {"patch_embedding.weight": torch.zeros(48, 20, 1, 2, 2)}, folder / WEIGHTS)
    rewrite(folder / "config.json", lambda c: c | {"in_dim": 20})
    with pytest.raises(
        UserError, match=r"4 conditioning channels; supported are .*inp: 20 conditioning channels, picture"
    ):
        families.find(folder)
    with pytest.raises(UserError, match="is not a folder"):
        families.find(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds nothing, which is no checkpoint"):
        families.find(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in_dim": 36}, "config.json has {'in_dim': 36}, but the weights have 48"),
        ({"num_heads": None}, "0 attention heads do not divide the width 48; config.json must give num_heads"),
        ({"num_heads": 5}, "5 attention heads do not divide"),
        ({"text_len": 256}, "text_len is 256"),
        ({"add_ref_conv": True}, "add_ref_conv True, but the weights have no ref_conv.weight"),
    ],
)
def test_config_that_contradicts_the_weights(copy, change, says):
    folder = copy("control_v1.0")
    rewrite(folder / "config.json", lambda c: c | change)
    with pytest.raises(UserError) as error:
        families.find(folder)
    assert any(says in problem for problem in error.value.problems)


def test_a_mode_that_a_checkpoint_cannot_do():
    assert check_mode(wan.CAMERA, None) == "control_ref_camera"
    assert check_mode(wan.BASE, "control") == "control"
    with pytest.raises(UserError, match=r"'inpaint', which .*v1.0 cannot do; it can do control_ref and control"):
        check_mode(wan.BASE, "inpaint")


# ---- loading


def test_every_bad_key_is_listed_at_once(copy):
    folder = copy("control_v1.0")
    state = load_file(folder / WEIGHTS)
    del state["blocks.1.ffn.0.bias"], state["head.head.bias"]
    state |= {"blocks.0.norm9.weight": torch.zeros(3), "blocks.0.norm3.weight": torch.zeros(7)}
    save_file(state, folder / WEIGHTS)
    family = families.find(folder)
    with pytest.raises(UserError) as error:
        family.load(folder)
    assert error.value.problems == [
        "missing: blocks.1.ffn.0.bias (96,)",
        "missing: head.head.bias (64,)",
        "unexpected: blocks.0.norm9.weight (3,)",
        "misshapen: blocks.0.norm3.weight is (7,), the network has (48,)",
    ]


class Shell:
    def __reduce__(self):
        import os

        return os.system, ("true",)


def test_files_that_hold_code_or_rubbish(copy):
    folder = copy("control_t2v")
    family = families.find(folder)
    vae = folder / layout.RELEASED["vae"]
    for content, says in ((Shell(), "loading it could run code"), ([1, 2], "not a plain table of tensors")):
        torch.save(content, vae)
        with pytest.raises(UserError, match=says):
            family.load(folder)
    torch.save({"encoder.conv1.weight": torch.zeros(4, 3, 3, 3, 3)}, vae)
    with pytest.raises(UserError, match=r"is not a Wan2.1 VAE: it has no post_quant_conv.weight"):
        family.load(folder)
    vae.write_bytes(vae.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        family.load(folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-64])
    with pytest.raises(UserError, match="cannot be read"):
        families.find(folder)


def test_dtypes(copy):
    """Frozen networks as stored unless asked; the network in the dtype asked for, its values unrounded otherwise."""
    folder = copy("control_v1.0")
    path = folder / layout.RELEASED["text"]
    torch.save({name: tensor.bfloat16() for name, tensor in torch.load(path).items()}, path)
    family = families.find(folder)
    parts = family.load(folder)
    kinds = {name: next(net.parameters()).dtype for name, net in parts.frozen.items()}
    assert kinds == {"vae": torch.float32, "text": torch.bfloat16, "image": torch.float32}
    stored = load_file(folder / WEIGHTS)
    ours = family.to_released(parts.net.state_dict(), parts.config)
    assert all(torch.equal(ours[name], stored[name]) for name in stored)
    assert not any(p.requires_grad for net in parts.frozen.values() for p in net.parameters())
    assert all(p.requires_grad for p in parts.net.parameters())
    half = family.load(folder, dtype=torch.bfloat16, frozen_dtype=torch.bfloat16)
    networks = [half.net, *half.frozen.values()]
    assert {p.dtype for net in networks for p in net.parameters()} == {torch.bfloat16}
    encoded = family.encode(half, batch("control_ref"), "control_ref")
    assert encoded.x0.mean.dtype == encoded.cond["text"].dtype == encoded.cond["image"].dtype == torch.float32


def test_other_weights_for_the_same_network(checkpoint, tmp_path):
    """transformer_path: a saved folder, a checkpoint-N that holds one, or a file; a misfit is refused."""
    other = filled(network("control_t2v"), 99)
    folder = tmp_path / "checkpoint-3"
    layout.save_transformer(folder / "transformer", other.state_dict(), dict(other.config))
    family = families.find(checkpoint("control_t2v"))
    for path in (folder, folder / "transformer", folder / "transformer" / WEIGHTS):
        parts = family.load(checkpoint("control_t2v"), encoders=False, transformer_path=path)
        ours = parts.net.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in other.state_dict().items())
    misfit = families.find(checkpoint("control_v1.0"))
    with pytest.raises(UserError, match=r"misshapen: patch_embedding.weight is \(48, 32, 1, 2, 2\)"):
        misfit.load(checkpoint("control_v1.0"), transformer_path=folder)


# ---- encoding

EXPECTED = {
    ("control_v1.0", "control_ref"): {"text", "control", "ref", "image"},
    ("control_v1.0", "control"): {"text", "control", "ref", "image"},
    ("control_v1.1", "control_ref"): {"text", "control", "ref", "full_ref", "image"},
    ("control_v1.1", "control"): {"text", "control", "ref", "image"},
    ("control_camera", "control_ref_camera"): {"text", "ref", "camera", "image"},
    ("inp", "inpaint"): {"text", "inpaint", "image"},
    ("inp", "i2v"): {"text", "inpaint", "image"},
    ("control_t2v", "control"): {"text", "control"},
}


@pytest.mark.parametrize(("variant", "mode"), EXPECTED)
def test_conditions_and_answer(loaded, variant, mode):
    family, parts = loaded(variant)
    given = batch(mode)
    options = {"add_full_ref_image_in_self_attention": "1.1" in variant}
    encoded = family.encode(parts, given, mode, options=options)
    assert encoded.cond.keys() == EXPECTED[variant, mode]
    assert set(family.drop) & encoded.cond.keys() == encoded.cond.keys() - {"text", "camera"}
    assert encoded.x0.mean.shape == (2, CHANNELS, 2, HEIGHT // 8, WIDTH // 8)
    x0, cond = settle(encoded, given.seeds, parts.null)
    with torch.no_grad():
        answer = family.denoise(parts.net, x0, torch.tensor([900.5, 20.0]), cond)
        assert answer.shape == x0.shape
        for name in encoded.cond.keys() - {"text", "ref", "image"}:  # each says something to the network
            less = dict(cond, **{name: torch.zeros_like(cond[name])})
            assert not torch.equal(family.denoise(parts.net, x0, torch.tensor([900.5, 20.0]), less)[0], answer[0]) or (
                name == "full_ref"  # sample 0 has its reference at frame 0, so these tokens are blank
            )
    assert family.decode(parts, x0).shape == given.pixels_BFCHW.shape


def test_x0_is_normalised_by_the_mean_alone(loaded):
    _, parts = loaded("control_t2v")
    vae, given = parts.frozen["vae"], batch("control")
    found = wan.encode_clip(vae, given.pixels_BFCHW)
    with torch.no_grad():
        raw = vae.encode(given.pixels_BFCHW.transpose(1, 2)).latent_dist
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    torch.testing.assert_close(found.mean, ((raw.mean.movedim(1, -1) - mean) / std).movedim(-1, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logvar, raw.logvar, rtol=0, atol=1e-5)


def test_reference_rules(loaded):
    """Channels only where the reference is frame 0, tokens only where it is not, and never what a coin dropped."""
    family, parts = loaded("control_v1.1")
    options = {"add_full_ref_image_in_self_attention": True}
    for coin in (True, False):
        coins = {name: torch.tensor([coin, coin]) for name in family.drop}
        given = batch("control_ref", keep=coins)
        encoded = family.encode(parts, given, "control_ref", options=options)
        assert encoded.keep["ref"].tolist() == [coin, False]
        assert encoded.keep["full_ref"].tolist() == [False, coin]
        assert encoded.keep["control"].tolist() == [coin, coin]
        _, cond = settle(encoded, given.seeds, parts.null)
        assert [bool(cond["ref"][i].any()) for i in range(2)] == [coin, False]
        assert [bool(cond["full_ref"][i].any()) for i in range(2)] == [False, coin]
    assert "full_ref" not in family.encode(parts, batch("control_ref"), "control_ref").cond


def test_the_picture_is_the_reference_frame(loaded):
    family, parts = loaded("control_v1.0")
    given = batch("control_ref")
    moved = family.encode(parts, replace(given, ref_frame_B=torch.tensor([0, 4])), "control_ref")
    same = family.encode(parts, given, "control_ref")
    assert torch.equal(moved.cond["image"][0], same.cond["image"][0])
    assert not torch.equal(moved.cond["image"][1], same.cond["image"][1])
    assert not torch.equal(moved.cond["ref"].mean[1], same.cond["ref"].mean[1])


def test_inpainting_is_dropped_only_where_all_is_to_be_generated(loaded):
    family, parts = loaded("inp")
    given = batch("inpaint", keep={"inpaint": torch.tensor([False, False])})
    encoded = family.encode(parts, given, "inpaint")
    assert encoded.keep["inpaint"].tolist() == [True, False]
    _, cond = settle(encoded, given.seeds, parts.null)
    assert cond["inpaint"][0].any()
    assert not cond["inpaint"][1].any()
    kept = family.encode(parts, batch("inpaint"), "inpaint")
    assert kept.keep["inpaint"].tolist() == [True, True]


def test_mask_channels_are_exact_and_masked_pixels_unseen(loaded):
    family, parts = loaded("inp")
    given = batch("inpaint")
    encoded = family.encode(parts, given, "inpaint")
    _, cond = settle(encoded, given.seeds, parts.null)
    mask_BCThw = cond["inpaint"][:, :4]
    expected = torch.zeros(2, 4, 2, HEIGHT // 8, WIDTH // 8)
    expected[0, :, 0, :, : WIDTH // 16] = 1  # frame 0 four times
    expected[0, 0, 1, :, : WIDTH // 16] = 1  # then frames 1 to 4, of which the first is kept
    assert torch.equal(mask_BCThw, expected)
    altered = given.pixels_BFCHW.clone()
    altered[given.mask_BFHW[:, :, None].expand_as(altered)] = 0.7
    again = family.encode(parts, replace(given, pixels_BFCHW=altered), "inpaint")
    assert torch.equal(again.cond["inpaint"].mean, encoded.cond["inpaint"].mean)
    assert isinstance(again.cond["inpaint"], Posterior)


def test_frames_are_packed_side_by_side():
    frames = torch.arange(9.0).reshape(1, 9, 1, 1, 1) + torch.tensor([0.0, 100.0]).reshape(1, 1, 2, 1, 1)
    packed = wan.pack_frames(frames)[0, :, :, 0, 0]
    assert packed[:4].T.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert packed[4:].T.tolist() == [[100, 100, 100, 100], [101, 102, 103, 104], [105, 106, 107, 108]]


def test_captions(loaded):
    """Zeros after the last token, cut at the length, and the same whatever the neighbours."""
    _, parts = loaded("control_t2v")
    tokenizer, encoder = parts.extras["tokenizer"], parts.frozen["text"]
    with torch.no_grad():
        both = text.embed(tokenizer, encoder, ["a cat.", "a" * 100], 32)
        alone = text.embed(tokenizer, encoder, ["a cat."], 32)
        longer = text.embed(tokenizer, encoder, ["a" * 200], 32)
    assert torch.equal(both[0], alone[0])
    assert both.shape[1] == 32
    tokens = len(tokenizer("a cat.").input_ids)
    assert both[0, tokens - 1].any()
    assert not both[0, tokens:].any()
    assert torch.equal(both[1], longer[0])  # cut before it is encoded, and ended by the end token
    assert both[1, 31].any()
    assert parts.null["text"].shape == (512, both.shape[2])
    assert parts.null["text"][0].any()
    assert not parts.null["text"][1:].any()


# ---- the network


def inputs(variant, seed=0):
    extra, has_image, ref, camera = VARIANTS[variant]
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return (
        noise(2, CHANNELS + extra, 3, 4, 6),
        torch.tensor([813.25, 92.0]),
        noise(2, 512, 24),
        noise(2, 257, 32) if has_image else None,
        noise(2, CHANNELS, 4, 6) if ref else None,
        noise(2, camera, 3, 32, 48) if camera else None,
    )


@pytest.mark.parametrize("variant", ["control_v1.0", "control_t2v"])
def test_equals_diffusers_where_diffusers_has_it(loaded, tmp_path, variant):
    """Saved in diffusers' form, its own class loads it and answers alike."""
    _, parts = loaded(variant)
    layout.save_transformer(tmp_path, parts.net.state_dict(), parts.config, diffusers=True)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path)
    x, timestep, captions, image, *_ = inputs(variant)
    with torch.no_grad():
        ours = parts.net(x, timestep, captions, image)
        expected = theirs(x, timestep, captions, image, return_dict=False)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_angles_and_sinusoid_survive_a_cast(loaded):
    x = torch.zeros(1, 1, 3, 8, 12)
    theirs = WanTransformer3DModel(num_layers=0, attention_head_dim=24, num_attention_heads=1, in_channels=1).rope(x)
    ours = Rope(24).bfloat16()((3, 4, 6), torch.device("cpu"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert ours[0].dtype == torch.float32
    found = sinusoid(torch.tensor([969.227], dtype=torch.float32), 8)
    angles = [969.2269897 * 10000 ** (-i / 4) for i in range(4)]
    expected = torch.tensor([angles], dtype=torch.float64)
    torch.testing.assert_close(found, torch.cat([expected.cos(), expected.sin()], 1).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_blocks_give_the_same_gradients(variant):
    def gradients(recomputed):
        net = filled(network(variant), 1)
        if recomputed:
            recompute(list(net.blocks))
        net(*inputs(variant)).square().mean().backward()
        return {name: p.grad for name, p in net.named_parameters()}

    plain, again = gradients(False), gradients(True)
    assert all(grad is not None and torch.equal(grad, again[name]) for name, grad in plain.items())


@pytest.mark.parametrize("variant", ["control_v1.1", "control_camera"])
def test_autocast_and_compiled_blocks(variant):
    net, given = filled(network(variant), 1), inputs(variant)
    with torch.no_grad():
        exact = net(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(*given)
        net.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lean = net(*given)
        for rounded in (half, lean):
            error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert 0 < error < 0.03
        net = filled(network(variant), 1)
        for block in net.blocks:
            block.compile(backend="eager", fullgraph=True)
        assert torch.equal(net(*given), exact)


def test_reference_tokens_come_before_the_clip():
    """They are frame 0 to the rotary angles, the clip begins at 1; the answer is of the clip alone."""
    net = filled(network("control_v1.1"), 1)
    x, timestep, captions, image, ref, _ = inputs("control_v1.1")
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    net.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    net.proj_out.register_forward_hook(lambda _, args, out: seen.append(out))
    with torch.no_grad():
        answer = net(x, timestep, captions, image, ref)
    tokens, _, _, (cos, _) = seen[0]
    assert tokens.shape[1] == cos.shape[1] == (3 + 1) * 2 * 3
    assert answer.shape == (2, CHANNELS, 3, 4, 6)
    assert seen[1].shape[1] == seen[2].shape[1] == tokens.shape[1]
    assert torch.equal(answer, net._unpatch(seen[2][:, 6:], (3, 2, 3)))
    torch.testing.assert_close(tokens[:, :6], net.ref_conv(ref).flatten(2).transpose(1, 2))
    torch.testing.assert_close(cos[0, 6, 0], Rope(24)((2, 1, 1), torch.device("cpu"))[0][0, 1, 0])


# ---- saving


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("diffusers", [False, True])
def test_saved_and_read_again(copy, loaded, variant, diffusers):
    family, parts = loaded(variant)
    folder = copy(variant)
    state = {name: tensor + 1 for name, tensor in parts.net.state_dict().items()}
    family.save(folder, state, parts.config, diffusers=diffusers)
    if not diffusers:
        assert json.loads((folder / "config.json").read_text()) == parts.config
        assert (
            load_file(folder / WEIGHTS).keys()
            == weights.peek(folder / WEIGHTS).keys()
            == keys.to_released(state).keys()
        )
    again = families.find(folder)
    assert again.name == family.name
    net = again.load(folder, encoders=False).net
    assert dict(net.config) == dict(parts.net.config)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_dialect_is_written_as_it_was_read(tmp_path):
    """A diffusers config.json does not fit released names, so then the released dialect is written."""
    net = network("control_v1.1")
    saved = {"in_channels": 48, "hidden_size": 48, "num_heads": 2, "note": "kept"}
    layout.save_transformer(tmp_path, net.state_dict(), saved)
    assert json.loads((tmp_path / "config.json").read_text()) == saved
    layout.save_transformer(tmp_path, net.state_dict(), sizes.diffusers_config(net.config))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["in_dim"] == 48
    assert config["add_ref_conv"] is True
    assert "attention_head_dim" not in config


def test_fit_is_strict():
    net = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"3 problems(.|\n)*most of it does not fit"):
        weights.fit(net, {"weight": torch.zeros(3, 3), "bias": torch.zeros(3), "more": torch.zeros(1)}, "here")
    assert F.linear(torch.zeros(2), net.weight).shape == (3,)
