"""Adapters of each family's network, loaded by diffusers and PEFT themselves; and the tables of layers."""

import gzip
import json

import pytest
import torch
from diffusers import loaders
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from reeltune import families
from reeltune.adapters import saved, writing
from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.adapters.dialects import network_of, read_adapter
from reeltune.adapters.loaders import BY_TOOL, KOHYA, Applied, applied
from reeltune.adapters.networks import NETWORKS
from reeltune.adapters.proof import prove
from reeltune.adapters.sizes import solve
from reeltune.checkpoint.state import Shared
from reeltune.core.errors import UserError
from reeltune.distributed import sharded_io
from reeltune.export.adapter import export_adapter
from reeltune.optim.trainable import released_names
from scripts.adapters_page import OF_BLOCKS, named, pair

MIXINS = {
    "wan_fun": loaders.WanLoraLoaderMixin,
    "hunyuan_video": loaders.HunyuanVideoLoraLoaderMixin,
    "cogvideox_fun": loaders.CogVideoXLoraLoaderMixin,
}
REALLY = [(dialect, network) for dialect in writing.DIALECTS for network in MIXINS]


class Loaded:
    """A tiny checkpoint's network."""

    def __init__(self, folder):
        self.folder, self.family = folder, families.find(folder)
        self.net = self.family.load(folder, encoders=False).net.eval().requires_grad_(False)
        config = self.family.load(folder, encoders=False, network=False).config
        self.names = released_names(self.net, lambda state: self.family.to_released(state, config))
        self.base = {self.names[name]: weight for name, weight in self.net.named_parameters()}
        self.network = network_of(self.base)

    def linear(self, part: str | None) -> dict[str, nn.Module]:
        """Released name -> layer, of names with `part` in them; None: of those of blocks."""
        found = {name: module for name, module in self.net.named_modules() if isinstance(module, nn.Linear)}
        released = {self.names[f"{name}.weight"].removesuffix(".weight"): module for name, module in found.items()}
        if part is None:
            return {name: module for name, module in released.items() if name.startswith(OF_BLOCKS)}
        return {name: module for name, module in released.items() if part in name}

    def adapter(self, part: str | None = None, rank: int = 2, alpha: float = 3.0) -> Adapter:
        layers = self.linear(part).items()
        return Adapter({name: pair(name, one.out_features, one.in_features, rank, alpha) for name, one in layers})

    def in_diffusers(self, tensors) -> dict[str, LowRank]:
        """What diffusers' own load_lora_weights adds to each layer, by released name; it raises as it does."""

        class Pipeline(MIXINS[self.network.name]):
            components, hf_device_map, transformer = {}, None, self.net

        pipeline = Pipeline()
        try:
            pipeline.load_lora_weights(dict(tensors), "default_0")
            layers = {name: one for name, one in self.net.named_modules() if isinstance(one, LoraLayer)}
            return {
                self.names[f"{name}.weight"].removesuffix(".weight"): LowRank(
                    one.lora_A["default_0"].weight.clone(),
                    one.lora_B["default_0"].weight.clone(),
                    one.scaling["default_0"] * one.r["default_0"],
                )
                for name, one in layers.items()
            }
        finally:
            if getattr(self.net, "peft_config", None):
                self.net.unload_lora()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, goldens):
    """network -> its tiny checkpoint with all that a variant has beside, loaded once."""
    from tests.families.every_family import pairs

    made = {}

    def get(network):
        if network not in made:
            found = [one.values[0] for one in pairs(goldens, modes=False) if one.values[0].family == network]
            best = max(found, key=lambda one: "v1.1" in one.checkpoint.lower())
            made[network] = Loaded(best.lay_out(tmp_path_factory.mktemp(network)))
        return made[network]

    return get


# ---- the tables


def test_the_tables_have_every_layer_of_every_network(any_checkpoint, tmp_path):
    if any_checkpoint.family == "toy":
        pytest.skip("it has no released files")
    one = Loaded(any_checkpoint.lay_out(tmp_path))
    network = NETWORKS[any_checkpoint.family]
    assert one.network is network
    for name, module in one.net.named_modules():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in one.names:
                released = one.names[f"{name}.{kind}"].removesuffix(f".{kind}")
                assert network.module(name, "diffusers") == network.module(released, "released") == released
                is_convolution = module.weight.ndim > 2  # of which one network has a linear layer in its place
                assert is_convolution or bool(network.find(released, "released")) == isinstance(module, nn.Linear)
    sizes = solve(network, one.adapter("").layers)
    width = next(layer for name, layer in one.linear(None).items() if name.endswith((".q", "to_q"))).in_features
    assert not sizes.problems and sizes.of["D"] == width


