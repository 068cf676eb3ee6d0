"""Random adapters for the networks of the tables, and files of them in any tool's form."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.adapters.loaders import PEFT
from reeltune.adapters.networks import NETWORKS
from reeltune.adapters.sizes import terms

SIZES = {"D": 24, "F": 96, "T": 16, "S": 20, "E": 12, "P": 8, "U": 18, "C": 10, "Z": 14}
OF_BLOCKS = ("blocks.", "transformer_blocks.", "single_transformer_blocks.")


def size(expression: str) -> int:
    return sum(SIZES[letter] * times for letter, times in terms(expression).items())


def pair(name: str, outputs: int, inputs: int, rank: int, alpha: float) -> LowRank:
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


def named(adapter: Adapter, network: str, prefix: str, spelling="released", joined=".", pairs=PEFT[0], alpha=True):
    """Its tensors in any form; alpha: with the adapter's own."""
    tensors = {}
    for released, low_rank in adapter.layers.items():
        layer = NETWORKS[network].layer(released)
        text = layer.name(spelling).format(*NETWORKS[network].numbers(released)).replace(".", joined)
        for ending, tensor in zip(pairs, (low_rank.A_RI, low_rank.B_OR), strict=True):
            tensors[f"{prefix}{text}{ending}"] = tensor.clone()
        if alpha:
            tensors[f"{prefix}{text}.alpha"] = torch.tensor(low_rank.alpha)
    return tensors


def written_to(folder: Path, tensors: dict, metadata: dict | None = None, name: str = "adapter.safetensors") -> Path:
    save_file(tensors, folder / name, metadata)
    return folder / name


def base_of(adapter: Adapter) -> dict:
    """A network's parameters that it fits."""
    shapes = {name: (one.B_OR.shape[0], one.A_RI.shape[1]) for name, one in adapter.layers.items()}
    return {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}
