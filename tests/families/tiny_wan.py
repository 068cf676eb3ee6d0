"""Tiny random checkpoints of Wan in the released layout, of any variant and size, and a batch for them."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKLWan
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from reeltune.core.types import Batch, Draw
from reeltune.demo.tiny.wan import vae_2_2
from reeltune.families.wan_fun.layout import write_released
from reeltune.families.wan_fun.net import WanFunTransformer

CHANNELS = 16
FRAMES, HEIGHT, WIDTH = 5, 32, 48
OF_48 = 48  # latent channels of Wan2.2's small models
VARIANTS = {  # conditioning channels, picture features, ref_conv, camera channels
    "control_v1.0": (2 * CHANNELS, True, 0, 0),
    "control_v1.1": (2 * CHANNELS, True, CHANNELS, 0),
    "control_camera": (CHANNELS, True, 0, 24),
    "inp": (CHANNELS + 4, True, 0, 0),
    "control_t2v": (CHANNELS, False, 0, 0),
}
NEXT_VARIANTS = {  # of Wan2.1 and Wan2.2
    "t2v": (0, False, 0, 0),
    "2.2_a14b_t2v": (0, False, 0, 0),
    "2.2_a14b_inp": (CHANNELS + 4, False, 0, 0),
    "2.2_a14b_control": (2 * CHANNELS + 4, False, CHANNELS, 0),
    "2.2_a14b_control_camera": (CHANNELS + 4, False, 0, 24),
    "2.2_5b_ti2v": (0, False, 0, 0),
    "2.2_5b_inp": (OF_48 + 4, False, 0, 0),
    "2.2_5b_control": (2 * OF_48 + 4, False, OF_48, 0),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz.,"


def filled(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights that depend on the seed alone, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim > 1 and not name.endswith("gamma"):
                weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)
            elif name.endswith(("bias", "class_embedding")):
                weight.normal_(0, 0.02, generator=generator)
    return net


def network(variant: str, *, width=48, heads=2, layers=2, text=24, image=32, **more) -> WanFunTransformer:
    extra, has_image, ref, camera = (VARIANTS | NEXT_VARIANTS)[variant]
    channels = OF_48 if "_5b_" in variant else CHANNELS
    return WanFunTransformer(
        in_channels=channels + extra,
        out_channels=channels,
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        ffn_dim=2 * width,
        freq_dim=64,
        text_dim=text,
        num_layers=layers,
        image_dim=image if has_image else None,
        added_kv_proj_dim=width if has_image else None,
        ref_channels=ref,
        camera_channels=camera,
        **more,
    )


def tokenizer_in(folder: Path) -> Path:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder)
    return folder


def tiny_checkpoint(folder: Path, variant: str, *, seed: int = 0, text: int = 24, image: int = 32, **sizes) -> Path:
    """Writes a whole checkpoint to `folder` and returns it."""
    folder = Path(folder)
    vocabulary = 4 + len(LETTERS)
    t5 = UMT5Config(
        vocab_size=vocabulary, d_model=text, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    clip = CLIPVisionConfig(
        hidden_size=image, intermediate_size=48, num_hidden_layers=2, num_attention_heads=16, patch_size=14
    )
    has_image = (VARIANTS | NEXT_VARIANTS)[variant][1]
    seeds = {"low": seed, "high": seed + 4} if "a14b" in variant else {"": seed}
    networks = {name: filled(network(variant, text=text, image=image, **sizes), own) for name, own in seeds.items()}
    with TemporaryDirectory() as tokenizer:
        write_released(
            folder,
            networks,
            filled(vae_2_2(base_dim=4) if "_5b_" in variant else AutoencoderKLWan(base_dim=4), seed + 1),
            filled(UMT5EncoderModel(t5), seed + 2),
            filled(CLIPVisionModel(clip), seed + 3) if has_image else None,
            tokenizer_in(Path(tokenizer)),
        )
    return folder


def batch(mode, count=2, ref_frames=(0, 3), keep=None) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def pixels(channels=3):
        shape = (count, FRAMES, channels, HEIGHT, WIDTH)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    mask = torch.ones(count, FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    mask[0, :2, :, : WIDTH // 2] = False  # the first sample has something to keep
    draws = [Draw(i, None, None, (), 0, seed=i) for i in range(count)]
    return Batch(
        draws,
        ["a cat.", "two dogs"][:count],
        pixels(),
        torch.tensor(ref_frames[:count]),
        keep or {},
        control_BFCHW=pixels() if mode.startswith("control") and "camera" not in mode else None,
        camera_BFCHW=pixels(6).float() / 255 if "camera" in mode else None,
        mask_BFHW=mask if mode in ("inpaint", "i2v", "ti2v") else None,
    ).to("cpu")