@pytest.mark.golden("released_keys/*.json.gz")
def test_the_tables_have_every_released_layer(goldens):
    of = {
        "Wan2.1-Fun": "wan_fun",
        "CogVideoX": "cogvideox_fun",
        "EasyAnimate": "easyanimate",
        "Hunyuan": "hunyuan_video",
    }
    told = {}
    for file in (goldens / "released_keys").glob("*.json.gz"):
        network = next((NETWORKS[network] for start, network in of.items() if file.name.startswith(start)), None)
        if network is None:
            continue
        shapes = json.loads(gzip.decompress(file.read_bytes()))
        base = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        assert network_of(base) is network
        layers = {}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and network.find(module, "released"):
                layers[module] = LowRank(
                    torch.empty(1, shape[1], device="meta"), torch.empty(shape[0], 1, device="meta"), 1.0
                )
        sizes = solve(network, layers)
        assert not sizes.problems and len(layers) > 200
        told[file.name.removesuffix(".json.gz")] = network.title_of(sizes.of["D"])
    assert told["Wan2.1-Fun-14B-InP"] == "Wan, 14B" and told["Wan2.1-Fun-1.3B-Control"] == "Wan, 1.3B"
    assert told["CogVideoX-Fun-2b-InP"] == "CogVideoX, 2b" and told["HunyuanVideo"] == "HunyuanVideo, 13B"


# ---- diffusers itself


@pytest.mark.parametrize(("dialect", "network"), REALLY)
def test_diffusers_itself_applies_what_was_trained(dialect, network, loaded):
    """Of every dialect that it takes by our rules; where these say that it does not, it does not."""
    if network not in writing.DIALECTS[dialect].forms:
        pytest.skip("is not written")
    one = loaded(network)
    adapter = one.adapter()
    tensors = writing.written(adapter, one.network, dialect)
    by_rule = applied(BY_TOOL["diffusers"], tensors, one.network)
    if by_rule.refused:
        with pytest.raises((ValueError, KeyError, RuntimeError)):
            one.in_diffusers(tensors)
        return
    really = one.in_diffusers(tensors)
    assert really.keys() == by_rule.layers.keys() == (adapter.layers.keys() if by_rule.layers else set())
    if dialect == "diffusers":
        proof = prove(adapter.layers, {}, Applied(really))
        assert proof.holds() and proof.layers == len(adapter.layers) > 10
    for name in really:
        assert prove({name: really[name]}, {}, Applied({name: by_rule.layers[name]})).holds(1e-6)


def traps(one: Loaded) -> dict[str, dict]:
    """Of Wan, in which diffusers does something else than a file means, or stops."""
    part, whole = one.adapter("0.self_attn"), one.adapter()
    head = Adapter(one.adapter("head.head").layers | part.layers)
    kohya = {"prefix": "lora_unet_", "joined": "_", "pairs": KOHYA[0]}
    dots = named(part, "wan_fun", "diffusion_model.")
    whole_low = named(whole, "wan_fun", **kohya)
    return {
        "part, with alpha": dots,
        "part, without alpha": named(part, "wan_fun", "diffusion_model.", alpha=False),
        "two ranks": dots | named(one.adapter("1.ffn.0", rank=3), "wan_fun", "diffusion_model."),
        "outside of blocks": named(head, "wan_fun", "diffusion_model.", alpha=False),
        "outside of blocks, with alpha": named(head, "wan_fun", "diffusion_model."),
        "no block": named(one.adapter("head.head"), "wan_fun", "diffusion_model.", alpha=False),
        "k_img alone": named(one.adapter("k_img"), "wan_fun", "diffusion_model."),
        "ref_conv": dots | {"diffusion_model.ref_conv.lora_A.weight": torch.ones(2, 2)},
        "whole weights": dots | {"diffusion_model.ref_conv.diff": torch.ones(2)},
        "dora": dots | {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(48, 1)},
        "kohya": whole_low,
        "kohya without alpha": named(whole, "wan_fun", alpha=False, **kohya),
        "kohya in part": named(part, "wan_fun", **kohya),
        "kohya of images alone": {name: tensor for name, tensor in whole_low.items() if "v_img" not in name},
        "the original scripts'": named(whole, "wan_fun", alpha=False, **(kohya | {"prefix": "lora_unet__"})),
        "its own names": named(part, "wan_fun", "transformer.", "diffusers", alpha=False),
        "its own names, with alpha": named(part, "wan_fun", "transformer.", "diffusers"),
        "peft's": named(part, "wan_fun", "base_model.model.", "diffusers", alpha=False),
    }


