"""Wan2.1 and Wan2.2 against the reference's own numbers; part of `python -m benchmarks.parity`."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import parity_wan
from benchmarks.golden import LOSS, MSL, SCHEDULE, Golden, Row, gradients
from benchmarks.parity_wan import MODES, as_stored, batch_in, compare_captions, drawn, padded
from reeltune import families
from reeltune.core.types import Encoded, Posterior, Shape
from reeltune.diffusion import loss as losses
from reeltune.diffusion.objective import Flow
from reeltune.families.spec import Family, Parts
from reeltune.families.wan_fun import conditions as wan

EXPERTS = {"high_noise_model": "high", "low_noise_model": "low"}  # the reference's name: ours


@cache
def yaml_of(case: Path, checkpoint: str) -> Path:
    """The model yaml of a set; of several that with which the checkpoint is trained."""
    found = sorted(case.glob("*.yaml"))
    kind = "t2v" if checkpoint == "t2v" else "i2v"
    return next((path for path in found if f"_{kind}_" in path.name), found[0])


@cache
def loaded(case: Path, checkpoint: str, expert: str) -> tuple[Family, Parts]:
    """In float32. expert: the reference's name, or None as text."""
    path = case / "checkpoints" / checkpoint
    family = families.find(path, config_path=yaml_of(case, checkpoint))
    if expert in EXPERTS:
        family = family.experts[EXPERTS[expert]]
    return family, family.load(path, frozen_dtype=torch.float32)


def case_of(path: Path) -> Path:
    return next(one for one in path.parents if one.name == "golden").parent


# ---- one function per golden file


def vae(golden: Golden) -> None:
    case = case_of(golden.path)
    checkpoint = next(path.name for path in sorted((case / "checkpoints").iterdir()))
    parity_wan.vae_of(golden, loaded(case, checkpoint, "None")[1])


def scheduler(golden: Golden) -> None:
    case = case_of(golden.path)
    path = next(iter(sorted((case / "checkpoints").iterdir())))
    for stem in golden.cases(".sigmas"):
        family = families.find(path, config_path=case / f"{stem}.yaml")
        flow = family.objective
        assert isinstance(flow, Flow)
        golden.compare(f"{stem}.sigmas", flow.levels, SCHEDULE)
        golden.compare(f"{stem}.timesteps", flow.timestep(flow.levels), LOSS, "relative")
        if f"{stem}.boundary_index" in golden:
            golden.exact(f"{stem}.boundary_index", torch.tensor(nearest(flow, boundary_of(family))))


def boundary_of(family: Family) -> float:
    assert family.boundary is not None
    return family.boundary


def nearest(flow: Flow, boundary: float) -> int:
    """Where the reference parts its experts: the index of the timestep nearest to the boundary. Ours is that, or one
    more where that timestep is at or above it and sampled by the high one."""
    timesteps = flow.timestep(flow.levels)
    index = int((timesteps - boundary * flow.steps).abs().argmin())
    high, low = flow.parted(boundary)
    assert high.indices.stop == low.indices.start == index + int(timesteps[index] >= boundary * flow.steps)
    return index


def transformer(golden: Golden) -> None:
    family, parts = loaded(case_of(golden.path), golden.metadata["variant"], golden.metadata["expert"])
    for case in golden.cases(".x"):
        y, camera = golden.get(f"{case}.y"), golden.get(f"{case}.y_camera_f16")
        joined = golden[f"{case}.x"] if y is None else torch.cat([golden[f"{case}.x"], y], dim=1)
        captions = padded(golden.numbered(f"{case}.text."), wan.TEXT_LENGTH)
        seen, ref = golden.get(f"{case}.clip_fea"), golden.get(f"{case}.full_ref")
        camera = None if camera is None else camera.float()
        for of, times in ((case, "t"), (f"{case}.tokens", "t_tokens"), (f"{case}.random_tokens", "t_random_tokens")):
            if f"{of}.out" not in golden:
                continue
            always = joined, golden[f"{case}.{times}"], captions
            out = parts.net(*always, seen, ref, camera)
            golden.compare(f"{of}.out", out)
            fewer = {
                "out_noref": (seen,),
                "out_nocamera": (seen, ref),
                "out_zero_clip": (None if seen is None else torch.zeros_like(seen), ref, camera),
            }
            for name, given in fewer.items():
                if f"{of}.{name}" in golden:
                    with torch.no_grad():
                        golden.compare(f"{of}.{name}", parts.net(*always, *given))
            if f"{of}.loss" in golden:
                gradients(golden, f"{of}.", parts, family, (out - golden[f"{case}.probe"]).square().mean())


