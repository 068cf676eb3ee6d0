"""A Wan checkpoint as files: where each network lies, loading one, writing them.

released    config.json, diffusion_pytorch_model.safetensors, Wan2.1_VAE.pth, models_t5_*.pth, models_clip_*.pth,
            google/umt5-xxl; Wan2.2-A14B has high_noise_model and low_noise_model in place of the first two
diffusers   transformer, vae, text_encoder, image_encoder, tokenizer; Wan2.2-A14B has transformer_2 too

Tensor names may be of either form in either place: they are told apart by the names themselves.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reeltune.core.errors import UserError, refuse
from reeltune.core.imports import lean_imports
from reeltune.core.reading import bare_name, brief
from reeltune.families import configs, tensor_files, weights
from reeltune.families.spec import Loading
from reeltune.families.wan_fun import keys, sizes

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionModel, UMT5EncoderModel

    from reeltune.families.wan_fun.net import WanFunTransformer

State = dict[str, Tensor]

VAE_2_2 = "Wan2.2_VAE.pth"  # of 48 latent channels
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
    "vae": ("vae_kwargs", "vae_subpath"),
    "text": ("text_encoder_kwargs", "text_encoder_subpath"),
    "image": ("image_encoder_kwargs", "image_encoder_subpath"),
    "tokenizer": ("text_encoder_kwargs", "tokenizer_subpath"),
}  # where the guides' model yaml names them


EXPERTS = {"high": "high_noise_model", "low": "low_noise_model"}  # as released
EXPERTS_IN_DIFFUSERS = {"high": "transformer", "low": "transformer_2"}


@dataclass(frozen=True)
class Files:
    """Where each part of a checkpoint lies; `image` is None for a network without picture features."""

    transformer: Path
    vae: Path
    text: Path
    tokenizer: Path
    image: Path | None

    def for_encoding(self) -> dict[str, Path]:
        """All but the trained network."""
        files = {"vae": self.vae, "text": self.text, "tokenizer": self.tokenizer}
        return files if self.image is None else files | {"image": self.image}


def networks_in(folder: Path, settings: dict[str, Any]) -> dict[str, Path]:
    """The folder or file of the weights: of "" alone, or of the experts "high" and "low"; {}: there are none.

    settings: the model yaml; the places that it names count alone.
    """
    said = _said(settings, "transformer_additional_kwargs", "transformer_subpath")
    named = {
        name: _said(settings, "transformer_additional_kwargs", f"transformer_{place}_subpath")
        for name, place in EXPERTS.items()
    }
    low = named["low"]  # which names the only network where there is no other
    if named["high"]:
        chosen = {name: folder / path for name, path in named.items() if path is not None}
    elif said or low:
        chosen = {"": folder / (said or low or "")}
    elif released := _with_weights({name: folder / place for name, place in EXPERTS.items()}):
        return released
    else:
        both = _with_weights({name: folder / place for name, place in EXPERTS_IN_DIFFUSERS.items()})
        if len(both) == len(EXPERTS):
            return both
        places = (folder / RELEASED["transformer"], folder / DIFFUSERS["transformer"])
        chosen = {"": next(filter(tensor_files.has_weights, places), folder)}
    return _with_weights(chosen)


def refuse_bare_experts(folder: Path) -> None:
    """Raises UserError for the folder of an expert in which no weights are."""
    places = [folder / name for name in (*EXPERTS.values(), EXPERTS_IN_DIFFUSERS["low"])]
    refuse(
        str(folder),
        [
            f"{place.name}, of a Wan2.2 model of two networks, {tensor_files.why_no_weights(place)}; download it, or "
            "remove it to train the other network alone"
            for place in places
            if place.is_dir() and not tensor_files.has_weights(place)
        ],
    )


def _with_weights(places: dict[str, Path]) -> dict[str, Path]:
    return {name: path for name, path in places.items() if tensor_files.has_weights(path)}


def locate(folder: Path, settings: dict[str, Any], transformer: Path, *, channels: int, with_image: bool) -> Files:
    """Finds each part of a checkpoint. channels: of the latents. Raises UserError that names every missing part and
    where it was looked for."""
    names = ("vae", "text", "tokenizer", *(("image",) if with_image else ()))
    released = RELEASED | ({"vae": VAE_2_2} if channels == sizes.CHANNELS_2_2 else {})
    tried = {}
    for name in names:
        said = _said(settings, *SUBPATHS[name])
        tried[name] = [folder / said] if said else [folder / released[name], folder / DIFFUSERS[name]]
    found = {name: next((path for path in paths if path.exists()), None) for name, paths in tried.items()}
    missing = [
        f"no {name} at {' or '.join(str(path.relative_to(folder)) for path in tried[name])}; download it, "
        "or name it in config_path"
        for name, path in found.items()
        if path is None
    ]
    refuse(str(folder), missing)
    return Files(transformer, **{"image": None, **found})  # type: ignore[arg-type]


def _said(settings: dict[str, Any], section: str, key: str) -> Path | None:
    """The place inside a checkpoint that the model yaml names. Raises UserError for one that is none."""
    said = (settings.get(section) or {}).get(key)
    if not said:
        return None
    try:
        return Path(*map(bare_name, Path(said).parts))
    except (TypeError, ValueError):
        raise UserError(
            "config_path", f"{section}.{key} is {brief(said)}; expected a place inside the checkpoint"
        ) from None


# ---- loading one network


def peek_transformer(path: Path) -> tuple[State, dict[str, Any]]:
    """(outlines of the tensors in our names, config.json); weights are not read."""
    return keys.from_released(weights.peek(path)), configs.read_config(path)


def load_transformer(path: Path, how: Loading) -> tuple[WanFunTransformer, dict[str, Any]]:
    """(network, its config.json as read)"""
    from reeltune.families.wan_fun.net import WanFunTransformer

    outlines, config = peek_transformer(path)
    net = configs.build(WanFunTransformer, sizes.transformer(outlines, config, str(path)), str(path))
    source = path if how.transformer_path is None else weights.saved_transformer(how.transformer_path)
    given = weights.peek(source) if how.device.type == "meta" else weights.read(source, how.fake)
    state = keys.from_released(given)
    if given.keys() != state.keys():  # bad keys are told by the names that the file has
        refuse(str(source), list(weights.misfits(keys.to_released(net.state_dict()), given)))
    weights.fit(net, state, str(source), how.dtype, how.device, how.quantisation)
    return net, config


def load_vae(
    path: Path, channels: int, dtype: torch.dtype | None, fake: AbstractContextManager | None = None
) -> AutoencoderKLWan:
    """The VAE, with quick layers. channels: of the transformer's latents. Raises UserError for a VAE of others."""
    with lean_imports():
        from diffusers import AutoencoderKLWan

        from reeltune.families.wan_fun.vae import with_quick_layers

    state = keys.vae_from_released(weights.read(path, fake))
    arguments = sizes.vae(state, _own_config(path), str(path))
    if arguments["z_dim"] != channels:
        rule = f"has {arguments['z_dim']} latent channels, and the transformer {channels}; it is of another model"
        raise UserError(str(path), rule)
    net = with_quick_layers(configs.build(AutoencoderKLWan, arguments, str(path)))
    return _frozen(net, state, path, dtype)


