"""Wan2.1-Fun on tiny random checkpoints: finding, loading, saving."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from reeltune import families
from reeltune.core.errors import UserError
from reeltune.families import weights
from reeltune.families.spec import check_mode
from reeltune.families.wan_fun import family as wan
from reeltune.families.wan_fun import keys, layout, sizes
from tests.families.tiny_wan import CHANNELS, VARIANTS, batch, filled, network

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_wan, tmp_path):
    """variant -> a folder that the test may change."""
    return lambda variant: shutil.copytree(tiny_wan(variant), tmp_path / "copy")


def rewrite(file, change):
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


# ---- finding


@pytest.mark.parametrize("variant", VARIANTS)
def test_found_by_its_files(tiny_wan, variant):
    family = families.find(tiny_wan(variant))
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
def test_dialects_of_config_build_the_same_network(copy, loaded_wan, dialect):
    folder = copy("control_v1.1")
    rewrite(folder / "config.json", DIALECTS[dialect])
    family = families.find(folder)
    parts = family.load(folder, encoders=False)
    assert family.name == "wan_fun/control_v1.1"
    assert dict(parts.net.config) == dict(loaded_wan("control_v1.1")[1].net.config)


@pytest.mark.parametrize("with_index", [True, False])
def test_shards(copy, loaded_wan, with_index):
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
    theirs = loaded_wan("control_t2v")[1].net.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    next(folder.glob("*-00002-of-*")).unlink()
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors is missing"):
        families.find(folder)


@pytest.mark.parametrize("variant", ["control_camera", "inp"])
def test_diffusers_layout(copy, loaded_wan, tmp_path, variant):
    """transformer, vae, text_encoder, image_encoder, tokenizer, all under the libraries' names."""
    _, parts = loaded_wan(variant)
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
        ({"patch_size": [0, 2, 2]}, "config.json has patch_size [0, 2, 2], but the weights have [1, 2, 2]"),
        ({"patch_size": 2}, "config.json has patch_size 2, but the weights have [1, 2, 2]"),
        ({"eps": 0}, "eps is 0; expected more than 0 and at most 1"),
        ({"eps": 1e9}, "eps is 1000000000.0; expected more than 0 and at most 1"),
        ({"add_ref_conv": "no"}, "add_ref_conv is 'no'; expected true or false or null"),
        ({"qk_norm": False}, "qk_norm False, but the weights have a blocks.0.attn1.norm_q.weight"),
        ({"cross_attn_norm": False}, "cross_attn_norm False, but the weights have a blocks.0.norm2.weight"),
        ({"add_ref_conv": True}, "add_ref_conv True, but the weights have no ref_conv.weight"),
    ],
)
def test_config_that_contradicts_the_weights(copy, change, says):
    folder = copy("control_v1.0")
    rewrite(folder / "config.json", lambda c: c | change)
    with pytest.raises(UserError) as error:
        families.find(folder)
    assert any(says in problem for problem in error.value.problems)


def test_config_that_gives_the_reference_other_channels(copy):
    folder = copy("control_v1.1")
    rewrite(folder / "config.json", lambda c: c | {"in_dim_ref_conv": 48})
    with pytest.raises(UserError, match="in_dim_ref_conv is 48, but the weights have 16"):
        families.find(folder)


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
    with pytest.raises(UserError, match=r"is not a Wan VAE: it has no post_quant_conv.weight"):
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


def test_other_weights_for_the_same_network(tiny_wan, tmp_path):
    """transformer_path: a saved folder, a checkpoint-N that holds one, or a file; a misfit is refused."""
    other = filled(network("control_t2v"), 99)
    folder = tmp_path / "checkpoint-3"
    layout.save_transformer(folder / "transformer", other.state_dict(), dict(other.config))
    family = families.find(tiny_wan("control_t2v"))
    for path in (folder, folder / "transformer", folder / "transformer" / WEIGHTS):
        parts = family.load(tiny_wan("control_t2v"), encoders=False, transformer_path=path)
        ours = parts.net.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in other.state_dict().items())
    misfit = families.find(tiny_wan("control_v1.0"))
    with pytest.raises(UserError, match=r"misshapen: patch_embedding.weight is \(48, 32, 1, 2, 2\)"):
        misfit.load(tiny_wan("control_v1.0"), transformer_path=folder)


# ---- saving


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("diffusers", [False, True])
def test_saved_and_read_again(copy, loaded_wan, variant, diffusers):
    family, parts = loaded_wan(variant)
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