def train_step(golden: Golden) -> None:
    """First what the frozen networks make of the clips, then the step from the stored latents, noise and indices."""
    told = golden.metadata
    family, parts = loaded(case_of(golden.path), told["variant"], told["expert"])
    mode = MODES.get(told["train_mode"], told["train_mode"])
    full_ref = told["add_full_ref_image_in_self_attention"] == "True"
    count, frames, _, height, width = golden["pixel_u8"].shape
    camera = golden.get("control_camera_values_f16")
    batch = batch_in(golden, kept(golden, mode, count, full_ref), None if camera is None else camera.float())
    encoded = family.encode(parts, batch, mode, options={"add_full_ref_image_in_self_attention": full_ref})
    compare_captions(golden, parts, batch, encoded)
    golden.compare("latents", drawn(encoded.x0, golden["eps_latents"]))
    cond = settled(golden, encoded, parts)
    compare_conditions(golden, cond, batch)
    golden.exact("seq_len", torch.tensor(family.geometry.tokens(Shape(frames, height, width))))

    x0, noise = golden["latents"], golden["noise"]
    flow = family.objective
    assert isinstance(flow, Flow)
    whole = replace(flow, first=0, end=None)
    level_B = whole.levels[golden["indices"]]
    assert all(index in flow.indices for index in golden["indices"].tolist())
    compare_range(golden, family)
    golden.compare("sigmas", level_B, SCHEDULE)
    golden.compare("timesteps", flow.timestep(level_B), LOSS, "relative")
    golden.exact("target", flow.target(x0, noise, level_B))
    given: list[Tensor] = []
    stored = as_stored(golden, cond, parts)

    def asked(*tensors: Tensor) -> Tensor:  # stands for the network
        given.extend(tensors[:2])
        return parts.net(*tensors)

    def denoise(_, *rest):
        return family.denoise(asked, *rest)  # type: ignore[arg-type]

    error = losses.error_at(denoise, parts.net, flow, x0, stored, noise, level_B)
    joined, times = given
    golden.compare("noisy_latents", joined[:, : x0.shape[1]])
    if "y" in golden:
        with torch.no_grad():
            family.denoise(lambda *tensors: given.extend(tensors[:2]), x0, flow.timestep(level_B), cond)  # type: ignore
        golden.compare("y", given[2][:, x0.shape[1] :])
    golden.compare("model_t", times if times.ndim == golden["model_t"].ndim else rows(times, golden), LOSS, "relative")
    golden.compare("noise_pred", error + golden["target"])
    value = losses.mean_square(error).mean()
    if told["motion_sub_loss"] == "True" and x0.shape[2] > 2:
        value = value * (1 - MSL) + losses.mean_square(error.diff(dim=2)).mean() * MSL
    gradients(golden, "", parts, family, value)


def rows(times_B: Tensor, golden: Golden) -> Tensor:
    """One time of each clip for each of its tokens."""
    return times_B[:, None].expand_as(golden["model_t"])


def compare_conditions(golden: Golden, cond: dict[str, Tensor], batch) -> None:
    if "clip_image_u8" in golden:
        seen_u8 = wan.cut_to_8_bit(wan.frames_at(batch.pixels_BFCHW, batch.ref_frame_B))
        golden.exact("clip_image_u8", seen_u8.permute(0, 2, 3, 1))
    if "clip_fea" in golden:
        golden.compare("clip_fea", cond["image"])
    if "full_ref" in golden:
        golden.compare("full_ref", cond["full_ref"][:, :, 0])
    if "y_camera_f16" in golden:
        golden.exact("y_camera_f16", cond["camera"])
    if "mask_conditions" in golden:
        golden.exact("mask_conditions", to_make(golden, batch.mask_BFHW))


