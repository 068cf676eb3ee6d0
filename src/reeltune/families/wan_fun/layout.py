"""A Wan2.1-Fun checkpoint as files: where each network lies, loading one, writing them.

released    config.json, diffusion_pytorch_model.safetensors, Wan2.1_VAE.pth, models_t5_*.pth, models_clip_*.pth,
            google/umt5-xxl
diffusers   transformer, vae, text_encoder, image_encoder, tokenizer

Tensor names may be of either form in either place: they are told apart by the names themselves.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from reeltune.errors import UserError, refuse
from reeltune.families import weights
from reeltune.families.wan_fun import keys, sizes
from reeltune.families.wan_fun.net import WanFunTransformer

State = dict[str, Tensor]

RELEASED = {
    "transformer": "",
    "vae": "Wan2.1_VAE.pth",
    "text": "models_t5_umt5-xxl-enc-bf16.pth",
    "image": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "tokenizer": "google/umt5-xxl",
}
DIFFUSERS = {
    "transformer": "transformer",
    "vae": "vae",
    "text": "text_encoder",
    "image": "image_encoder",
    "tokenizer": "tokenizer",
}
SUBPATHS = {
    "transformer": ("transformer_additional_kwargs", "transformer_subpath"),
    "vae": ("vae_kwargs", "vae_subpath"),
    "text": ("text_encoder_kwargs", "text_encoder_subpath"),
    "image": ("image_encoder_kwargs", "image_encoder_subpath"),
    "tokenizer": ("text_encoder_kwargs", "tokenizer_subpath"),
}  # where the guides' model yaml names them


@dataclass(frozen=True)
class Files:
    """Where each part of a checkpoint lies; `image` is None for a network without picture features."""

    transformer: Path
    vae: Path
    text: Path
    tokenizer: Path
    image: Path | None


def transformer_in(folder: Path, settings: dict[str, Any]) -> Path | None:
    """The folder or file of the transformer's weights, if there is one. `settings` is the model yaml."""
    for path in _candidates(folder, settings, "transformer"):
        if path.is_file() or any(any(path.glob(f"{stem}*.safetensors*")) for stem in weights.STEMS):
            return path
    return None


def locate(folder: Path, settings: dict[str, Any], transformer: Path, *, with_image: bool) -> Files:
    """Raises UserError that names every missing part and where it was looked for."""
    names = ("vae", "text", "tokenizer", *(("image",) if with_image else ()))
    tried = {name: _candidates(folder, settings, name) for name in names}
    found = {name: next((path for path in paths if path.exists()), None) for name, paths in tried.items()}
    missing = [
        f"no {name} at {' or '.join(str(path.relative_to(folder)) for path in tried[name])}; download it, "
        "or name it in config_path"
        for name, path in found.items()
        if path is None
    ]
    refuse(str(folder), missing)
    return Files(transformer, **{"image": None, **found})  # type: ignore[arg-type]


def _candidates(folder: Path, settings: dict[str, Any], name: str) -> list[Path]:
    section, key = SUBPATHS[name]
    said = (settings.get(section) or {}).get(key)
    return [folder / said] if said else [folder / RELEASED[name], folder / DIFFUSERS[name]]


# ---- loading one network


