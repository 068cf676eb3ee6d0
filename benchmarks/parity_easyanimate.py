"""EasyAnimate against the reference's own numbers; part of `python -m benchmarks.parity`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.golden import (
    LOSS,
    MSL,
    NORM,
    SCHEDULE,
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
from reeltune.core.types import Posterior
from reeltune.diffusion import loss as losses
from reeltune.diffusion.objective import Flow, Objective
from reeltune.families import latents
from reeltune.families.easyanimate import family as easyanimate
from reeltune.families.easyanimate import prompts
from reeltune.families.spec import Family, Parts

MODES = {"control_camera_ref": "control_ref_camera"}  # the reference's name: ours
OUTLIER = 50.0  # the reference's threshold


def golden_files(goldens: Path) -> list[Path]:
    return sorted((goldens / "multi" / "golden").glob("easyanimate_v*/*.safetensors"))


def measure(path: Path) -> list[Row]:
    """All rows of one golden file."""
    kinds = {"scheduler": scheduler, "vae": vae, "text": text, "transformer": transformer, "train": train_step}
    return measured(path, kinds)


def scheduler(golden: Golden, family: Family, parts: Parts) -> None:
    compare_schedule(golden, family.objective)


def vae(golden: Golden, family: Family, parts: Parts) -> None:
    compare_vae(golden, parts, latents.encode_clip, family.decode)


def text(golden: Golden, family: Family, parts: Parts) -> None:
    captions, length = captions_in(golden.path.parent)
    found = prompts.encode_text(parts, captions, length)
    for cond, name in {"text": "", "text_t5": "_2"}.items():
        if cond in found:
            tokens = prompts.tokens_of(parts, name, captions, length)
            golden.exact(f"input_ids{name}", tokens["input_ids"])
            golden.exact(f"attention_mask{name}", tokens["attention_mask"])
            golden.compare(f"prompt_embeds{name}", found[cond])


def transformer(golden: Golden, family: Family, parts: Parts) -> None:
    for case in golden.cases(".hidden_states"):
        cond = {"text": golden[f"{case}.encoder_hidden_states"], "control": golden[f"{case}.control_latents"]}
        if f"{case}.encoder_hidden_states_t5" in golden:
            cond["text_t5"] = golden[f"{case}.encoder_hidden_states_t5"]
        x = golden[f"{case}.hidden_states"]
        rope: Any = parts.net.rope_embedding
        cos, sin = rope(x)
        golden.compare(f"{case}.rope_cos", cos)
        golden.compare(f"{case}.rope_sin", sin)
        out = family.denoise(parts.net, x, golden[f"{case}.timestep"], cond)
        compare_output(golden, case, parts, family, out)


def train_step(golden: Golden, family: Family, parts: Parts) -> None:
    """First what the frozen networks make of captions and clips, then the step from the stored latents and noise."""
    said = settings_of(golden.path)
    mode = MODES.get(said["train_mode"], said["train_mode"])
    captions, length = captions_in(golden.path.parent)
    known = prompts.encode_text(parts, captions, length)
    for cond, name in {"text": "prompt_embeds", "text_t5": "prompt_embeds_2"}.items():
        if cond in known:
            golden.compare(name, known[cond])
            known[cond] = golden[name]
    pixels = golden["pixel_values"]
    frames = {"control_BFCHW": to_u8(golden["control_pixel_values"])}
    if "control_camera_values" in golden:
        frames["camera_BFCHW"] = golden["control_camera_values"]
    family, parts = shrunk(family, parts, golden["control_latents"].shape[1], mode)
    if "proj_out_multiplier" in golden:
        parts = replace(parts, net=scaled(parts.net, golden["proj_out_multiplier"]))
    encoded = family.encode(parts, batch_of(to_u8(pixels), text=captions, **frames), mode)

    keep = kept(golden, family, len(pixels))
    assert_drawn(golden["latents"], encoded.x0)
    at, cond = 0, dict(known)
    for name in ("control", "camera", "ref"):
        if name in encoded.cond:
            value = encoded.cond[name]
            drawn = isinstance(value, Posterior)
            channels, count = (value.mean if drawn else value).shape[1:3]
            stored = golden["control_latents"][:, at : at + channels, :count]
            if drawn:
                shown = stored[keep[name]]
                assert_drawn(shown, Posterior(value.mean[keep[name]], value.logvar[keep[name]]))
            else:
                golden.tensors[f"control_latents.{name}"] = stored
                golden.compare(f"control_latents.{name}", value)
            cond[name] = stored
            at += channels
    if "ref_latents" in golden:
        assert_drawn(golden["ref_latents"], encoded.cond["ref"])
        cond["ref"] = golden["ref_latents"]
    cond = losses.blank(cond, keep, {})
    seen: list[Tensor] = []
    family.denoise(stand_in(seen), golden["noisy_latents"], golden["timesteps"], cond)
    golden.compare("control_latents", seen[0])

    objective, x0, noise = family.objective, golden["latents"], golden["noise"]
    level_B = levels_at(objective, golden["timestep_indices"])
    if "sigmas" in golden:
        golden.compare("sigmas", level_B.reshape(golden["sigmas"].shape), SCHEDULE)
        objective = replace(objective, weighting_scheme=said["weighting_scheme"])
        weight = objective.weight(level_B).reshape(golden["weighting"].shape)
        golden.compare("weighting", weight, LOSS, "relative")
    golden.compare("timesteps", objective.timestep(level_B), LOSS, "relative")
    golden.compare("noisy_latents", objective.corrupt(x0, noise, level_B))
    golden.compare("target", objective.target(x0, noise, level_B))
    error = losses.error_at(family.denoise, parts.net, objective, x0, cond, noise, level_B)
    golden.compare("noise_pred", error + golden["target"], *prediction_bound(golden))
    counted = torch.where(error.abs() > OUTLIER, 0, error)
    value = (losses.mean_square(counted) * objective.weight(level_B)).mean()
    if said["motion_sub_loss"] == "True" and x0.shape[2] > 2:
        value = value * (1 - MSL) + losses.mean_square(error.diff(dim=2)).mean() * MSL
    gradients(golden, "", parts, family, value)


def prediction_bound(golden: Golden) -> tuple[float, str]:
    """Absolute; relative where the answers were multiplied."""
    return (NORM, "relative" if "proj_out_multiplier" in golden else "absolute")


def levels_at(objective: Objective, indices: Tensor) -> Tensor:
    """The reference counts flow's from the noise, the others' from the picture."""
    return objective.levels[indices] if isinstance(objective, Flow) else objective.levels.flip(0)[indices]


def kept(golden: Golden, family: Family, count: int) -> dict[str, Tensor]:
    """The recorded coins (1 drops), by condition in the order in which they were drawn."""
    coins = golden["zero_flags"].reshape(-1, count) == 0
    return dict(zip([name for name in ("control", "ref") if name in family.drop], coins, strict=True))


def shrunk(family: Family, parts: Parts, channels: int, mode: str) -> tuple[Family, Parts]:
    """The variant for fewer conditioning channels, as the reference's: the first channels of the same weights."""
    wanted = channels + family.geometry.channels
    net: Any = copy.deepcopy(parts.net)
    if net.config.in_channels == wanted:
        return family, parts
    config = parts.config | {"in_channels": wanted}
    net.proj.weight = nn.Parameter(net.proj.weight[:, :wanted].detach().clone())
    found = easyanimate.variant(config, mode)
    assert found.modes == (mode,)
    return replace(found, objective=family.objective), replace(parts, net=net, config=config)


def scaled(net: Any, factor: Tensor) -> nn.Module:
    net = copy.deepcopy(net)
    with torch.no_grad():
        net.proj_out.weight *= factor
        net.proj_out.bias *= factor
    return net


def stand_in(seen: list[Tensor]):
    """A network that only notes its conditioning channels."""

    def net(hidden_states: Tensor, control_latents: Tensor, **_) -> tuple[Tensor]:
        seen.append(control_latents)
        return (hidden_states,)

    return net
