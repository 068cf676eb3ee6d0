"""CogVideoX-Fun against the reference's own numbers; part of `python -m benchmarks.parity`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.golden import (
    MSL,
    Golden,
    Row,
    assert_drawn,
    batch_of,
    captions_in,
    compare_output,
    compare_schedule,
    compare_vae,
    gradients,
    measured,
    settings_of,
    to_u8,
)
from reeltune.diffusion import loss as losses
from reeltune.families import inpaint, latents
from reeltune.families.cogvideox_fun import family as cogvideox
from reeltune.families.cogvideox_fun.net import rotary
from reeltune.families.spec import Family, Parts


def golden_files(goldens: Path) -> list[Path]:
    return sorted((goldens / "multi" / "golden").glob("cogvideox*/*.safetensors"))


def measure(path: Path) -> list[Row]:
    """All rows of one golden file."""
    kinds = {"scheduler": scheduler, "vae": vae, "text": text, "transformer": transformer, "train": train_step}
    return measured(path, kinds)


def scheduler(golden: Golden, family: Family, parts: Parts) -> None:
    compare_schedule(golden, family.objective)


def vae(golden: Golden, family: Family, parts: Parts) -> None:
    compare_vae(golden, parts, latents.encode_clip, family.decode)


def text(golden: Golden, family: Family, parts: Parts) -> None:
    captions = captions_in(golden.path.parent)[0]
    net: Any = parts.net
    length = net.config.max_text_seq_length
    tokens = parts.extras["tokenizer"](captions, padding="max_length", max_length=length, truncation=True)
    golden.exact("input_ids", torch.tensor(tokens.input_ids))
    golden.exact("attention_mask", torch.tensor(tokens.attention_mask))
    golden.compare("prompt_embeds", cogvideox.encode_text(parts, captions))


def transformer(golden: Golden, family: Family, parts: Parts) -> None:
    for case in golden.cases(".hidden_states"):
        x, known = golden[f"{case}.hidden_states"].transpose(1, 2), golden[f"{case}.inpaint_latents"].transpose(1, 2)
        if f"{case}.rope_cos" in golden:
            frames, height, width = x.shape[2:]
            found = rotary(parts.net.config, frames, height, width, x.device)
            assert found is not None
            cos, sin = found
            golden.compare(f"{case}.rope_cos", cos)
            golden.compare(f"{case}.rope_sin", sin)
        cond = {"text": golden[f"{case}.encoder_hidden_states"], "inpaint": known}
        out = family.denoise(parts.net, x, golden[f"{case}.timestep"], cond).transpose(1, 2)
        compare_output(golden, case, parts, family, out)


def train_step(golden: Golden, family: Family, parts: Parts) -> None:
    """First what the frozen networks make of captions and clips, then the step from the stored latents and noise."""
    said = settings_of(golden.path)
    captions = captions_in(golden.path.parent)[0]
    golden.compare("prompt_embeds", cogvideox.encode_text(parts, captions))
    cond = {"text": golden["prompt_embeds"]}
    pixels, mode = golden["pixel_values"], said["train_mode"]
    if mode == "inpaint":
        cond["inpaint"] = known_part(golden, family, parts, captions)
    else:
        family, parts = text_to_video(family, parts)
        assert_drawn(
            golden["latents"].transpose(1, 2),
            family.encode(parts, batch_of(to_u8(pixels), text=captions), mode).x0,
        )
    objective, noise = family.objective, golden["noise"].transpose(1, 2)
    x0, level_B = golden["latents"].transpose(1, 2), golden["timesteps"] / objective.steps
    golden.exact("timesteps", objective.timestep(level_B))
    golden.compare("noisy_latents", objective.corrupt(x0, noise, level_B).transpose(1, 2))
    golden.compare("target", objective.target(x0, noise, level_B).transpose(1, 2))
    error = losses.error_at(family.denoise, parts.net, objective, x0, cond, noise, level_B)
    golden.compare("noise_pred", error.transpose(1, 2) + golden["target"])
    value = losses.mean_square(error).mean()
    if said["motion_sub_loss"] == "True" and x0.shape[2] > 2:
        value = value * (1 - MSL) + losses.mean_square(error.diff(dim=2)).mean() * MSL
    gradients(golden, "", parts, family, value)


def known_part(golden: Golden, family: Family, parts: Parts, captions: list[str]) -> Tensor:
    """B 1+C T h w as recorded, once our masks, our masked clips and our latents have been compared with it."""
    pixels, mask_BFHW = golden["pixel_values"], golden["mask"][:, :, 0].bool()
    golden.compare("mask_pixel_values", inpaint.kept_pixels(pixels, mask_BFHW))
    batch = batch_of(to_u8(pixels), text=captions, mask_BFHW=mask_BFHW)
    quiet = replace(parts, config=parts.config | {"add_noise_in_inpaint_model": False})
    encoded = family.encode(quiet, batch, "inpaint")
    assert_drawn(golden["latents"].transpose(1, 2), encoded.x0)
    known = encoded.cond["inpaint"]
    vae: Any = parts.frozen["vae"]
    scale = vae.config.scaling_factor
    golden.compare("resized_mask", known.mean[:, :1] / scale)
    golden.compare("mask_pixel_values_noised", renoised(golden))
    noised = latents.encode_clip(vae, golden["mask_pixel_values_noised"])
    assert_drawn(golden["mask_latents"] * scale, noised)
    drawn = torch.cat([known.mean[:, :1], golden["mask_latents"] * scale], 1)
    keep = {"inpaint": golden["t2v_flag"].bool()}
    if not keep["inpaint"].all():
        assert mask_BFHW[~keep["inpaint"]].all()  # as our rule has it
    golden.compare("inpaint_latents", losses.blank({"inpaint": drawn}, keep, {})["inpaint"].transpose(1, 2))
    return golden["inpaint_latents"].transpose(1, 2)


def renoised(golden: Golden) -> Tensor:
    """The recorded noise, kept from what is masked (-1) by our rule; its size is checked where it is random."""
    clean, noised = golden["mask_pixel_values"], golden["mask_pixel_values_noised"]
    return torch.where(clean == -1, clean, noised)


def text_to_video(family: Family, parts: Parts) -> tuple[Family, Parts]:
    """The variant without conditioning channels, as the reference's: the first channels of the same weights."""
    net: Any = copy.deepcopy(parts.net)
    config = parts.config | {"in_channels": family.geometry.channels}
    weight, total = net.patch_embed.proj.weight, net.config.in_channels
    kept = weight.shape[1] * family.geometry.channels // total
    net.patch_embed.proj.weight = nn.Parameter(weight[:, :kept].detach().clone())
    found = cogvideox.variant(config, "normal")
    found = replace(found, objective=family.objective, geometry=family.geometry)
    return found, replace(parts, net=net, config=config)
