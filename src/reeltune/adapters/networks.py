"""The layers of each network, as the tools name them: by these tables files of adapters are read and written.

released    as in the released files, by which this package goes
diffusers   as in diffusers' classes
original    as in HunyuanVideo's own code, which musubi-tuner runs: there some layers are one
comfyui     as ComfyUI's class of HunyuanVideo has them, where they differ from the original

Names and sizes were read from the released files and from the libraries, 2026-11; a test holds them to the families'
networks. {} stands for a block's number.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

Spelling = Literal["released", "diffusers", "original", "comfyui"]
SPELLINGS: tuple[Spelling, ...] = ("released", "diffusers", "original", "comfyui")
NUMBER = re.compile(r"(?<=blocks[._])\d+(?=[._]|$)")


@dataclass(frozen=True)
class Layer:
    """A linear layer. Sizes are a letter, which stands for one number in a network, with what it is taken times."""

    released: str
    outputs: str  # "6D"
    inputs: str
    diffusers: str = ""
    original: str = ""
    part: int = 0
    """Which of the layers that are one in the original, in their order there."""

    def name(self, spelling: Spelling) -> str:
        """The layer's name as a tool spells it; empty where it has none."""
        if spelling == "comfyui":
            return _in_comfyui(self.original)
        return {"released": self.released, "diffusers": self.diffusers, "original": self.original}[spelling]


def _in_comfyui(original: str) -> str:
    for theirs, own in (("_attn_", "_attn."), (".fc1", ".0"), (".fc2", ".2"), ("mod.linear", "mod.lin")):
        original = original.replace(theirs, own)
    return original.replace("modulation.linear", "modulation.lin")


@dataclass(frozen=True)
class Network:
    name: str  # of the family's folder
    title: str
    layers: tuple[Layer, ...]
    others: dict[str, str] = field(default_factory=dict)
    """Released name -> diffusers' name, of modules that are no linear layers, and of the few parameters without one."""
    parameters: tuple[str, ...] = ()
    """Which of `others` are parameters themselves."""
    sizes: dict[int, str] = field(default_factory=dict)
    """Width (D) -> the releases of it."""

    def title_of(self, width: int | None) -> str:
        return f"{self.title}, {self.sizes.get(width or 0, f'width {width}' if width else 'of any width')}"

    def parameter(self, module: str, kind: str) -> str:
        """The released name of a module's weight or bias, as `kind` says."""
        return module if general(module)[0] in self.parameters else f"{module}.{kind}"

    def find(self, text: str, spelling: Spelling, joined: str = ".") -> list[tuple[Layer, str]]:
        """(layer, its released name) for a name as a file has it; several where they are one there; else none."""
        pattern, numbers = general(text)
        return [(layer, layer.released.format(*numbers)) for layer in _table(self, spelling, joined).get(pattern, [])]

    def module(self, text: str, spelling: Spelling, joined: str = ".") -> str | None:
        """The released name of any module or parameter that is not fused."""
        if found := self.find(text, spelling, joined):
            return found[0][1] if len(found) == 1 else None
        pattern, numbers = general(text)
        other = _others(self, spelling, joined).get(pattern)
        return None if other is None else other.format(*numbers)

    def numbers(self, name: str) -> list[str]:
        """Numbers of the blocks that a name is in."""
        return general(name)[1]

    def layer(self, released: str) -> Layer | None:
        found = self.find(released, "released")
        return found[0][0] if found else None


def general(name: str) -> tuple[str, list[str]]:
    """(the name with {} for blocks' numbers, these)"""
    return NUMBER.sub("{}", name), NUMBER.findall(name)


@cache
def _tables(name: str) -> dict[tuple[Spelling, str], dict[str, list[Layer]]]:
    tables = {}
    for spelling in SPELLINGS:
        for joined in "._":
            table = defaultdict(list)
            for layer in NETWORKS[name].layers:
                if text := layer.name(spelling):
                    table[text.replace(".", joined)].append(layer)
            tables[spelling, joined] = dict(table)
    return tables


def _table(network: Network, spelling: Spelling, joined: str) -> dict[str, list[Layer]]:
    if network.name in NETWORKS:
        return _tables(network.name)[spelling, joined]
    return {layer.released.replace(".", joined): [layer] for layer in network.layers if spelling == "released"}


def _others(network: Network, spelling: Spelling, joined: str) -> dict[str, str]:
    if spelling not in ("released", "diffusers"):
        return {}
    names = network.others.items()
    own = {(theirs if spelling == "diffusers" else released): released for released, theirs in names}
    return {name.replace(".", joined): released for name, released in own.items()}


