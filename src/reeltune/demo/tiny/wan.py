"""Wan2.1 and Wan2.2, text or a picture to video: one network or two experts, latents of 16 or of 48 channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import AutoencoderKLWan

from reeltune.demo.checkpoint import IMAGE_WIDTH, TEXT_WIDTH, image_encoder, text_encoder, tokenizer
from reeltune.demo.untrained import random_weights
from reeltune.families.wan_fun.layout import write_released
from reeltune.families.wan_fun.net import WanFunTransformer
from reeltune.families.wan_fun.sizes import CHANNELS_2_2, LATENTS_2_2

CHANNELS = 16  # of latents of Wan2.1's VAE, which Wan2.2-A14B has too
KEPT_CLIP = 4 + CHANNELS  # its mask and latents, beside the noisy ones of Wan2.1-I2V
HEADS, HEAD_DIM = 4, 32


def write_checkpoint(
    folder: Path, *, experts: Sequence[str] = ("",), channels: int = CHANNELS, sees_picture: bool = False
) -> Path:
    """Lays the checkpoint out in `folder` and returns it. experts: "high" and "low", or the name of the only network.
    channels: of the latents. sees_picture: picture to video, as Wan2.1 has it."""
    networks = {
        name: random_weights(transformer(channels, sees_picture=sees_picture), seed=3 + i)
        for i, name in enumerate(experts)
    }
    vae = vae_2_2(base_dim=8) if channels == CHANNELS_2_2 else AutoencoderKLWan(base_dim=8)
    image = image_encoder() if sees_picture else None
    with TemporaryDirectory() as tokenizer_dir:
        tokenizer().save_pretrained(tokenizer_dir)
        write_released(folder, networks, random_weights(vae, seed=0), text_encoder(), image, Path(tokenizer_dir))
    return folder


def transformer(channels: int, *, sees_picture: bool) -> WanFunTransformer:
    return WanFunTransformer(
        in_channels=channels + (KEPT_CLIP if sees_picture else 0),
        out_channels=channels,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        ffn_dim=384,
        freq_dim=256,
        text_dim=TEXT_WIDTH,
        num_layers=4,
        image_dim=IMAGE_WIDTH if sees_picture else None,
        added_kv_proj_dim=HEADS * HEAD_DIM if sees_picture else None,
    )


def vae_2_2(base_dim: int) -> AutoencoderKLWan:
    """Wan2.2's, of 48 channels, at that width of encoder and decoder."""
    return AutoencoderKLWan(
        base_dim=base_dim,
        decoder_base_dim=base_dim,
        z_dim=CHANNELS_2_2,
        in_channels=12,  # patches of 2 x 2 pixels
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        is_residual=True,
        latents_mean=LATENTS_2_2["latents_mean"],
        latents_std=LATENTS_2_2["latents_std"],
    )
