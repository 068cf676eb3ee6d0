"""Networks of any size with random weights, made where they are needed; and their checkpoint without weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils import swap_tensors
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from benchmarks.gpu.sizes import CHANNELS, Encoders, Network, Scale
from reeltune.families.wan_fun import keys, layout, sizes
from reeltune.families.wan_fun.net import WanFunTransformer
from reeltune.families.wan_fun.vae import with_quick_layers
from reeltune.memory.quantized import QuantizedLinear
from tests.families.full_size import hollow
from tests.families.tiny_wan import tokenizer_in

BLOCK = 2**20 - 3  # random numbers that are repeated: a prime, so that no two rows of a matrix are alike
INTEGERS = {torch.int8: (-127, 128), torch.uint8: (0, 120)}  # from, to; fp8's bits: 120 is 256

# ---- outlines, on the meta device


def transformer(network: Network, encoders: Encoders) -> WanFunTransformer:
    with torch.device("meta"):
        return WanFunTransformer(
            in_channels=3 * CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=network.heads,
            attention_head_dim=network.head_width,
            ffn_dim=network.ffn,
            num_layers=network.layers,
            text_dim=encoders.text["d_model"],
            image_dim=encoders.image["hidden_size"],
            added_kv_proj_dim=network.width,
            ref_channels=CHANNELS,
        )


def vae(encoders: Encoders) -> AutoencoderKLWan:
    with torch.device("meta"):
        return AutoencoderKLWan(**encoders.vae)


def text(encoders: Encoders) -> UMT5EncoderModel:
    config = UMT5Config(feed_forward_proj="gated-gelu", dropout_rate=0.0, **encoders.text)
    with torch.device("meta"):
        return UMT5EncoderModel(config)


def image(encoders: Encoders) -> CLIPVisionModel:
    with torch.device("meta"):
        return CLIPVisionModel(CLIPVisionConfig(patch_size=14, image_size=224, hidden_act="gelu", **encoders.image))


# ---- weights


def filled(net: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """The outline with random weights on the device."""
    for weight in net.parameters():
        swap_tensors(weight, nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device), weight.requires_grad))
    fill(net)
    return net


def frozen(scale: Scale, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """VAE and encoders, as a run has them."""
    tower = filled(image(scale.encoders), device, dtype)
    embeddings = getattr(tower, "vision_model", tower).embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device)[None]
    words = filled(text(scale.encoders), device, dtype)
    words.encoder.embed_tokens.weight = words.shared.weight
    clips = with_quick_layers(filled(vae(scale.encoders), device, dtype))
    return {name: net.requires_grad_(False).eval() for name, net in (("vae", clips), ("text", words), ("image", tower))}


@torch.no_grad()
def fill(net: nn.Module) -> None:
    """Random values in the place of those that are there: of a size that keeps what passes through them, and the same
    ones wherever a weight is, on the device or the host."""
    chance = torch.Generator().manual_seed(0)
    normals = torch.randn(BLOCK, generator=chance)
    integers = {dtype: torch.randint(*ends, (BLOCK,), generator=chance) for dtype, ends in INTEGERS.items()}
    for layer in net.modules():
        if isinstance(layer, QuantizedLinear):
            _repeat(layer.weight, integers[layer.weight.dtype])
            layer.scale.fill_(math.sqrt(3 / layer.in_features) / 127)  # of evenly spread integers, 1 / sqrt(inputs)
    for name, weight in net.named_parameters():
        if not weight.is_floating_point():
            continue
        if weight.ndim > 1 and not name.endswith("gamma"):
            _repeat(weight, normals / math.sqrt(weight[0].numel()))
        else:
            weight.fill_(float(name.endswith(("weight", "gamma"))))  # norms


def _repeat(weight: Tensor, some: Tensor) -> None:
    some = some.to(weight)
    for part in weight.view(-1).split(len(some)):
        part.copy_(some[: len(part)])


# ---- a checkpoint


def checkpoint(folder: Path, network: Network, encoders: Encoders) -> Path:
    """All of its files; the weights in them are holes, which take no room on the disk and read as zeros."""
    net = transformer(network, encoders)
    layout.save_transformer(folder, net.state_dict(), sizes.released_config(net.config))
    parts = {
        "diffusion_pytorch_model": (keys.to_released(net.state_dict()), "BF16"),
        "vae/diffusion_pytorch_model": (keys.vae_to_released(vae(encoders).state_dict()), "F32"),
        "text_encoder/model": (keys.text_to_released(text(encoders).state_dict()), "BF16"),
        "image_encoder/model": (keys.image_to_released(_tower(encoders)), "F16"),
    }
    for stem, (state, dtype) in parts.items():
        hollow(folder / f"{stem}.safetensors", {name: [*tensor.shape] for name, tensor in state.items()}, dtype)
    tokenizer_in(folder / layout.RELEASED["tokenizer"])
    return folder


def _tower(encoders: Encoders) -> dict[str, Tensor]:
    net: Any = image(encoders)
    return getattr(net, "vision_model", net).state_dict()
