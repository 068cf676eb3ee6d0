"""Adapters in each tool's form, and what each tool makes of a file: each trap that its sources have."""

import pytest
import torch

from reeltune.adapters import writing
from reeltune.adapters.adapter import Adapter
from reeltune.adapters.dialects import adapter_of
from reeltune.adapters.files import stored_in
from reeltune.adapters.loaders import BY_TOOL, KOHYA, LOADERS, PEFT, Applied, applied
from reeltune.adapters.networks import NETWORKS
from reeltune.adapters.proof import inner, prove, strengths
from reeltune.core.errors import UserError
from scripts.adapters_page import made, named, pair
from tests.unit.made_adapters import written_to

WRITTEN = [(dialect, network) for dialect, one in writing.DIALECTS.items() for network in one.forms]


def of(tool: str, tensors: dict, network: str = "wan_fun") -> Applied:
    return applied(BY_TOOL[tool], tensors, NETWORKS[network])


def ratio(tool: str, adapter: Adapter, tensors: dict, network: str = "wan_fun") -> float:
    """Of what is trained, in all layers alike and none left out."""
    proof = prove(adapter.layers, adapter.changes, of(tool, tensors, network))
    assert proof.refused is None and not proof.missing and not proof.strange and proof.layers == len(adapter.layers)
    assert proof.highest_ratio - proof.lowest_ratio < 1e-6
    return proof.lowest_ratio


@pytest.mark.parametrize(("dialect", "network"), WRITTEN)
def test_every_dialect_is_applied_as_it_was_trained_and_read_back(dialect, network, tmp_path):
    adapter = made(network, rank=3, alpha=7.0)
    tensors = writing.written(adapter, NETWORKS[network], dialect)
    tools = [tool for tool in writing.DIALECTS[dialect].tools if network in BY_TOOL[tool].names]
    assert tools
    for tool in tools:
        assert ratio(tool, adapter, tensors, network) == pytest.approx(1, abs=1e-6)
    stored = stored_in(written_to(tmp_path, dict(tensors)), outline=False)
    again, found = adapter_of(stored)
    assert found.network.name == network
    assert prove(adapter.layers, {}, Applied(again.layers)).holds(1e-6)
    assert {one.rank for one in again.layers.values()} == {3}


@pytest.mark.parametrize("tool", ["ComfyUI", "WanVideoWrapper", "diffusers", "VideoX-Fun"])
def test_one_file_of_wan_is_applied_whole_by_four_tools(tool):
    adapter = made("wan_fun", rank=4, alpha=9.0)
    assert ratio(tool, adapter, writing.written(adapter, NETWORKS["wan_fun"], "comfyui")) == pytest.approx(1, abs=1e-6)


def test_fused_layers_have_thrice_the_rank_and_a_diagonal_of_blocks():
    adapter = made("hunyuan_video", rank=2, alpha=2.0)
    tensors = writing.written(adapter, NETWORKS["hunyuan_video"], "comfyui")
    name = "diffusion_model.double_blocks.0.img_attn_qkv.lora_"
    A, B = tensors[f"{name}A.weight"], tensors[f"{name}B.weight"]
    parts = [adapter.layers[f"transformer_blocks.0.attn.to_{x}"] for x in "qkv"]
    assert torch.equal(A, torch.cat([part.A_RI for part in parts]))
    assert torch.equal(B, torch.block_diag(*[part.B_OR for part in parts]))
    assert tensors["diffusion_model.single_blocks.1.linear1.lora_A.weight"].shape == (8, 24)
    assert not any(name.endswith(".alpha") for name in tensors)
    assert len(tensors) == 2 * (2 * 10 + 2 * 3)  # blocks of two, with 10 layers each there, and of one, with 3


def test_a_part_of_fused_layers_leaves_the_others_as_they_are():
    adapter = made("hunyuan_video", only="to_k")
    tensors = writing.written(adapter, NETWORKS["hunyuan_video"], "musubi")
    B = tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    assert B.shape == (3 * 24 + 96, 2) and not B[:24].any() and not B[48:].any()
    proof = prove(adapter.layers, {}, of("musubi-tuner", tensors, "hunyuan_video"))
    assert proof.holds() and proof.layers == 4