def load_text(path: Path, dtype: torch.dtype | None, fake: AbstractContextManager | None = None) -> UMT5EncoderModel:
    from transformers import UMT5EncoderModel

    state = keys.text_from_released(weights.read(path, fake))
    net = configs.build(UMT5EncoderModel, {"config": sizes.text(state, str(path))}, str(path))
    _frozen(net, state, path, dtype)
    net.encoder.embed_tokens.weight = net.shared.weight  # one table under two names, not two
    return net


def load_image(path: Path, dtype: torch.dtype | None, fake: AbstractContextManager | None = None) -> CLIPVisionModel:
    from transformers import CLIPVisionModel

    named = {name.removeprefix("vision_model."): tensor for name, tensor in weights.read(path, fake).items()}
    state = keys.image_from_released(named)
    net = configs.build(CLIPVisionModel, {"config": sizes.image(state, _own_config(path), str(path))}, str(path))
    tower: Any = getattr(net, "vision_model", net)  # older releases of transformers nest it
    tower.embeddings.position_ids = torch.arange(tower.embeddings.num_positions)[None]  # the one buffer
    _frozen(tower, state, path, dtype)
    return net


def _own_config(path: Path) -> dict[str, Any]:
    """A network's config.json; beside a single file in the root lies the transformer's, which is another's."""
    return configs.read_config(path) if path.is_dir() else {}


def _frozen(net: nn.Module, state: State, path: Path, dtype: torch.dtype | None) -> Any:
    return weights.fit(net, state, str(path), dtype).requires_grad_(False).eval()


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
    weights.write_component(folder, named, config)


def write_released(
    folder: Path,
    networks: Mapping[str, Any],
    vae: nn.Module,
    text: nn.Module,
    image: nn.Module | None,
    tokenizer_dir: Path,
) -> None:
    """A whole checkpoint in the released layout. networks: as of `networks_in`, of "" alone or of both experts.
    `image` holds the picture tower alone, without CLIP's text half."""
    for name, net in networks.items():
        place = folder / EXPERTS.get(name, RELEASED["transformer"])
        save_transformer(place, net.state_dict(), sizes.released_config(net.config))
    vae_file = VAE_2_2 if keys.is_vae_2_2(vae.state_dict()) else RELEASED["vae"]
    torch.save(keys.vae_to_released(vae.state_dict()), folder / vae_file)
    torch.save(keys.text_to_released(text.state_dict()), folder / RELEASED["text"])
    if image is not None:
        tower = getattr(image, "vision_model", image)
        torch.save(keys.image_to_released(tower.state_dict()), folder / RELEASED["image"])
    shutil.copytree(tokenizer_dir, folder / RELEASED["tokenizer"], dirs_exist_ok=True)
