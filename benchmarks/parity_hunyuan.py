"""HunyuanVideo against the reference's own numbers; part of `python -m benchmarks.parity`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.golden import (
    LOSS,
    MSL,
    NORM,
    SCHEDULE,
    Golden,
    Row,
    batch_of,
    compare_output,
    compare_schedule,
    compare_vae,
    gradients,
    measured,
    settings_of,
    to_u8,
)
from reeltune.diffusion import loss as losses
from reeltune.families.hunyuan_video import family as hunyuan
from reeltune.families.hunyuan_video import prompts
from reeltune.families.spec import Family, Parts

# Relative. Of the timestep sinusoid's 128 frequencies two differ by a float32 rounding from those of the reference's
# machine, whose `exp` rounds otherwise; at guidance 6000 that turns an angle by 2e-4 (measured, 2026-11).
GRADIENT = 5e-4


def golden_files(goldens: Path) -> list[Path]:
    return sorted((goldens / "multi" / "golden").glob("hunyuanvideo*/*.safetensors"))


def measure(path: Path) -> list[Row]:
    """All rows of one golden file."""
    return measured(path, {"scheduler": scheduler, "vae": vae, "transformer": transformer, "train": train_step})


def scheduler(golden: Golden, family: Family, parts: Parts) -> None:
    compare_schedule(golden, family.objective)


def vae(golden: Golden, family: Family, parts: Parts) -> None:
    compare_vae(golden, parts, hunyuan.encode_clip, hunyuan.decode)


def transformer(golden: Golden, family: Family, parts: Parts) -> None:
    for case in golden.cases(".hidden_states"):
        cond = {
            "text": golden[f"{case}.encoder_hidden_states"],
            "text_mask": golden[f"{case}.encoder_attention_mask"],
            "pooled": golden[f"{case}.pooled_projections"],
            "guidance": golden[f"{case}.guidance"],
        }
        out = family.denoise(parts.net, golden[f"{case}.hidden_states"], golden[f"{case}.timestep"], cond)
        for name, ours in compare_output(golden, case, parts, family, out, GRADIENT).items():
            golden.tensors[f"{name}.norm"] = golden[name].norm()
            golden.compare(f"{name}.norm", ours.norm(), NORM, "relative")


def train_step(golden: Golden, family: Family, parts: Parts) -> None:
    """First what the frozen networks make of captions and clips, then the step from the stored latents and noise."""
    said = settings_of(golden.path)
    captions = re.findall(r'"([^"]*)"', said["prompts"])
    pixels = golden["pixel_values"]
    with_picture = "ref" in family.needs[family.modes[0]]
    length = int(said["tokenizer_max_length"])
    if with_picture:
        text = picture_text(golden, parts, captions, length)
    else:
        ids, mask = prompts.tokens_of(parts.extras["tokenizer"], prompts.TEMPLATE, captions, length + prompts.CROP)
        golden.exact("llm_input_ids", ids)
        golden.exact("llm_attention_mask", mask)
        text = prompts.encode_text(parts, captions, length)
    golden.compare("prompt_embeds", text["text"])
    golden.exact("prompt_attention_mask", text["text_mask"])
    golden.compare("pooled", text["pooled"])
    clip = parts.extras["tokenizer_2"](captions, padding="max_length", max_length=prompts.POOLED_LENGTH)
    golden.exact("clip_input_ids", torch.tensor(clip.input_ids))

    encoded = family.encode(parts, batch_of(to_u8(pixels), text=captions), family.modes[0])
    encoded.cond |= {
        "text": golden["prompt_embeds"],
        "text_mask": golden["prompt_attention_mask"],
        "pooled": golden["pooled"],
    }
    if float(said["guidance_scale"]) * 1000 == hunyuan.GUIDANCE:
        golden.exact("guidance", encoded.cond["guidance"])
    encoded.cond["guidance"] = golden["guidance"]
    if with_picture:
        encoded.cond["ref"] = golden["mask_latents"]

    flow, x0, noise = family.objective, golden["latents"], golden["noise"]
    level_B = flow.levels[golden["timestep_indices"]]
    golden.compare("sigmas", level_B.reshape(golden["sigmas"].shape), SCHEDULE)
    golden.compare("timesteps", flow.timestep(level_B), LOSS, "relative")
    golden.exact("target", flow.target(x0, noise, level_B))
    seen: list[Tensor] = []
    family.denoise(stand_in(parts, seen), flow.corrupt(x0, noise, level_B), level_B, encoded.cond)
    golden.compare("noisy_latents", seen[0])
    error = losses.error_at(family.denoise, parts.net, flow, x0, encoded.cond, noise, level_B)
    golden.compare("noise_pred", error + golden["target"])
    flow = replace(flow, weighting_scheme=said["weighting_scheme"])
    value = (losses.mean_square(error, encoded.loss_mask) * flow.weight(level_B)).mean()
    if said["motion_sub_loss"] == "True" and x0.shape[2] > 2:
        value = value * (1 - MSL) + losses.mean_square(error.diff(dim=2)).mean() * MSL
    gradients(golden, "", parts, family, value)


def picture_text(golden: Golden, parts: Parts, captions: list[str], length: int) -> dict[str, Tensor]:
    tokenizer, llava = parts.extras["tokenizer"], parts.frozen["text"]
    template, crop = prompts.PICTURE_TEMPLATE, prompts.PICTURE_CROP
    ids, mask = prompts.tokens_of(tokenizer, template, captions, length + crop)
    golden.exact("llm_input_ids", ids)
    golden.exact("llm_attention_mask", mask)
    inputs = prompts.expand(ids, llava)
    for theirs, ours in (("input_ids", "input_ids"), ("attention_mask", "attention_mask"), ("position_ids",) * 2):
        golden.exact(f"expanded_{theirs}", inputs[ours])
    picture_u8 = golden["clip_pixel_values"].to(torch.uint8).permute(0, 3, 1, 2)
    if "llava_pixel_values" in golden:
        processed = parts.extras["image_processor"](list(picture_u8), return_tensors="pt")
        golden.compare("llava_pixel_values", processed.pixel_values)
    return prompts.encode_text_and_picture(parts, captions, picture_u8, hunyuan.INTERLEAVE["token_replace"], length)


def stand_in(parts: Parts, seen: list[Tensor]):
    """A network that only notes its input."""

    class Net:
        config = parts.net.config

        def __call__(self, hidden_states: Tensor, **_) -> tuple[Tensor]:
            seen.append(hidden_states)
            return (hidden_states,)

    return Net()