def test_ranks_and_alphas_may_differ_by_layer():
    layers = made("wan_fun", rank=2, alpha=1.0).layers | made("wan_fun", rank=5, alpha=3.0, only="ffn").layers
    for dialect in writing.DIALECTS:
        tensors = writing.written(Adapter(layers), NETWORKS["wan_fun"], dialect)
        assert ratio(writing.DIALECTS[dialect].tools[0], Adapter(layers), tensors) == pytest.approx(1, abs=1e-6)


def test_whole_weights_go_to_comfyui_as_changes():
    changes = {
        "ref_conv.weight": torch.randn(24, 4, 2, 2),
        "ref_conv.bias": torch.randn(24),
        "blocks.0.modulation": torch.randn(1, 6, 24),
    }
    adapter = Adapter(made("wan_fun").layers, changes=changes)
    tensors = writing.written(adapter, NETWORKS["wan_fun"], "comfyui")
    assert {name for name in tensors if "lora" not in name} == {
        "diffusion_model.ref_conv.diff",
        "diffusion_model.ref_conv.diff_b",
        "diffusion_model.blocks.0.modulation.diff",
    }
    for tool in ("ComfyUI", "WanVideoWrapper"):
        proof = prove(adapter.layers, changes, of(tool, tensors))
        assert proof.holds() and proof.layers == len(adapter.layers) + 3


# ---- what is refused, with the remedy

MAGNITUDE = pair("q", 24, 24, 2, 1.0)
MAGNITUDE = type(MAGNITUDE)(MAGNITUDE.A_RI, MAGNITUDE.B_OR, 1.0, magnitude_O=torch.ones(24))
REFUSED = {
    "DoRA": ("wan_fun", "comfyui", Adapter({"blocks.0.self_attn.q": MAGNITUDE}), "applies a DoRA otherwise.*--merge"),
    "whole": (
        "wan_fun",
        "diffusers",
        Adapter(made("wan_fun").layers, changes={"ref_conv.weight": torch.ones(24, 4, 2, 2)}),
        "diffusers takes no whole weights, and ref_conv.weight were trained so.*--merge",
    ),
    "whole for VideoX-Fun": (
        "wan_fun",
        "videox_fun",
        Adapter(changes={"ref_conv.weight": torch.ones(24, 4, 2, 2)}),
        "VideoX-Fun takes no whole weights",
    ),
    "easyanimate": ("easyanimate", "diffusers", made("easyanimate"), "loads no adapters of it; .*--merge"),
    "cogvideox": ("cogvideox_fun", "comfyui", made("cogvideox_fun"), "for ComfyUI: --for diffusers or videox_fun"),
    "musubi": ("easyanimate", "musubi", made("easyanimate"), "musubi-tuner has no such network; --for videox_fun"),
    "nameless": (
        "hunyuan_video",
        "comfyui",
        made("hunyuan_video", blocks_alone=False, only="proj_in"),
        "context_embedder.proj_in has no name that ComfyUI knows",
    ),
    "overflow": ("wan_fun", "comfyui", Adapter({"blocks.0.ffn.0": pair("x", 96, 24, 2, 1e9)}), "does not hold"),
}


@pytest.mark.parametrize(("network", "dialect", "adapter", "words"), REFUSED.values(), ids=REFUSED)
def test_what_a_tool_would_not_load_is_refused_with_the_remedy(network, dialect, adapter, words):
    with pytest.raises(UserError, match=words):
        writing.written(adapter, NETWORKS[network], dialect, torch.float16)


# ---- the traps of each tool


def test_a_file_without_alpha_is_applied_twice_as_strong_where_alpha_was_half_the_rank():
    """As the original scripts write with --use_peft_lora, whose alpha is half the rank."""
    adapter = made("wan_fun", rank=4, alpha=2.0)
    tensors = named(adapter, "wan_fun", "diffusion_model.", alpha=False)
    for tool in ("VideoX-Fun", "ComfyUI", "WanVideoWrapper", "diffusers"):
        assert ratio(tool, adapter, tensors) == pytest.approx(2)


def test_comfyui_has_no_diffusers_names():
    for network, spelling in (("wan_fun", "diffusers"), ("hunyuan_video", "released")):
        tensors = named(made(network), network, "transformer.", spelling, alpha=False)
        its = of("ComfyUI", tensors, network)
        assert not its.layers and its.unused == tuple(tensors) and its.refused is None


