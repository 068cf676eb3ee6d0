"""Adapters of other tools: read to the same layers whoever named them, or refused in words."""

import json
import math

import pytest
import torch

from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.adapters.dialects import read_adapter
from reeltune.adapters.loaders import KOHYA, PEFT, SLOT, Applied
from reeltune.adapters.networks import NETWORKS, SPELLINGS
from reeltune.adapters.proof import prove
from reeltune.core.errors import UserError
from scripts.adapters_page import made, named
from tests.unit.made_adapters import base_of, written_to

FORMS = {
    "diffusion_model": ("wan_fun", "diffusion_model.", "released", ".", PEFT[0], "ComfyUI's form"),
    "lora_down in it": ("wan_fun", "diffusion_model.", "released", ".", KOHYA[0], "ComfyUI's form"),
    "model.diffusion_model": ("wan_fun", "model.diffusion_model.", "released", ".", PEFT[0], "ComfyUI's form"),
    "peft": ("wan_fun", "base_model.model.", "released", ".", PEFT[0], "PEFT"),
    "peft on diffusers": ("wan_fun", "base_model.model.", "diffusers", ".", PEFT[0], "PEFT"),
    "diffusers": ("wan_fun", "transformer.", "diffusers", ".", PEFT[0], "diffusers' form"),
    "diffsynth": ("wan_fun", "pipe.dit.", "released", ".", SLOT[0], "DiffSynth-Studio's form"),
    "bare": ("wan_fun", "", "released", ".", SLOT[0], "names without a beginning"),
    "kohya": ("wan_fun", "lora_unet_", "released", "_", KOHYA[0], "kohya's form"),
    "videox_fun": ("wan_fun", "lora_unet__", "released", "_", KOHYA[0], "VideoX-Fun's own form"),
    "lycoris": ("wan_fun", "lycoris_", "diffusers", "_", KOHYA[0], "LyCORIS"),
    "cogvideox": ("cogvideox_fun", "transformer.", "released", ".", PEFT[0], "diffusers' form"),
    "cogvideox of the original scripts": (
        "cogvideox_fun",
        "lora_unet__",
        "released",
        "_",
        KOHYA[0],
        "VideoX-Fun's own form",
    ),
    "easyanimate": ("easyanimate", "lora_unet__", "released", "_", KOHYA[0], "VideoX-Fun's own form"),
    "easyanimate in diffusers' names": ("easyanimate", "transformer.", "diffusers", ".", PEFT[0], "diffusers' form"),
    "hunyuan": ("hunyuan_video", "transformer.", "released", ".", PEFT[0], "diffusers' form"),
    "hunyuan of videox_fun": ("hunyuan_video", "lora_unet__", "released", "_", KOHYA[0], "VideoX-Fun's own form"),
}


def same(one: Adapter, other: Adapter, most_error: float = 1e-6) -> bool:
    return prove(one.layers, one.changes, Applied(other.layers, other.changes)).holds(most_error)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_is_read_to_the_same_layers(form, tmp_path):
    network, prefix, spelling, joined, pairs, tool = form
    adapter = made(network, blocks_alone=False)
    file = written_to(tmp_path, named(adapter, network, prefix, spelling, joined, pairs))
    for base in (None, base_of(adapter)):
        read, found = read_adapter(file, base)
        assert same(adapter, read)
        assert (found.form.tool, found.network.name, found.alpha_from) == (tool, network, "the file")
        assert found.width == 24


@pytest.mark.parametrize("network", NETWORKS)
def test_no_two_layers_have_one_name(network):
    for spelling in SPELLINGS:
        names = [layer.name(spelling) for layer in NETWORKS[network].layers if layer.name(spelling)]
        apart = [name for name in names if not name.endswith(("_qkv", ".qkv", "linear1"))]
        assert len(apart) == len({name.replace(".", "_") for name in apart})
        assert spelling != "diffusers" or len(apart) == len(NETWORKS[network].layers)


def test_names_that_two_networks_share_are_told(tmp_path):
    adapter = made("cogvideox_fun", only="attn1")
    file = written_to(tmp_path, named(adapter, "cogvideox_fun", "transformer."))
    assert read_adapter(file)[1].title == "CogVideoX, width 24 or EasyAnimate V5, width 24"
    whole = made("cogvideox_fun", blocks_alone=False)
    file = written_to(tmp_path, named(whole, "cogvideox_fun", "transformer."))
    assert read_adapter(file)[1].title == "CogVideoX, width 24"