# ---- the networks


def _wan() -> Iterator[Layer]:
    for name, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
        yield Layer(f"blocks.{{}}.self_attn.{name}", "D", "D", f"blocks.{{}}.attn1.{theirs}")
        yield Layer(f"blocks.{{}}.cross_attn.{name}", "D", "D", f"blocks.{{}}.attn2.{theirs}")
    for name in "kv":
        yield Layer(f"blocks.{{}}.cross_attn.{name}_img", "D", "D", f"blocks.{{}}.attn2.add_{name}_proj")
    yield Layer("blocks.{}.ffn.0", "F", "D", "blocks.{}.ffn.net.0.proj")
    yield Layer("blocks.{}.ffn.2", "D", "F", "blocks.{}.ffn.net.2")
    for name, theirs, inputs in (("text_embedding", "text_embedder", "T"), ("time_embedding", "time_embedder", "S")):
        yield Layer(f"{name}.0", "D", inputs, f"condition_embedder.{theirs}.linear_1")
        yield Layer(f"{name}.2", "D", "D", f"condition_embedder.{theirs}.linear_2")
    yield Layer("time_projection.1", "6D", "D", "condition_embedder.time_proj")
    yield Layer("img_emb.proj.1", "E", "E", "condition_embedder.image_embedder.ff.net.0.proj")
    yield Layer("img_emb.proj.3", "D", "E", "condition_embedder.image_embedder.ff.net.2")
    yield Layer("head.head", "P", "D", "proj_out")


WAN_OTHERS = {
    **{name: name for name in ("patch_embedding", "ref_conv", "control_adapter.conv")},
    **{name: name for name in (f"control_adapter.residual_blocks.{{}}.conv{i}" for i in (1, 2))},
    **{f"blocks.{{}}.self_attn.norm_{x}": f"blocks.{{}}.attn1.norm_{x}" for x in "qk"},
    **{f"blocks.{{}}.cross_attn.norm_{x}": f"blocks.{{}}.attn2.norm_{x}" for x in "qk"},
    "blocks.{}.cross_attn.norm_k_img": "blocks.{}.attn2.norm_added_k",
    "blocks.{}.norm3": "blocks.{}.norm2",
    "blocks.{}.modulation": "blocks.{}.scale_shift_table",
    "head.modulation": "scale_shift_table",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}


def _same(name: str, outputs: str, inputs: str, diffusers: str = "") -> Layer:
    return Layer(name, outputs, inputs, diffusers or name)


def _cogvideox() -> Iterator[Layer]:
    block = "transformer_blocks.{}."
    yield from (_same(f"{block}attn1.to_{name}", "D", "D") for name in ("q", "k", "v", "out.0"))
    yield from (_same(f"{block}norm{i}.linear", "6D", "S") for i in (1, 2))
    yield from (_same(f"{block}ff.net.0.proj", "F", "D"), _same(f"{block}ff.net.2", "D", "F"))
    yield from (_same("time_embedding.linear_1", "S", "D"), _same("time_embedding.linear_2", "S", "S"))
    yield from (_same("patch_embed.proj", "D", "C"), _same("patch_embed.text_proj", "D", "T"))
    yield from (_same("norm_out.linear", "2D", "S"), _same("proj_out", "P", "D"))


COG_NORMS = ("norm1.norm", "norm2.norm", "attn1.norm_q", "attn1.norm_k")
COG_OTHERS = {name: name for name in (*(f"transformer_blocks.{{}}.{x}" for x in COG_NORMS), "norm_final")}
COG_OTHERS["norm_out.norm"] = "norm_out.norm"


def _easyanimate() -> Iterator[Layer]:
    block = "transformer_blocks.{}."
    yield from (layer for layer in _cogvideox() if not layer.released.startswith(("patch_embed", "time_embedding")))
    yield from (_same(f"{block}attn2.to_{x}", "D", "D", f"{block}attn1.add_{x}_proj") for x in "qkv")
    yield _same(f"{block}attn2.to_out.0", "D", "D", f"{block}attn1.to_add_out")
    yield from (_same(f"{block}txt_ff.net.0.proj", "F", "D"), _same(f"{block}txt_ff.net.2", "D", "F"))
    yield from (_same("time_embedding.linear_1", "S", "Z"), _same("time_embedding.linear_2", "S", "S"))
    yield from (_same("text_proj", "D", "T"), _same("text_proj.1", "D", "T"))
    yield from (_same("text_proj_t5", "D", "U"), _same("text_proj_t5.1", "D", "U"))