def test_comfyui_knows_funs_form_by_one_tensor():
    adapter = made("wan_fun")
    tensors = named(adapter, "wan_fun", "lora_unet__", "released", "_", KOHYA[0])
    assert ratio("ComfyUI", adapter, tensors) == pytest.approx(1)
    without = {name: one for name, one in tensors.items() if "cross_attn_k." not in name}
    assert not of("ComfyUI", without).layers


def test_comfyui_takes_its_own_names_of_hunyuan_and_the_originals():
    adapter = made("hunyuan_video", only="ff.net.0.proj")
    for prefix, spelling, joined, applies in (
        ("diffusion_model.", "comfyui", ".", True),
        ("transformer.", "original", ".", True),
        ("lora_unet_", "comfyui", "_", True),
        ("lora_unet_", "original", "_", False),  # musubi-tuner's names of feed-forward layers
    ):
        its = of("ComfyUI", named(adapter, "hunyuan_video", prefix, spelling, joined), "hunyuan_video")
        assert its.layers.keys() == (adapter.layers.keys() if applies else set())


@pytest.mark.parametrize("tool", ["ComfyUI", "WanVideoWrapper", "diffusers", "VideoX-Fun", "musubi-tuner"])
def test_no_tool_applies_a_dora_as_trained(tool):
    tensors = named(made("wan_fun"), "wan_fun", "diffusion_model.")
    tensors["diffusion_model.blocks.0.self_attn.q.dora_scale"] = torch.ones(24, 1)
    assert of(tool, tensors).refused


def test_wan_video_wrapper_takes_both_attentions_of_diffusers_for_one():
    adapter = made("wan_fun", only="attn")
    one, two = (made("wan_fun", only=f"{side}_attn.q") for side in ("self", "cross"))
    tensors = named(one, "wan_fun", "transformer.", "diffusers") | named(two, "wan_fun", "transformer.", "diffusers")
    its = of("WanVideoWrapper", tensors)
    assert set(its.layers) == {"blocks.0.cross_attn.q", "blocks.1.cross_attn.q"}
    assert prove(adapter.layers, {}, its).missing and len(its.unused) == 6  # the first attention's are lost
    alone = of("WanVideoWrapper", named(one, "wan_fun", "transformer.", "diffusers"))
    between = inner(alone.layers["blocks.0.cross_attn.q"], one.layers["blocks.0.self_attn.q"])
    assert between == pytest.approx(inner(*[one.layers["blocks.0.self_attn.q"]] * 2))  # self is put into cross
    assert prove(one.layers, {}, alone).strange == ["blocks.0.cross_attn.q", "blocks.1.cross_attn.q"]


def test_wan_video_wrapper_takes_pefts_names_for_rank_stabilised():
    adapter = made("wan_fun", rank=4, alpha=4.0)
    tensors = named(adapter, "wan_fun", "base_model.model.", alpha=False)
    assert ratio("WanVideoWrapper", adapter, tensors) == pytest.approx(2)  # sqrt(4)
    without = {name: one for name, one in tensors.items() if "0.cross_attn.k." not in name}
    its = of("WanVideoWrapper", without)
    assert strengths(adapter.layers, its) == (1, 1)


def test_wan_video_wrapper_takes_other_forms_at_their_strength():
    adapter = made("wan_fun", rank=4, alpha=2.0)
    for prefix, joined, pairs in (
        ("pipe.dit.", ".", PEFT[0]),
        ("", ".", PEFT[0]),
        ("lora_unet__", "_", KOHYA[0]),
        ("lora_unet_", "_", KOHYA[0]),
    ):
        assert ratio("WanVideoWrapper", adapter, named(adapter, "wan_fun", prefix, "released", joined, pairs)) == 1
    lycoris = {
        f"lycoris_blocks_0_{text}.{part}": torch.ones(2, 2)
        for text in ("self_attn_q", "cross_attn_to_out_0", "ffn_net_0_proj")
        for part in ("lora_down.weight", "lora_up.weight")
    }
    layers = {"blocks.0.self_attn.q", "blocks.0.cross_attn.o", "blocks.0.ffn.0"}
    assert of("WanVideoWrapper", lycoris).layers.keys() == layers