def read_config(path: Path) -> dict[str, Any]:
    """The config.json beside or in `path`; empty if there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as broken:
        raise UserError(str(file), f"is not JSON ({broken})") from broken


def peek_transformer(path: Path) -> tuple[State, dict[str, Any]]:
    """(outlines of the tensors in our names, config.json); weights are not read."""
    return keys.from_released(weights.peek(path)), read_config(path)


def load_transformer(path: Path, replacement: Path | None, dtype: torch.dtype) -> tuple[WanFunTransformer, dict]:
    """(network, its config.json as read). `replacement` holds other weights for it: a file or a saved folder."""
    outlines, config = peek_transformer(path)
    with torch.device("meta"):
        net = WanFunTransformer(**sizes.transformer(outlines, config, str(path)))
    source = path
    if replacement is not None:
        inner = replacement / "transformer"
        source = inner if inner.is_dir() else replacement
    weights.fit(net, keys.from_released(weights.read(source)), str(source), dtype)
    return net, config


def load_vae(path: Path, dtype: torch.dtype | None) -> AutoencoderKLWan:
    state = keys.vae_from_released(weights.read(path))
    _expect(state, ("encoder.conv_in.weight", "post_quant_conv.weight"), path, "a Wan2.1 VAE")
    config = read_config(path) if path.is_dir() else {}
    with torch.device("meta"):
        net = AutoencoderKLWan(**sizes.vae(state, config, str(path)))
    return _frozen(net, state, path, dtype)


def load_text(path: Path, dtype: torch.dtype | None) -> UMT5EncoderModel:
    state = keys.text_from_released(weights.read(path))
    attention = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    _expect(state, ("shared.weight", attention), path, "a UMT5 encoder")
    with torch.device("meta"):
        net = UMT5EncoderModel(sizes.text(state))
    return _frozen(net, state, path, dtype)


def load_image(path: Path, dtype: torch.dtype | None) -> CLIPVisionModel:
    named = {name.removeprefix("vision_model."): tensor for name, tensor in weights.read(path).items()}
    state = keys.image_from_released(named)
    _expect(
        state, ("embeddings.patch_embedding.weight", "encoder.layers.0.mlp.fc1.weight"), path, "a CLIP picture tower"
    )
    config = read_config(path) if path.is_dir() else {}
    with torch.device("meta"):
        net = CLIPVisionModel(sizes.image(state, config))
    tower = getattr(net, "vision_model", net)  # transformers before 5.3 nest it
    places = len(state["embeddings.position_embedding.weight"])
    tower.embeddings.position_ids = torch.arange(places)[None]
    _frozen(tower, state, path, dtype)
    return net


def _frozen(net: nn.Module, state: State, path: Path, dtype: torch.dtype | None) -> Any:
    return weights.fit(net, state, str(path), dtype).requires_grad_(False).eval()


def _expect(state: State, names: tuple[str, ...], path: Path, what: str) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(
            str(path), f"is not {what}: it has no {', '.join(missing)}, but {', '.join(list(state)[:3])}, …"
        )


# ---- writing


def save_transformer(folder: Path, state: State, config: dict[str, Any], *, diffusers: bool = False) -> None:
    """Writes config.json and diffusion_pytorch_model.safetensors, loadable by the original tools or by diffusers.

    state: in our names. config: as it was read, and written back as it was wherever its dialect suits the names.
    """
    arguments = sizes.transformer(state, config, str(folder))
    named = state if diffusers else keys.to_released(state)
    is_diffusers = "attention_head_dim" in config
    if diffusers and not is_diffusers:
        config = sizes.diffusers_config(arguments)
    elif not diffusers and (is_diffusers or not config):
        config = sizes.released_config(arguments)
    weights.write(named, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_released(
    folder: Path,
    net: nn.Module,
    vae: nn.Module,
    text: nn.Module,
    image: nn.Module | None,
    tokenizer_dir: Path,
    config: dict[str, Any] | None = None,
) -> None:
    """A whole checkpoint in the released layout. `image` holds the picture tower alone, without CLIP's text half.

    Without `config` the released dialect is written from the network's own sizes.
    """
    save_transformer(folder, net.state_dict(), config or sizes.released_config(net.config))
    torch.save(keys.vae_to_released(vae.state_dict()), folder / RELEASED["vae"])
    torch.save(keys.text_to_released(text.state_dict()), folder / RELEASED["text"])
    if image is not None:
        tower = getattr(image, "vision_model", image)
        torch.save(keys.image_to_released(tower.state_dict()), folder / RELEASED["image"])
    shutil.copytree(tokenizer_dir, folder / RELEASED["tokenizer"], dirs_exist_ok=True)
