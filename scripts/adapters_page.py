"""Writes the tables of docs/adapters.md, measured here: python scripts/adapters_page.py docs/adapters.md

A random adapter is written as files, and held to each tool's rules; a cell is what the tool applies over what the
adapter means.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.adapters.loaders import KOHYA, LOADERS, PEFT, Loader, Tensors, applied
from reeltune.adapters.networks import NETWORKS, Network, Spelling
from reeltune.adapters.proof import prove
from reeltune.adapters.sizes import terms
from reeltune.adapters.writing import DIALECTS, written

SIZES = {"D": 24, "F": 96, "T": 16, "S": 20, "E": 12, "P": 8, "U": 18, "C": 10, "Z": 14}
OF_BLOCKS = ("blocks.", "transformer_blocks.", "single_transformer_blocks.")
FORMS: dict[str, tuple[str, Spelling, str, tuple[str, str]]] = {
    "`diffusion_model.blocks.0.self_attn.q.lora_A.weight`": ("diffusion_model.", "released", ".", PEFT[0]),
    "`lora_unet_blocks_0_self_attn_q.lora_down.weight` (kohya, musubi-tuner)": (
        "lora_unet_",
        "released",
        "_",
        KOHYA[0],
    ),
    "`lora_unet__blocks_0_self_attn_q.lora_down.weight` (VideoX-Fun)": ("lora_unet__", "released", "_", KOHYA[0]),
    "`transformer.blocks.0.attn1.to_q.lora_A.weight` (diffusers)": ("transformer.", "diffusers", ".", PEFT[0]),
    "`base_model.model.blocks.0.self_attn.q.lora_A.weight` (PEFT)": ("base_model.model.", "released", ".", PEFT[0]),
    "`pipe.dit.blocks.0.self_attn.q.lora_A.weight`": ("pipe.dit.", "released", ".", PEFT[0]),
    "`blocks.0.self_attn.q.lora_A.weight`": ("", "released", ".", PEFT[0]),
}
TABLES = re.compile(r"(<!-- (written|found) -->\n).*?(?=\n\n)", re.DOTALL)


def size(expression: str) -> int:
    return sum(SIZES[letter] * times for letter, times in terms(expression).items())


def pair(name: str, outputs: int, inputs: int, rank: int, alpha: float) -> LowRank:
    """Random, the same for the same name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    A, B = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
    return LowRank(A, B, alpha)


def made(network: str, *, rank: int = 2, alpha: float = 1.0, blocks_alone: bool = True, only: str = "") -> Adapter:
    """Every linear layer of two blocks, and of what is around them unless `blocks_alone`; only: part of the names."""
    found = {}
    for layer in NETWORKS[network].layers:
        for block in "01":
            name = layer.released.replace("{}", block)
            if only in name and (not blocks_alone or name.startswith(OF_BLOCKS)):
                found[name] = pair(name, size(layer.outputs), size(layer.inputs), rank, alpha)
    return Adapter(found)


def named(
    adapter: Adapter,
    network: str,
    prefix: str,
    spelling: Spelling = "released",
    joined: str = ".",
    pairs: tuple[str, str] = PEFT[0],
    alpha: bool = True,
) -> dict[str, torch.Tensor]:
    """Its tensors in any form; alpha: with the adapter's own."""
    tensors = {}
    for released, low_rank in adapter.layers.items():
        layer = NETWORKS[network].layer(released)
        assert layer is not None
        text = layer.name(spelling).format(*NETWORKS[network].numbers(released)).replace(".", joined)
        for ending, tensor in zip(pairs, (low_rank.A_RI, low_rank.B_OR), strict=True):
            tensors[f"{prefix}{text}{ending}"] = tensor.clone()
        if alpha:
            tensors[f"{prefix}{text}.alpha"] = torch.tensor(low_rank.alpha)
    return tensors


def cell(loader: Loader, adapter: Adapter, tensors: Tensors, network: Network) -> str:
    if network.name not in loader.names:
        return ""
    its = applied(loader, tensors, network)
    proof = prove(adapter.layers, adapter.changes, its)
    if proof.refused:
        return "stops"
    if not proof.layers:
        return "none of it"
    ratios = {f"{proof.lowest_ratio:.3f}", f"{proof.highest_ratio:.3f}"}
    part = f" in {proof.layers} of {len(adapter.layers)} layers" if proof.missing else ""
    return " to ".join(sorted(ratios)) + part


def table(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines).replace("|  |", "| |").replace("|  |", "| |")


def of_written() -> str:
    """Each form that is written, in each tool."""
    rows = []
    for dialect, about in DIALECTS.items():
        for network in (NETWORKS[name] for name in about.forms):
            adapter = made(network.name, rank=4, alpha=2.0)
            tensors = written(adapter, network, dialect)
            rows.append(
                (f"`--for {dialect}`", network.title, *(cell(one, adapter, tensors, network) for one in LOADERS))
            )
    return table(rows, ("written", "model", *(loader.tool for loader in LOADERS)))


def of_found() -> str:
    """Each form of Wan that is found, in each tool: alpha is half the rank, in the file or left out."""
    network, rows = NETWORKS["wan_fun"], []
    tools = [loader for loader in LOADERS if "wan_fun" in loader.names]
    adapter = made("wan_fun", rank=4, alpha=2.0)
    for form, (prefix, spelling, joined, pairs) in FORMS.items():
        for alpha in (True, False):
            tensors = named(adapter, "wan_fun", prefix, spelling, joined, pairs, alpha)
            cells = (cell(tool, adapter, tensors, network) for tool in tools)
            rows.append((form, "there" if alpha else "left out", *cells))
    return table(rows, ("names in the file", "alpha", *(tool.tool for tool in tools)))


def page(text: str) -> str:
    """The page with the tables as they are now."""
    made_now = {"written": of_written, "found": of_found}
    return TABLES.sub(lambda match: match[1] + made_now[match[2]](), text)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