def test_wan_video_wrapper_takes_a_pair_of_patch_embedding_for_a_control_lora():
    tensors = {"transformer.patch_embedding.lora_A.weight": torch.ones(2, 2)}
    assert "control LoRA" in of("WanVideoWrapper", tensors).refused


def test_diffusers_takes_kohyas_form_of_wan_only_whole():
    adapter = made("wan_fun", rank=4, alpha=2.0)
    whole = named(adapter, "wan_fun", "lora_unet_", "released", "_", KOHYA[0])
    assert ratio("diffusers", adapter, whole) == 1
    for left_out in (".alpha", "blocks_1_ffn_2", "self_attn_q.lora_up"):
        part = {name: one for name, one in whole.items() if left_out not in name}
        assert "KeyError" in of("diffusers", part).refused
    fun = named(adapter, "wan_fun", "lora_unet__", "released", "_", KOHYA[0], alpha=False)
    assert "KeyError" in of("diffusers", fun).refused


def test_diffusers_takes_released_names_of_wan_in_part():
    part = made("wan_fun", rank=4, alpha=2.0, only="self_attn")
    assert ratio("diffusers", part, named(part, "wan_fun", "diffusion_model.")) == 1
    head = made("wan_fun", rank=2, alpha=2.0, only="head.head", blocks_alone=False)
    both = Adapter(part.layers | head.layers)
    assert (
        ratio(
            "diffusers",
            both,
            named(part, "wan_fun", "diffusion_model.") | named(head, "wan_fun", "diffusion_model.", alpha=False),
        )
        == 1
    )
    bad = {
        "min()": named(head, "wan_fun", "diffusion_model.", alpha=False),
        "should be empty": named(both, "wan_fun", "diffusion_model."),  # an alpha outside of the blocks
        "both or none": named(made("wan_fun", only="k_img"), "wan_fun", "diffusion_model."),
        "has ref_conv.lora_A": named(part, "wan_fun", "diffusion_model.")
        | {"diffusion_model.ref_conv.lora_A.weight": torch.ones(2, 2)},
    }
    for words, tensors in bad.items():
        assert words in of("diffusers", tensors).refused


def test_diffusers_leaves_whole_weights_out():
    part = made("wan_fun")
    tensors = named(part, "wan_fun", "diffusion_model.") | {"diffusion_model.ref_conv.diff": torch.ones(2)}
    its = of("diffusers", tensors)
    assert its.unused == ("diffusion_model.ref_conv.diff",) and len(its.layers) == len(part.layers)
    named_so = named(part, "wan_fun", "transformer.", "diffusers", alpha=False)
    assert "Invalid LoRA" in of("diffusers", named_so | {"transformer.ref_conv.diff": torch.ones(2)}).refused


@pytest.mark.parametrize("network", ["hunyuan_video", "cogvideox_fun", "wan_fun"])
def test_diffusers_stops_at_an_alpha_beside_its_own_names(network):
    adapter = made(network, rank=2, alpha=2.0)
    assert ratio("diffusers", adapter, named(adapter, network, "transformer.", "diffusers", alpha=False), network) == 1
    assert "alpha has no lora" in of("diffusers", named(adapter, network, "transformer.", "diffusers"), network).refused


def test_diffusers_takes_only_its_own_names_of_cogvideox():
    tensors = named(made("cogvideox_fun"), "cogvideox_fun", "diffusion_model.", alpha=False)
    its = of("diffusers", tensors, "cogvideox_fun")
    assert not its.layers and its.refused is None and len(its.unused) == len(tensors)


def test_diffusers_takes_original_names_of_hunyuan_at_one_width_without_alpha():
    adapter = made("hunyuan_video")
    tensors = writing.written(adapter, NETWORKS["hunyuan_video"], "comfyui")
    assert "at a width of 3072" in of("diffusers", tensors, "hunyuan_video").refused
    two = made("hunyuan_video", only="attn.to_")
    of_two = {name: one for name, one in two.layers.items() if not name.startswith("single")}
    double = writing.written(Adapter(of_two), NETWORKS["hunyuan_video"], "comfyui")
    assert ratio("diffusers", Adapter(of_two), double, "hunyuan_video") == pytest.approx(1, abs=1e-6)
    alpha = {"diffusion_model.double_blocks.0.img_attn_qkv.alpha": torch.tensor(1.0)}
    assert "ends in an error" in of("diffusers", {**double, **alpha}, "hunyuan_video").refused


