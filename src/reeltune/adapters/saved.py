"""`checkpoint-N/adapter/`: an adapter as a run trains it, in a file that ComfyUI, diffusers and others load for Wan.

adapter_model.safetensors   diffusion_model.LAYER.lora_A.weight and .lora_B.weight, .alpha (the change is alpha / rank *
                            B @ A), .dora_scale; and whole.NAME, a weight that learns in full, as it is
adapter_config.json         what it was trained on and how; the alpha of each layer
start.safetensors           of PiSSA alone: LAYER.lora_A.start, which is not in the pair above (principal.py)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reeltune.adapters.adapter import Adapter, LowRank
from reeltune.adapters.layers import KINDS, is_adapter
from reeltune.adapters.principal import START_A, START_B, change_of, is_principal, is_start
from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import few, read_table
from reeltune.families.tensor_files import tensors_of

FILE, CONFIG, START = "adapter_model.safetensors", "adapter_config.json", "start.safetensors"
PREFIX, WHOLE, ALPHA = "diffusion_model.", "whole.", ".alpha"
COPY = "restore it from a copy"


def write(folder: Path, weights: Mapping[str, Tensor], alphas: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """Writes an adapter that a run trains. weights: by released name; of meta tensors the config alone is written.
    alphas: by the layer's released name.

    about: plain facts, also text in the file's own metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({**about, "alphas": dict(alphas)}, indent=2) + "\n", encoding="utf-8")
    if not any(weight.is_meta for weight in weights.values()):
        save_file(tensors_in_file(weights, alphas), folder / FILE, metadata(about))
        if starts := {name: weight.contiguous() for name, weight in weights.items() if name.endswith(START_A)}:
            save_file(starts, folder / START, {"format": "pt"})


def save(folder: Path, adapter: Adapter, about: Mapping[str, Any]) -> None:
    """The low-rank pairs of an adapter, as `load` reads them."""
    A, B, _ = KINDS.values()
    weights, alphas = {}, {}
    for layer, pair in adapter.layers.items():
        weights |= {f"{layer}.{A}": pair.A_RI, f"{layer}.{B}": pair.B_OR}
        alphas[layer] = pair.alpha
    write(folder, weights, alphas, about)


