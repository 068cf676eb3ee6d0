"""Every tensor of every HunyuanVideo golden file, within the bounds of benchmarks/parity_hunyuan.py."""

import pytest
import torch

from benchmarks.golden import Golden, loaded
from benchmarks.parity_hunyuan import golden_files, measure
from reeltune.families.hunyuan_video import family as hunyuan
from tests.families.parity import assert_parity, off

pytestmark = pytest.mark.golden("multi/golden/hunyuanvideo*/*.safetensors")

INPUTS = {  # what is read and not computed, beside what a file's tensors are compared by
    "scheduler": set(),
    "vae": {"x", "z"},
    "transformer": {
        "hidden_states",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "pooled_projections",
        "timestep",
        "guidance",
        "loss_weight",
    },
    "train": {
        *("pixel_values", "latents", "noise", "timestep_indices", "guidance"),
        *("mask", "mask_pixel_values", "mask_latents", "clip_pixel_values"),
    },
}


def test_within_bounds(goldens, file):
    assert_parity(file, measure(file), INPUTS[file.stem.split("_")[0]])


def test_a_wrong_weight_is_seen(goldens):
    """The bounds are tight enough to see a thousandth of one bias."""
    for path in golden_files(goldens):
        if path.stem == "transformer":
            _, parts = loaded(path.parent)
            bias = parts.net.get_parameter("norm_out.linear.bias")
            with torch.no_grad():
                bias[0] += 1e-3
                try:
                    with torch.enable_grad():
                        rows = measure(path)
                finally:
                    bias[0] -= 1e-3
            assert off(rows)


def test_stored_latents_are_drawn_from_our_distribution(goldens):
    """(latents - mean) / deviation is standard normal, for clips and for known first frames."""
    for path in golden_files(goldens):
        if path.stem.startswith("train"):
            golden, (_, parts) = Golden(path), loaded(path.parent)
            net = parts.frozen["vae"]
            pixels = golden["pixel_values"]
            pairs = [("latents", hunyuan.encode_clip(net, pixels))]
            if "mask_latents" in golden and pixels.shape[1] > 1:  # of a picture nothing is known there
                shown = hunyuan.first_alone(net, pixels)
                torch.testing.assert_close(shown, golden["mask_pixel_values"][:, : shown.shape[1]])
                pairs.append(("mask_latents", hunyuan.first_latent(hunyuan.encode_clip(net, shown))))
            for name, found in pairs:
                z = (golden[name] - found.mean) / (found.logvar / 2).exp()
                assert abs(z.mean()) < 5 / z.numel() ** 0.5, f"{path} {name}"
                assert abs(z.square().mean() - 1) < 5 * (2 / z.numel()) ** 0.5, f"{path} {name}"
