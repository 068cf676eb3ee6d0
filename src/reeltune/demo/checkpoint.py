"""A tiny Wan2.1-Fun-V1.1-Control in the released layout: every file, key and channel of the real one, less width.

The VAE and the transformer's start were trained by scripts/demo; text and picture encoders are random, which is
enough to tell captions apart.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from reeltune.demo.clips import vocabulary
from reeltune.demo.untrained import random_weights
from reeltune.families.wan_fun.layout import write_released
from reeltune.families.wan_fun.net import WanFunTransformer

WEIGHTS = Path(__file__).parent / "weights"
TEXT_WIDTH, IMAGE_WIDTH = 64, 32


def write_checkpoint(folder: Path) -> Path:
    """Lays the checkpoint out in `folder` and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as tokenizer_dir:
        tokenizer().save_pretrained(tokenizer_dir)
        write_released(
            folder,
            {"": shipped(transformer(), "transformer")},
            shipped(vae(), "vae"),
            text_encoder(),
            image_encoder(),
            Path(tokenizer_dir),
        )
    return folder


def shipped(net: nn.Module, name: str) -> nn.Module:
    """The network with the repository's weights, which are stored in half precision."""
    net.load_state_dict({key: weight.float() for key, weight in load_file(WEIGHTS / f"{name}.safetensors").items()})
    return net


def vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(base_dim=8, z_dim=16)


def transformer() -> WanFunTransformer:
    return WanFunTransformer(
        in_channels=48,  # noisy latents, control, reference: 16 each
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=32,
        ffn_dim=384,
        freq_dim=256,
        text_dim=TEXT_WIDTH,
        num_layers=4,
        image_dim=IMAGE_WIDTH,
        added_kv_proj_dim=128,
        ref_channels=16,
    )


def tokenizer() -> T5Tokenizer:
    """A tokenizer of the captions' words, and of letters for all others."""
    letters = [*map(chr, range(ord("a"), ord("z") + 1)), *"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'-"]
    words = [(f"▁{word}", -4.0) for word in vocabulary()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, ("▁", -8.0), *((c, -9.0) for c in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return random_weights(UMT5EncoderModel(config), seed=1)


def image_encoder() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        intermediate_size=2 * IMAGE_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=16,  # of the released tower, whose weights do not tell
        patch_size=14,
        image_size=224,
    )
    return random_weights(CLIPVisionModel(config), seed=2)