TRAPS = 18


@pytest.mark.parametrize("index", range(TRAPS))
def test_our_rules_of_diffusers_are_its_own(index, loaded):
    one = loaded("wan_fun")
    found = traps(one)
    assert len(found) == TRAPS
    name, tensors = list(found.items())[index]
    by_rule = applied(BY_TOOL["diffusers"], tensors, one.network)
    if by_rule.refused is not None:
        with pytest.raises((ValueError, KeyError, RuntimeError)) as told:
            one.in_diffusers(tensors)
        kind = by_rule.refused.partition(":")[0]
        assert kind == type(told.value).__name__ or not kind.endswith("Error"), name
        return
    really = one.in_diffusers(tensors)
    really = {layer: low_rank for layer, low_rank in really.items() if low_rank.B_OR.any()}  # zeros for images
    assert really.keys() == by_rule.layers.keys(), name
    assert not really or prove(really, {}, Applied(by_rule.layers)).holds(1e-6)


# ---- PEFT itself


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 1}}, {"use_dora": True}], ids=str
)
@pytest.mark.parametrize("network", NETWORKS)
def test_what_peft_saves_is_read_as_peft_merges_it(network, settings, loaded, tmp_path):
    one = loaded(network)
    targets = ["to_q", "to_k"] if network != "easyanimate" else ["attn1.to_q", "attn1.add_k_proj"]
    wrapped = get_peft_model(one.net, LoraConfig(r=3, lora_alpha=5, target_modules=targets, **settings))
    layers = {name: module for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    for i, module in enumerate(layers.values()):
        module.lora_B["default"].weight.data.normal_(generator=torch.Generator().manual_seed(i))
        if settings.get("use_dora"):
            module.lora_magnitude_vector["default"].weight.data.mul_(1.25)
    wrapped.save_pretrained(tmp_path)
    before = {name: weight.clone() for name, weight in one.base.items()}
    read, found = read_adapter(tmp_path, before)
    wrapped.merge_and_unload()
    merged = {one.names[name]: weight for name, weight in one.net.named_parameters()}
    try:
        assert found.tool == "PEFT" and found.alpha_from == "adapter_config.json" and len(read.layers) == len(layers)
        for name, low_rank in read.layers.items():
            now = low_rank.changed(before[f"{name}.weight"])
            torch.testing.assert_close(now, merged[f"{name}.weight"], atol=1e-5, rtol=1e-5)
            assert not torch.equal(now, before[f"{name}.weight"])
    finally:
        with torch.no_grad():
            for name, weight in merged.items():
                weight.copy_(before[name])


# ---- a checkpoint of ours


@pytest.fixture
def checkpoint(loaded, tmp_path):
    """(its folder, the adapter in it): as a run writes it, with a weight that learnt in full."""
    one, folder = loaded("wan_fun"), tmp_path / "run/checkpoint-7"
    adapter = one.adapter()
    learnt = {"ref_conv.weight": one.base["ref_conv.weight"] + 0.25}
    weights = {f"{name}.lora_A.weight": low_rank.A_RI for name, low_rank in adapter.layers.items()}
    weights |= {f"{name}.lora_B.weight": low_rank.B_OR for name, low_rank in adapter.layers.items()}
    alphas = {name: low_rank.alpha for name, low_rank in adapter.layers.items()}
    about = {"family": one.family.name, "base_model": str(one.folder), "transformer_path": None, "rank": 2}
    saved.write(folder / "adapter", weights | learnt, alphas, about)
    (folder / "progress.json").write_text(json.dumps({"step": 7, "epoch": 0, "cursor": 0}))
    (tmp_path / "run/recipe.yaml").write_text("seed: 1\n")
    return folder, adapter


def test_a_checkpoints_adapter_goes_to_comfyui_with_its_whole_weights(checkpoint, tmp_path):
    folder, adapter = checkpoint
    out = tmp_path / "cat.safetensors"
    lines = list(export_adapter(folder, out, "comfyui"))
    words = f"applied / trained 1.000000 to 1.000000 in {len(adapter.layers) + 1} layers"
    assert [line for line in lines if words in line] == lines[1:3]
    written = load_file(out)
    torch.testing.assert_close(
        written["diffusion_model.ref_conv.diff"], torch.full_like(written["diffusion_model.ref_conv.diff"], 0.25)
    )
    B = written["diffusion_model.blocks.0.ffn.0.lora_B.weight"]
    torch.testing.assert_close(B, 1.5 * adapter.layers["blocks.0.ffn.0"].B_OR)
    told = read_adapter(out)[1].metadata
    assert told["ss_steps"] == "7" and len(told["reeltune.recipe_sha256"]) == 64
    with pytest.raises(UserError, match=r"diffusers takes no whole weights, and ref_conv\.weight"):
        list(export_adapter(folder, tmp_path / "other.safetensors", "diffusers"))


def test_an_adapter_in_bf16_is_as_exact_as_that_allows(checkpoint, tmp_path):
    folder, _ = checkpoint
    lines = list(export_adapter(folder, tmp_path / "a.safetensors", "comfyui", dtype="bf16"))
    assert {tensor.dtype for tensor in load_file(tmp_path / "a.safetensors").values()} == {torch.bfloat16}
    error = float(lines[1].partition("relative error ")[2])
    assert 1e-4 < error < 1e-2


def test_a_checkpoints_adapter_is_held_to_the_model(checkpoint, loaded, tmp_path):
    folder, _ = checkpoint
    other = str(loaded("hunyuan_video").folder)
    with pytest.raises(UserError, match="is an adapter of Wan, and this is HunyuanVideo"):
        list(export_adapter(folder, tmp_path / "a.safetensors", "comfyui", pretrained_model_name_or_path=other))
    tensors = load_file(folder / "adapter" / saved.FILE)
    name = "diffusion_model.blocks.0.ffn.0.lora_A.weight"
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, folder / "adapter" / saved.FILE)
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.0\.weight is .* in it and .* in the model"):
        read_adapter(folder, loaded("wan_fun").base)