EASY_OTHERS = COG_OTHERS | {name: name for name in ("proj", "text_proj.0", "text_proj_t5.0")}
EASY_OTHERS |= {
    f"transformer_blocks.{{}}.attn2.norm_{x}": f"transformer_blocks.{{}}.attn1.norm_added_{x}" for x in "qk"
}


def _hunyuan() -> Iterator[Layer]:
    two, one = "transformer_blocks.{}.", "single_transformer_blocks.{}."
    original, single = "double_blocks.{}.", "single_blocks.{}."
    for names, side in (
        (("to_q", "to_k", "to_v", "to_out.0"), "img"),
        (("add_q_proj", "add_k_proj", "add_v_proj"), "txt"),
    ):
        for part, name in enumerate(names[:3]):
            yield _of_two(f"{two}attn.{name}", "D", "D", f"{original}{side}_attn_qkv", part)
    yield _of_two(f"{two}attn.to_out.0", "D", "D", f"{original}img_attn_proj")
    yield _of_two(f"{two}attn.to_add_out", "D", "D", f"{original}txt_attn_proj")
    for name, norm, side in (("ff", "norm1", "img"), ("ff_context", "norm1_context", "txt")):
        yield _of_two(f"{two}{name}.net.0.proj", "F", "D", f"{original}{side}_mlp.fc1")
        yield _of_two(f"{two}{name}.net.2", "D", "F", f"{original}{side}_mlp.fc2")
        yield _of_two(f"{two}{norm}.linear", "6D", "D", f"{original}{side}_mod.linear")
    for part, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        yield _of_two(f"{one}{name}", "D", "D", f"{single}linear1", part)
    yield _of_two(f"{one}proj_mlp", "F", "D", f"{single}linear1", 3)
    yield _of_two(f"{one}proj_out", "D", "D+F", f"{single}linear2")
    yield _of_two(f"{one}norm.linear", "3D", "D", f"{single}modulation.linear")
    yield from _around_hunyuan()


def _of_two(name: str, outputs: str, inputs: str, original: str, part: int = 0) -> Layer:
    return Layer(name, outputs, inputs, name, original, part)


def _around_hunyuan() -> Iterator[Layer]:
    """Layers outside of the blocks, whose original names are not known to be one thing in all tools."""
    refiner = "context_embedder.token_refiner.refiner_blocks.{}."
    yield from (_same(f"{refiner}attn.to_{name}", "D", "D") for name in ("q", "k", "v", "out.0"))
    yield from (_same(f"{refiner}ff.net.0.proj", "F", "D"), _same(f"{refiner}ff.net.2", "D", "F"))
    yield from (_same(f"{refiner}norm_out.linear", "2D", "D"), _same("context_embedder.proj_in", "D", "T"))
    for embedder, of, inputs in (
        ("context_embedder.time_text_embed", "timestep", "S"),
        ("context_embedder.time_text_embed", "text", "T"),
        ("time_text_embed", "timestep", "S"),
        ("time_text_embed", "text", "U"),
        ("time_text_embed", "guidance", "S"),
    ):
        yield _same(f"{embedder}.{of}_embedder.linear_1", "D", inputs)
        yield _same(f"{embedder}.{of}_embedder.linear_2", "D", "D")
    yield from (_same("norm_out.linear", "2D", "D"), _same("proj_out", "P", "D"))


HUNYUAN_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
HUNYUAN_OTHERS = {
    name: name
    for name in (
        "x_embedder.proj",
        *(f"transformer_blocks.{{}}.attn.{x}" for x in HUNYUAN_NORMS),
        *(f"single_transformer_blocks.{{}}.attn.{x}" for x in HUNYUAN_NORMS[:2]),
        *(f"context_embedder.token_refiner.refiner_blocks.{{}}.norm{i}" for i in (1, 2)),
    )
}

NETWORKS = {
    network.name: network
    for network in (
        Network(
            "wan_fun",
            "Wan",
            tuple(_wan()),
            WAN_OTHERS,
            ("blocks.{}.modulation", "head.modulation"),
            {1536: "1.3B", 3072: "5B", 5120: "14B"},
        ),
        Network("cogvideox_fun", "CogVideoX", tuple(_cogvideox()), COG_OTHERS, (), {1920: "2b", 3072: "5b"}),
        Network("easyanimate", "EasyAnimate V5", tuple(_easyanimate()), EASY_OTHERS, (), {3072: "7b or 12b"}),
        Network("hunyuan_video", "HunyuanVideo", tuple(_hunyuan()), HUNYUAN_OTHERS, (), {3072: "13B"}),
    )
}