def tensors_in_file(weights: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors that a checkpoint's file holds, by their names in it."""
    A, B, _ = KINDS.values()
    named = {(PREFIX if is_adapter(name) else WHOLE) + name: weight for name, weight in weights.items()}
    tensors = {name: weight.detach().contiguous() for name, weight in named.items() if not is_start(name)}
    alpha_of = dict(alphas)
    for layer, pair in _widened(weights, alphas).items():
        tensors |= {f"{PREFIX}{layer}.{A}": pair.A_RI, f"{PREFIX}{layer}.{B}": pair.B_OR}
        alpha_of[layer] = pair.alpha
    return tensors | {f"{PREFIX}{layer}{ALPHA}": torch.tensor(alpha) for layer, alpha in alpha_of.items()}


def _widened(weights: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, LowRank]:
    """For each of PiSSA's layers the pair that is the change. weights: by released name."""
    A, B, _ = KINDS.values()
    return {
        layer: change_of(
            weights[f"{layer}.{START_A}"].detach(),
            weights[f"{layer}.{START_B}"].detach(),
            LowRank(weights[f"{layer}.{A}"].detach(), weights[f"{layer}.{B}"].detach(), float(alpha)),
        )
        for layer, alpha in alphas.items()
        if f"{layer}.{START_A}" in weights
    }


def metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """The file's metadata: text as it is, other values in JSON."""
    return {"format": "pt"} | {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    """Raises UserError for a file that is damaged."""
    table = read_table(folder / CONFIG, COPY)
    alphas = table.get("alphas")
    if not isinstance(alphas, dict) or not all(isinstance(alpha, int | float) for alpha in alphas.values()):
        raise UserError(str(folder / CONFIG), f"alphas is not a number for each layer; {COPY}")
    return table


def read(folder: Path) -> dict[str, Tensor]:
    """Released name -> tensor, as it was trained."""
    stored = tensors_of(folder / FILE, "cpu")
    kept = {name: tensor for name, tensor in stored.items() if not name.endswith(ALPHA)}
    weights = {name.removeprefix(PREFIX if name.startswith(PREFIX) else WHOLE): one for name, one in kept.items()}
    config = config_of(folder)
    if is_principal(str(config.get("lora_init", ""))):
        starts = tensors_of(folder / START, "cpu")
        # Its pair would be taken for one that learns, of twice the rank, at half its strength.
        short = [layer for layer in config["alphas"] if f"{layer}.{START_A}" not in starts]
        refuse(str(folder / START), few([f"has not what {layer} began with; {COPY}" for layer in short]))
        weights |= _apart(weights, starts, str(folder))
    return weights


def _apart(weights: Mapping[str, Tensor], starts: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """What learns in PiSSA's layers and what it began with, from the pairs in the file."""
    A, B, _ = KINDS.values()
    parts = {}
    for name, start_RI in starts.items():
        layer, rank = name.removesuffix(f".{START_A}"), len(start_RI)
        wide_A, wide_B = (weights.get(f"{layer}.{kind}") for kind in (A, B))
        if wide_A is None or wide_B is None or len(wide_A) != 2 * rank or wide_B.shape[1:] != (2 * rank,):
            raise UserError(where, f"{START} has {name}, and {FILE} no pair of twice its rank; {COPY}")
        parts |= {name: start_RI, f"{layer}.{START_B}": wide_B[:, :rank].to(start_RI.dtype)}
        parts |= {f"{layer}.{A}": wide_A[:rank], f"{layer}.{B}": wide_B[:, rank:]}
    return parts


def adapter_of(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Adapter:
    """The adapter of weights by released name, as `read` gives them, and of its config, as `config_of` does."""
    A, B, magnitude = KINDS.values()
    layers = {
        layer: LowRank(weights[f"{layer}.{A}"], weights[f"{layer}.{B}"], float(alpha))
        for layer, alpha in config["alphas"].items()
    }
    layers |= _widened(weights, config["alphas"])
    for layer, pair in layers.items():
        if f"{layer}.{magnitude}" in weights:
            layers[layer] = replace(pair, magnitude_O=weights[f"{layer}.{magnitude}"].reshape(-1))
    whole = {name: weight for name, weight in weights.items() if not (is_adapter(name) or is_start(name))}
    return Adapter(layers, whole, about={key: value for key, value in config.items() if key != "alphas"})


def load(folder: Path) -> Adapter:
    """The adapter in a checkpoint's folder `adapter`. Raises UserError for damaged files, and for halves of a layer."""
    config, weights = config_of(folder), read(folder)
    A, B, _ = KINDS.values()
    wanted = {f"{layer}.{kind}" for layer in config["alphas"] for kind in (A, B)}
    there = {name for name in weights if name.endswith((A, B))}
    refuse(str(folder), few([f"{name} is in one of {FILE} and {CONFIG}; {COPY}" for name in sorted(wanted ^ there)]))
    return adapter_of(weights, config)


def fill(net_weights: Mapping[str, Tensor], stored: Mapping[str, Tensor], where: str) -> None:
    """Copies stored weights over those that learn, both by released name.

    Raises UserError for names that are in one of them alone, and for other shapes.
    """
    problems = [f"{name} learns and is not in it" for name in net_weights if name not in stored]
    problems += [f"{name} is in it and does not learn" for name in stored if name not in net_weights]
    problems += [
        f"{name} is {tuple(stored[name].shape)} in it and {tuple(weight.shape)} in this run"
        for name, weight in net_weights.items()
        if name in stored and stored[name].shape != weight.shape
    ]
    refuse(where, few(problems))
    with torch.no_grad():
        for name, weight in net_weights.items():
            weight.copy_(stored[name])