def test_a_checkpoint_without_an_adapter_is_told(checkpoint, tmp_path):
    folder, _ = checkpoint
    with pytest.raises(UserError, match="has no moving average; it is kept by runs with use_ema"):
        list(export_adapter(folder, tmp_path / "a.safetensors", "comfyui", ema=True))
    (folder / "adapter").rename(folder / "transformer")
    with pytest.raises(UserError, match="has no adapter: its network learnt in full"):
        list(export_adapter(folder, tmp_path / "a.safetensors", "comfyui"))


def test_what_several_processes_keep_of_it_is_one_file(checkpoint, tmp_path):
    folder, _ = checkpoint
    list(export_adapter(folder, tmp_path / "whole.safetensors", "comfyui"))
    weights = saved.read(folder / "adapter")
    sharded_io.write(
        folder / "shares", [sharded_io.whole(f"weights/{name}", one) for name, one in weights.items()], None
    )
    Shared.write_outline(folder, {name: list(one.shape) for name, one in weights.items()}, {})
    (folder / "adapter" / saved.FILE).unlink()
    with pytest.raises(UserError, match="holds the shares of several processes; `reeltune export"):
        read_adapter(folder)
    with pytest.raises(UserError, match="has no moving average; it is kept by runs with use_ema"):
        list(export_adapter(folder, tmp_path / "average.safetensors", "comfyui", ema=True))
    list(export_adapter(folder, tmp_path / "shared.safetensors", "comfyui"))
    whole, shared = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "shared.safetensors")
    assert whole.keys() == shared.keys() and all(torch.equal(whole[name], shared[name]) for name in whole)
