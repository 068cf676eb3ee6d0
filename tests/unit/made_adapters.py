"""Files of adapters, and a network that one fits."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from reeltune.adapters.adapter import Adapter


def written_to(folder: Path, tensors: dict, metadata: dict | None = None, name: str = "adapter.safetensors") -> Path:
    save_file(tensors, folder / name, metadata)
    return folder / name


def base_of(adapter: Adapter) -> dict:
    """A network's parameters that it fits."""
    shapes = {name: (one.B_OR.shape[0], one.A_RI.shape[1]) for name, one in adapter.layers.items()}
    return {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}
