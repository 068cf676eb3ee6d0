"""Wan2.1-Fun on tiny random checkpoints: encoding, and what the network makes of it."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel

from reeltune.core.types import Posterior
from reeltune.diffusion.loss import settle
from reeltune.families import text
from reeltune.families.wan_fun import conditions as wan
from reeltune.families.wan_fun import layout
from reeltune.families.wan_fun.net import Rope, sinusoid
from reeltune.memory.blocks import recompute
from tests.families.tiny_wan import CHANNELS, HEIGHT, VARIANTS, WIDTH, batch, filled, network

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
def test_conditions_and_answer(loaded_wan, variant, mode):
    family, parts = loaded_wan(variant)
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


def test_x0_is_normalised_by_the_mean_alone(loaded_wan):
    _, parts = loaded_wan("control_t2v")
    vae, given = parts.frozen["vae"], batch("control")
    found = wan.encode_clip(vae, given.pixels_BFCHW)
    with torch.no_grad():
        raw = vae.encode(given.pixels_BFCHW.transpose(1, 2)).latent_dist
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    torch.testing.assert_close(found.mean, ((raw.mean.movedim(1, -1) - mean) / std).movedim(-1, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logvar, raw.logvar, rtol=0, atol=1e-5)


def test_reference_rules(loaded_wan):
    """Channels only where the reference is frame 0, tokens only where it is not, and never what a coin dropped."""
    family, parts = loaded_wan("control_v1.1")
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


def test_the_picture_is_the_reference_frame(loaded_wan):
    family, parts = loaded_wan("control_v1.0")
    given = batch("control_ref")
    moved = family.encode(parts, replace(given, ref_frame_B=torch.tensor([0, 4])), "control_ref")
    same = family.encode(parts, given, "control_ref")
    assert torch.equal(moved.cond["image"][0], same.cond["image"][0])
    assert not torch.equal(moved.cond["image"][1], same.cond["image"][1])
    assert not torch.equal(moved.cond["ref"].mean[1], same.cond["ref"].mean[1])


def test_inpainting_is_dropped_only_where_all_is_to_be_generated(loaded_wan):
    family, parts = loaded_wan("inp")
    given = batch("inpaint", keep={"inpaint": torch.tensor([False, False])})
    encoded = family.encode(parts, given, "inpaint")
    assert encoded.keep["inpaint"].tolist() == [True, False]
    _, cond = settle(encoded, given.seeds, parts.null)
    assert cond["inpaint"][0].any()
    assert not cond["inpaint"][1].any()
    kept = family.encode(parts, batch("inpaint"), "inpaint")
    assert kept.keep["inpaint"].tolist() == [True, True]


def test_mask_channels_are_exact_and_masked_pixels_unseen(loaded_wan):
    family, parts = loaded_wan("inp")
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


def test_captions(loaded_wan):
    """Zeros after the last token, cut at the length, and the same whatever the neighbours."""
    _, parts = loaded_wan("control_t2v")
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
def test_equals_diffusers_where_diffusers_has_it(loaded_wan, tmp_path, variant):
    """Saved in diffusers' form, its own class loads it and answers alike."""
    _, parts = loaded_wan(variant)
    layout.save_transformer(tmp_path, parts.net.state_dict(), parts.config, diffusers=True)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path)
    x, timestep, captions, image, *_ = inputs(variant)
    with torch.no_grad():
        ours = parts.net(x, timestep, captions, image)
        expected = theirs(x, timestep, captions, image, return_dict=False)[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_angles_and_sinusoid_survive_a_cast(loaded_wan):
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


@pytest.mark.slow
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


@pytest.mark.parametrize("variant", ["control_v1.1", "control_t2v"])
def test_queries_and_keys_are_normalised_outside_of_autocast(variant, monkeypatch):
    """As a GPU's autocast has its own precision for that, from torch 2.12 on."""
    net, seen = filled(network(variant), 1).bfloat16(), []
    norms = [norm for norm in net.modules() if isinstance(norm, torch.nn.RMSNorm)]
    plain = torch.nn.functional.rms_norm

    def looked_at(x, *args):
        seen.append((torch.is_autocast_enabled("cpu"), x.dtype))
        return plain(x, *args)

    monkeypatch.setattr(torch.nn.functional, "rms_norm", looked_at)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        net(*inputs(variant))
    assert seen == [(False, torch.bfloat16)] * len(norms)
    assert len(norms) == len(net.blocks) * (4 + (net.config["image_dim"] is not None))