def to_make(golden: Golden, mask_BFHW: Tensor) -> Tensor:
    """What is mixed by, as the reference has it: in Fun's scripts all of what follows the first frame."""
    found = wan.to_make(mask_BFHW, golden["mask_conditions"].shape[-2:])
    if golden.metadata["train_mode"] != "ti2v":
        found[:, :, 1:] = 1
    return found


def compare_range(golden: Golden, family: Family) -> None:
    flow = family.objective
    assert isinstance(flow, Flow)
    start, stop = 0, flow.steps
    if family.expert is not None:
        index = nearest(replace(flow, first=0, end=None), boundary_of(family))
        start, stop = (0, index) if family.expert == "high" else (index, stop)
    golden.exact("index_range", torch.tensor([start, stop]))


def kept(golden: Golden, mode: str, count: int, full_ref: bool) -> dict[str, Tensor]:
    """The recorded coins (1 drops), in the order in which they were drawn, as keep_B by condition."""
    coins = iter(ast.literal_eval(golden.metadata["rng_draws"]))
    keep: dict[str, list[bool]] = {}
    if mode == "ti2v":
        *_, put_in = coins  # one for the batch, drawn last
        keep["first_frame"] = [put_in == 1] * count
    if mode == "control_ref":
        keep["control"] = [not next(coins) for _ in range(count)]
    if mode in ("control_ref", "control_ref_camera"):
        for _ in range(count):
            for name in ("ref", *(["full_ref"] if full_ref else [])):
                keep.setdefault(name, []).append(not next(coins))
    if "t2v_flag" in golden:
        keep["inpaint"] = golden["t2v_flag"].bool().tolist()
    return {name: torch.tensor(flags) for name, flags in keep.items()}


def settled(golden: Golden, encoded: Encoded, parts: Parts) -> dict[str, Tensor]:
    """`encoded`'s conditions, drawn with the recorded noise and dropped by the recorded coins.

    The reference puts a known frame into none of a batch of which one sample lacks it; ours into each that has it.
    """
    eps = {
        **{"control": "eps_control", "full_ref": "eps_ref"},
        **{"inpaint": "eps_mask_latents", "first_frame": "eps_mask_latents"},
    }
    cond = {}
    for name, value in encoded.cond.items():
        if isinstance(value, Posterior):
            noise = golden[eps[name]]
            known = value.mean.shape[1] - noise.shape[1]  # mask channels are not drawn
            value = drawn(value, torch.cat([torch.zeros_like(value.mean[:, :known]), noise], 1))
        cond[name] = value
    if "first_frame_latents" in golden:
        golden.compare("first_frame_latents", cond["first_frame"][:, 1:])
    if "known" in cond and not cond["known"].flatten(1).any(1).all():
        cond["known"] = torch.zeros_like(cond["known"])
    return losses.blank(cond, encoded.keep, parts.null)


FILES: dict[str, Callable[[Golden], None]] = {
    "vae": vae,
    "scheduler": scheduler,
    "transformer": transformer,
    "train_step": train_step,
}


def golden_files(goldens: Path) -> list[Path]:
    return sorted((goldens / "wan22").glob("*/golden/**/*.safetensors"))


def kind_of(path: Path) -> str:
    """Which of FILES it is: its name says that, or its folder's."""
    return path.stem if path.stem in FILES else path.parent.name


def measure(path: Path) -> list[Row]:
    """All rows of one golden file."""
    golden = Golden(path)
    FILES[kind_of(path)](golden)
    return [row._replace(file=f"{case_of(path).name}/{row.file.removeprefix('golden/')}") for row in golden.rows]