def test_headers_tell_the_same_as_tensors(tmp_path):
    adapter = made("wan_fun", rank=3, alpha=6.0)
    file = written_to(tmp_path, named(adapter, "wan_fun", "lora_unet_", "released", "_", KOHYA[0]))
    outline, found = read_adapter(file, outline=True)
    assert {name: (one.rank, one.scale) for name, one in outline.layers.items()} == {
        name: (3, 2.0) for name in adapter.layers
    }
    assert all(one.A_RI.is_meta and one.B_OR.is_meta for one in outline.layers.values())
    assert found.title == "Wan, width 24"


# ---- layers that are one in HunyuanVideo's own code


def test_a_pair_of_fused_layers_is_split_by_rows(tmp_path):
    """As other tools train them: one A for all, and B of all rows."""
    one, two = made("hunyuan_video"), {}
    A, qkv, all_four = torch.randn(4, 24), torch.randn(72, 4), torch.randn(72 + 96, 4)
    two |= {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": A}
    two |= {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": qkv}
    two |= {"lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0)}
    two |= {"lora_unet_single_blocks_1_linear1.lora_down.weight": A.clone()}
    two |= {"lora_unet_single_blocks_1_linear1.lora_up.weight": all_four}
    two |= {"lora_unet_single_blocks_1_linear1.alpha": torch.tensor(4.0)}
    read, _ = read_adapter(written_to(tmp_path, two), base_of(one))
    changes = {name: one.scale * one.B_OR @ one.A_RI for name, one in read.layers.items()}
    block = "transformer_blocks.0.attn"
    found = torch.cat([changes[f"{block}.to_q"], changes[f"{block}.to_k"], changes[f"{block}.to_v"]])
    torch.testing.assert_close(found, 0.5 * qkv @ A)
    single = "single_transformer_blocks.1"
    names = [f"{single}.attn.to_q", f"{single}.attn.to_k", f"{single}.attn.to_v", f"{single}.proj_mlp"]
    torch.testing.assert_close(torch.cat([changes[name] for name in names]), all_four @ A)
    assert len(changes) == 7


def test_fused_rows_that_are_no_three_layers_are_refused(tmp_path):
    name = "diffusion_model.double_blocks.0.img_attn_qkv"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(70, 2)}
    with pytest.raises(UserError, match="70 outputs, which are not 3 layers of 24 inputs"):
        read_adapter(written_to(tmp_path, tensors))


# ---- alpha


def scales(file, **settings) -> set[float]:
    return {one.scale for one in read_adapter(file, **settings)[0].layers.values()}


def test_without_alpha_the_scale_is_1_unless_it_is_given(tmp_path):
    file = written_to(tmp_path, named(made("wan_fun", rank=4), "wan_fun", "diffusion_model.", alpha=False))
    assert scales(file) == {1.0} and read_adapter(file)[1].alpha_from == ""
    assert scales(file, alpha=2.0) == {0.5} and read_adapter(file, alpha=2.0)[1].alpha_from == "you"
    with pytest.raises(UserError, match="alpha is 0; give a number above 0"):
        read_adapter(file, alpha=0.0)


def test_an_alpha_beside_that_of_the_file_is_refused(tmp_path):
    file = written_to(tmp_path, named(made("wan_fun"), "wan_fun", "diffusion_model."))
    with pytest.raises(UserError, match="says its alpha itself"):
        read_adapter(file, alpha=2.0)


@pytest.mark.parametrize("in_metadata", [False, True], ids=["beside", "in the metadata"])
def test_pefts_settings_are_taken(in_metadata, tmp_path):
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": {"ffn.0": 2, "self_attn.q": 1}}
    tensors = named(made("wan_fun", rank=4), "wan_fun", "base_model.model.", alpha=False)
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if in_metadata else None
    written_to(tmp_path, tensors, metadata, "adapter_model.safetensors")
    if not in_metadata:
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    read, found = read_adapter(tmp_path)
    times = 1.0 if in_metadata else math.sqrt(4)
    assert read.layers["blocks.0.cross_attn.q"].scale == 2.0 * times
    assert read.layers["blocks.1.ffn.0"].scale == 0.5 * times
    assert read.layers["blocks.1.self_attn.q"].scale == 0.25 * times
    assert found.alpha_from == ("its metadata" if in_metadata else "adapter_config.json")


# ---- whole weights and magnitudes


def test_changes_of_whole_weights_are_read_by_parameter(tmp_path):
    tensors = named(made("wan_fun"), "wan_fun", "diffusion_model.")
    whole = {
        "ref_conv.diff": torch.randn(24, 4, 2, 2),
        "ref_conv.diff_b": torch.randn(24),
        "blocks.0.norm3.diff": torch.randn(24),
        "blocks.1.ffn.0.diff_b": torch.randn(96),
        "blocks.1.diff_m": torch.randn(1, 6, 24),
        "head.modulation.diff": torch.randn(1, 2, 24),
    }
    file = written_to(tmp_path, tensors | {f"diffusion_model.{name}": one for name, one in whole.items()})
    changes = read_adapter(file)[0].changes
    assert {name: tuple(one.shape) for name, one in changes.items()} == {
        "ref_conv.weight": (24, 4, 2, 2),
        "ref_conv.bias": (24,),
        "blocks.0.norm3.weight": (24,),
        "blocks.1.ffn.0.bias": (96,),
        "blocks.1.modulation": (1, 6, 24),
        "head.modulation": (1, 2, 24),
    }
    assert torch.equal(changes["ref_conv.weight"], whole["ref_conv.diff"])


def test_magnitudes_are_read(tmp_path):
    tensors = named(made("wan_fun", only="ffn.0"), "wan_fun", "diffusion_model.")
    magnitude = torch.rand(96, 1)
    tensors |= {f"diffusion_model.blocks.{i}.ffn.0.dora_scale": magnitude.clone() for i in "01"}
    read, _ = read_adapter(written_to(tmp_path, tensors))
    assert torch.equal(read.layers["blocks.1.ffn.0"].magnitude_O, magnitude[:, 0])


def test_our_own_file_keeps_whole_weights_as_they_are(tmp_path):
    tensors = named(made("wan_fun"), "wan_fun", "diffusion_model.") | {"whole.ref_conv.weight": torch.ones(24, 4, 2, 2)}
    read, found = read_adapter(written_to(tmp_path, tensors, {"family": "wan_fun/x", "base_model": "m", "rank": "2"}))
    assert read.whole.keys() == {"ref_conv.weight"} and found.tool == "reeltune's own form"


# ---- refusals

Q = "diffusion_model.blocks.0.self_attn.q"
BAD = {
    "alpha 0": ({f"{Q}.alpha": torch.tensor(0.0)}, "alpha of blocks.0.self_attn.q is 0"),
    "alpha negative": ({f"{Q}.alpha": torch.tensor(-1.0)}, "alpha of blocks.0.self_attn.q is -1"),
    "alpha no number": (
        {f"{Q}.alpha": torch.tensor(math.nan)},
        "alpha of blocks.0.self_attn.q is nan in it; expected",
    ),
    "alpha of two": (
        {f"{Q}.alpha": torch.ones(2)},
        r"alpha of blocks.0.self_attn.q is \[2\] in it, numbers of that shape; expected a number",
    ),
    "rank": (
        {f"{Q}.lora_A.weight": torch.ones(25, 24), f"{Q}.lora_B.weight": torch.ones(24, 25)},
        "has rank 25, and its layer has 24 at most",
    ),
    "half": ({f"{Q}.lora_B.weight": None}, "lora_A.weight has no B to go with it"),
    "alpha alone": ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, "q.alpha has no A"),
    "two ranks": ({f"{Q}.lora_A.weight": torch.ones(3, 24)}, "have not one rank"),
    "convolution": ({f"{Q}.lora_A.weight": torch.ones(2, 24, 1, 1)}, "change of a convolution"),
    "of no linear layer": (
        {
            "diffusion_model.ref_conv.lora_A.weight": torch.ones(2, 24),
            "diffusion_model.ref_conv.lora_B.weight": torch.ones(24, 2),
        },
        "a low-rank change of what is no linear layer",
    ),
    "a size unlike the others": (
        {f"{Q}.lora_A.weight": torch.ones(2, 25)},
        "blocks.0.self_attn.q has a size of 25 where layers like it have 24",
    ),
    "unknown tensor": ({f"{Q}.lora_C.weight": torch.ones(2)}, "lora_C.weight is no part of an adapter"),
    "unknown layer": (
        {"diffusion_model.blocks.0.self_attn.z.diff": torch.ones(2)},
        "blocks.0.self_attn.z is no layer of Wan",
    ),
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(2, 2)}, "is LoKr, which is not read; give an adapter of low-rank pairs"),
    "text encoder": ({"lora_te_layers_0_q.lora_down.weight": torch.ones(2, 2)}, "is of a text encoder"),
    "two forms": ({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24)}, "names of several forms"),
    "one thing twice": ({f"{Q}.lora_down.weight": torch.ones(2, 24)}, "are one thing under two names"),
    "pair and change": ({f"{Q}.diff": torch.ones(24, 24)}, "self_attn.q.weight is changed in two ways"),
    "pair and whole": ({"whole.blocks.0.self_attn.q.weight": torch.ones(24, 24)}, "q.weight is changed in two ways"),
    "change and whole": (
        {"diffusion_model.ref_conv.diff_b": torch.ones(24), "whole.ref_conv.bias": torch.ones(24)},
        "ref_conv.bias is changed in two ways",
    ),
    "bias twice": (
        {f"{Q}.diff_b": torch.ones(24), f"{Q}.lora_B.bias": torch.ones(24)},
        "self_attn.q.bias is changed in two ways",
    ),
    "whole numbers": ({f"{Q}.lora_A.weight": torch.ones(2, 24, dtype=torch.int8)}, "is stored as int8"),
    "not finite": ({f"{Q}.lora_A.weight": torch.full((2, 24), math.inf)}, "numbers that are not finite"),
    "magnitude": ({f"{Q}.dora_scale": torch.ones(1, 24)}, r"dora_scale is \(1, 24\) for 24 outputs"),
    "one number": ({f"{Q}.lora_A.weight": torch.tensor(1.0)}, r"is \(\) and its B \(24, 2\), no matrices"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_file_is_told(change, words, tmp_path):
    tensors = named(made("wan_fun"), "wan_fun", "diffusion_model.") | change
    file = written_to(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(UserError, match=words) as told:
        read_adapter(file)
    assert len(told.value.problems) == 1 and str(file) in str(told.value)
    if "not finite" not in words:  # by the header alone
        with pytest.raises(UserError, match=words):
            read_adapter(file, outline=True)


def test_a_whole_network_is_no_adapter(tmp_path):
    file = written_to(tmp_path, {f"blocks.{n}.ffn.0.weight": torch.ones(2, 2) for n in range(3)})
    with pytest.raises(
        UserError, match=r"is no adapter: it has blocks.0.ffn.0.weight, .*; give one, or whole weights to"
    ):
        read_adapter(file)


def test_what_is_wrong_with_every_layer_is_told_once(tmp_path):
    tensors = named(made("wan_fun"), "wan_fun", "diffusion_model.")
    silent = {name: torch.tensor(0.0) if name.endswith(".alpha") else tensor for name, tensor in tensors.items()}
    count = len(silent) // 3
    with pytest.raises(UserError) as told:
        read_adapter(written_to(tmp_path, silent))
    (problem,) = told.value.problems
    assert problem.startswith(
        f"alpha of blocks.0.cross_attn.k (and {count - 1} more) is 0 in it; expected a number above"
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_alpha": "eight"}, "is 'eight' in adapter_config.json; expected a number above 0"),
        ({"lora_alpha": True}, "is True in adapter_config.json; expected a number above 0"),
        ({"lora_alpha": 4, "alpha_pattern": {"(": 2}}, r"alpha_pattern has '\(', which is no pattern"),
        ({"lora_alpha": 4, "rank_pattern": {"(": 2}}, r"rank_pattern has '\(', which is no pattern"),
        ({"lora_alpha": 4, "r": 64}, r"\(and 23 more\) has rank 2, and r is 64 in adapter_config.json"),
        (
            {"lora_alpha": 4, "r": 2, "rank_pattern": {"ffn.0": 8}},
            r"\(and 1 more\) has rank 2, and r is 8 in adapter_co",
        ),
        ({"lora_alpha": 4, "use_dora": True}, "has no magnitudes, and use_dora is true in adapter_config.json"),
        ({"lora_alpha": 4, "fan_in_fan_out": True}, "fan_in_fan_out is true"),
        (
            {"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', whose training",
        ),
        ({"lora_alpha": 4, "init_lora_weights": "olora"}, "init_lora_weights is 'olora', whose training"),
    ],
)
def test_what_is_wrong_with_pefts_settings_is_told_with_their_file(config, words, tmp_path):
    tensors = named(made("wan_fun"), "wan_fun", "base_model.model.", alpha=False)
    written_to(tmp_path, tensors, name="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    with pytest.raises(UserError, match=words) as told:
        read_adapter(tmp_path)
    assert str(tmp_path) in told.value.where and len(told.value.problems) == 1


def test_settings_in_metadata_that_are_no_table(tmp_path):
    file = written_to(tmp_path, named(made("wan_fun"), "wan_fun", "transformer."), {"lora_adapter_metadata": "[1]"})
    with pytest.raises(UserError, match=r"lora_adapter_metadata in its metadata is \[1\], and no table of settings"):
        read_adapter(file)


def test_a_runs_folder_is_told_from_its_checkpoints(tmp_path):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(UserError, match=r"is a run's folder; give one of its checkpoints, as .*checkpoint-10"):
        read_adapter(tmp_path)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    tensors = named(made("wan_fun"), "wan_fun", "diffusion_model.")
    tensors |= {f"{Q}.alpha": torch.tensor(0.0), "diffusion_model.blocks.1.ffn.0.lora_A.weight": torch.ones(3, 24)}
    with pytest.raises(UserError) as told:
        read_adapter(written_to(tmp_path, tensors))
    assert len(told.value.problems) == 2


def test_an_adapter_of_another_model_or_family_is_refused(tmp_path):
    adapter = made("wan_fun")
    file = written_to(tmp_path, named(adapter, "wan_fun", "diffusion_model."))
    larger = {name: torch.empty([2 * size for size in one.shape]) for name, one in base_of(adapter).items()}
    with pytest.raises(UserError, match=r"of another model \(Wan, width 24\); give one that was trained on this one"):
        read_adapter(file, larger)
    without = {name: one for name, one in base_of(adapter).items() if "_img" not in name}
    with pytest.raises(
        UserError, match=r"blocks.0.cross_attn.k_img.weight \(and 3 more\) is in it and not in the model"
    ) as told:
        read_adapter(file, without)
    assert len(told.value.problems) == 1
    with pytest.raises(UserError, match="is an adapter of Wan, and this is HunyuanVideo"):
        read_adapter(file, base_of(made("hunyuan_video")))
    with pytest.raises(UserError, match="is no adapter of Wan and CogVideoX and EasyAnimate V5 and HunyuanVideo"):
        read_adapter(written_to(tmp_path, {"transformer.layers.0.attention.q.lora_A.weight": torch.ones(2, 4)}))


def test_a_network_of_no_table_goes_by_the_released_names(tmp_path):
    base = {"mix.weight": torch.empty(6, 4), "out.weight": torch.empty(4, 6), "out.bias": torch.empty(4)}
    tensors = {
        "diffusion_model.mix.lora_A.weight": torch.ones(2, 4),
        "diffusion_model.mix.lora_B.weight": torch.ones(6, 2),
    }
    read, _ = read_adapter(written_to(tmp_path, tensors | {"whole.out.bias": torch.ones(4)}), base)
    assert read.layers.keys() == {"mix"} and read.whole.keys() == {"out.bias"}
    with pytest.raises(UserError, match=r"is no adapter of"):
        read_adapter(tmp_path / "adapter.safetensors")


def test_only_safetensors_are_read(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>")
    (tmp_path / "none").mkdir()
    for part in ("high_noise_model", "low_noise_model"):
        (tmp_path / "both" / part / "adapter").mkdir(parents=True)
        (tmp_path / "both" / part / "adapter/adapter_model.safetensors").touch()
    for name, words in {
        "a.pt": "is a file of torch.save; adapters are read from safetensors files",
        "empty.safetensors": "is empty",
        "page.safetensors": "is a saved web page",
        "none": "has no adapters in it; give the path of one file",
        "both": "has no adapters in it; give .*both/high_noise_model or .*both/low_noise_model$",
        "absent.safetensors": "is missing",
    }.items():
        with pytest.raises(UserError, match=words):
            read_adapter(tmp_path / name)


def test_low_rank_is_what_the_papers_say():
    A, B, W = torch.randn(2, 5), torch.randn(3, 2), torch.randn(3, 5)
    plain = LowRank(A, B, alpha=4.0)
    torch.testing.assert_close(plain.changed(W, 0.5), W + B @ A)
    assert LowRank(A, B, 4.0, rank_stabilised=True).scale == pytest.approx(4 / math.sqrt(2))
    magnitude = torch.rand(3)
    changed = LowRank(A, B, 4.0, magnitude_O=magnitude).changed(W)
    torch.testing.assert_close(changed.norm(dim=1), magnitude)