def test_musubi_needs_an_alpha_and_changes_blocks_alone():
    adapter = made("wan_fun")
    tensors = named(adapter, "wan_fun", "lora_unet_", "released", "_", KOHYA[0])
    assert ratio("musubi-tuner", adapter, tensors) == 1
    no_alpha = {name: one for name, one in tensors.items() if not name.endswith(".alpha")}
    assert "has no alpha" in of("musubi-tuner", no_alpha).refused
    head = named(made("wan_fun", only="head", blocks_alone=False), "wan_fun", "lora_unet_", "released", "_", KOHYA[0])
    assert of("musubi-tuner", tensors | head).unused == tuple(head)
    assert not of("musubi-tuner", named(adapter, "wan_fun", "diffusion_model.")).layers


def test_videox_fun_takes_released_names_and_stops_at_whole_weights():
    adapter = made("wan_fun", rank=4, alpha=2.0)
    for prefix, joined, pairs in (
        ("diffusion_model.", ".", PEFT[0]),
        ("lora_unet__", "_", KOHYA[0]),
        ("lora_unet_", "_", KOHYA[0]),
        ("", ".", PEFT[0]),
    ):
        tensors = named(adapter, "wan_fun", prefix, "released", joined, pairs)
        assert ratio("VideoX-Fun", adapter, tensors) == 1
        assert "ValueError" in of("VideoX-Fun", tensors | {f"{prefix}ref_conv.diff": torch.ones(1)}).refused
    for prefix, spelling in (("transformer.", "diffusers"), ("base_model.model.", "released")):
        assert not of("VideoX-Fun", named(adapter, "wan_fun", prefix, spelling)).layers


def test_easyanimates_own_loader_takes_one_form():
    adapter = made("easyanimate")
    fun = named(adapter, "easyanimate", "lora_unet__", "released", "_", KOHYA[0])
    assert ratio("EasyAnimate", adapter, fun, "easyanimate") == 1
    dotted = named(adapter, "easyanimate", "diffusion_model.")
    assert "KeyError" in of("EasyAnimate", dotted, "easyanimate").refused
    assert ratio("VideoX-Fun", adapter, dotted, "easyanimate") == 1


def test_a_network_that_a_tool_does_not_run_is_said():
    assert "no network of EasyAnimate" in of("diffusers", {}, "easyanimate").refused
    assert {loader.tool for loader in LOADERS if "cogvideox_fun" in loader.names} == {"diffusers", "VideoX-Fun"}


# ---- the proof


def test_the_proof_sees_a_little_more_less_and_beside():
    adapter = made("wan_fun", only="self_attn")
    layers = dict(adapter.layers)
    assert prove(layers, {}, Applied(layers)).holds()
    name = "blocks.1.self_attn.o"
    for times in (1 + 3e-5, 1 - 3e-5, -1, 2):
        other = pair(name, 24, 24, 2, times)
        proof = prove(layers, {}, Applied(layers | {name: other}))
        assert not proof.holds()
        assert min(abs(proof.lowest_ratio - times), abs(proof.highest_ratio - times)) < 1e-9
    turned = torch.randn(24, 2)
    proof = prove(layers, {}, Applied(layers | {name: type(other)(layers[name].A_RI, turned, 1.0)}))
    assert proof.error > 0.1
    assert prove(layers, {}, Applied({k: v for k, v in layers.items() if k != name})).missing == [name]
    assert prove({k: v for k, v in layers.items() if k != name}, {}, Applied(layers)).strange == [name]
    assert not prove(layers, {}, Applied(layers, unused=("x",))).holds()


def test_the_inner_product_is_that_of_the_matrices():
    one, other = pair("a", 7, 5, 2, 3.0), pair("b", 7, 5, 3, 2.0)
    whole = [low_rank.scale * low_rank.B_OR @ low_rank.A_RI for low_rank in (one, other)]
    assert inner(one, other) == pytest.approx(float((whole[0] * whole[1]).sum()), rel=1e-5)
