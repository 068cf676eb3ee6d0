"""Wan2.1-Fun against the reference's own numbers; part of `python -m benchmarks.parity`."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.golden import LOSS, MSL, PLACE, SCHEDULE, Golden, Row, batch_of, gradients, on_device
from reeltune import families
from reeltune.core.types import Batch, Encoded, Posterior, Shape
from reeltune.data import camera
from reeltune.diffusion import loss as losses
from reeltune.families import text as captions_to
from reeltune.families.spec import Family, Parts
from reeltune.families.wan_fun import conditions as wan

MODES = {"control_camera_ref": "control_ref_camera"}  # the reference's name: ours


class Checkpoints:
    """The tiny checkpoints beside the golden files, loaded in float32 where numbers are computed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = next(iter(sorted(folder.glob("*.yaml"))), None)

    def load(self, name: str) -> tuple[Family, Parts]:
        return self._load(name, PLACE.get())

    @cache  # noqa: B019
    def _load(self, name: str, device: torch.device) -> tuple[Family, Parts]:
        path = self.folder / "checkpoints" / name
        family = families.find(path, config_path=self.settings)
        return family, on_device(family.load(path, frozen_dtype=torch.float32, device=device))

    def any(self, with_image: bool = False) -> tuple[Family, Parts]:
        """One checkpoint; the frozen networks are the same in all."""
        for path in sorted((self.folder / "checkpoints").iterdir()):
            if path.is_dir() and (not with_image or "image" in self.load(path.name)[1].frozen):
                return self.load(path.name)
        raise FileNotFoundError(f"no checkpoint in {self.folder}")


@cache
def beside(golden: Path) -> Checkpoints:
    return Checkpoints(golden.parent)


def padded(rows: list[Tensor], length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])


def drawn(found: Posterior, eps: Tensor) -> Tensor:
    return found.mean + (found.logvar / 2).exp() * eps


# ---- one function per golden file


def vae(golden: Golden, checkpoints: Checkpoints) -> None:
    vae_of(golden, checkpoints.any()[1])


def vae_of(golden: Golden, parts: Parts) -> None:
    net: Any = parts.frozen["vae"]
    mean, std = (torch.tensor(values) for values in (net.config.latents_mean, net.config.latents_std))
    golden.exact("latents_mean", mean)
    golden.compare("latents_std", std, SCHEDULE)  # the reference has 1 / (1 / std) in places
    for case in golden.cases("pixels_u8"):
        with torch.no_grad():
            found = wan.encode_clip(net, batch_of(golden[f"{case}pixels_u8"]).pixels_BFCHW)
        golden.compare(f"{case}mean_norm", found.mean)
        if f"{case}eps" in golden:
            column = (slice(None), None, None, None)
            golden.compare(f"{case}mean_raw", found.mean * std[column] + mean[column])
            golden.compare(f"{case}logvar", found.logvar)
            golden.compare(f"{case}sample_norm", drawn(found, golden[f"{case}eps"]))
        for name in ("z", "mean_norm"):
            if f"{case}decode_of_{name}" in golden:
                pixels_BFCHW = wan.decode(parts, golden[f"{case}{name}"])
                golden.compare(f"{case}decode_of_{name}", pixels_BFCHW.transpose(1, 2))


def text_encoder(golden: Golden, checkpoints: Checkpoints) -> None:
    _, parts = checkpoints.any()
    encoder, tokenizer = parts.frozen["text"], parts.extras["tokenizer"]
    for case in golden.cases("input_ids"):
        ids, mask = golden[f"{case}input_ids"], golden[f"{case}attention_mask"]
        captions = [golden.metadata.get(f"prompt.{i}", "") for i in range(len(ids))]
        tokens = tokenizer(captions, padding="max_length", max_length=ids.shape[1], return_tensors="pt")
        golden.exact(f"{case}input_ids", tokens.input_ids)
        golden.exact(f"{case}attention_mask", tokens.attention_mask)
        with torch.no_grad():
            hidden = golden[f"{case}hidden"]
            golden.compare(f"{case}hidden", encoder(ids, attention_mask=mask)[0][:, : hidden.shape[1]])
            if f"{case}hidden_without_mask" in golden:
                golden.compare(f"{case}hidden_without_mask", encoder(ids)[0])
            ours = captions_to.embed(tokenizer, encoder, captions, ids.shape[1])
        for i, count in enumerate(mask.sum(1).tolist()):
            golden.compare(f"{case}prompt_embeds.{i}", ours[i, :count])


def clip(golden: Golden, checkpoints: Checkpoints) -> None:
    _, parts = checkpoints.any(with_image=True)
    encoder: Any = parts.frozen["image"]
    for case in golden.cases("image_u8"):
        image_u8 = golden[f"{case}image_u8"][None]
        seen = wan.clip_pixels(image_u8, encoder.config.image_size)
        corner = golden[f"{case}pixel_values_corner"]
        golden.compare(f"{case}pixel_values_corner", seen[..., : corner.shape[-2], : corner.shape[-1]])
        golden.compare(f"{case}pixel_values_mean", seen.mean((2, 3)))
        with torch.no_grad():
            golden.compare(f"{case}features", wan.image_features(parts, image_u8))


def camera_rays(golden: Golden, checkpoints: Checkpoints) -> None:
    for name in golden.tensors:
        kind, _, size = name.partition(".plucker_")
        if size[:1].isdigit():
            height, width = map(int, size.split("x"))
            poses = camera.read_poses(golden.path.parent / f"pose_{kind}.txt")
            golden.compare(name, torch.tensor(camera.rays(poses, height, width))[golden[f"{kind}.frame_index"]])
    rows = golden["dataset.rows"].double().numpy()
    rows = camera.resample(rows, int(golden["dataset.video_length"]), golden["dataset.batch_index"].tolist())
    golden.compare("dataset.rows_selected", torch.tensor(rows))
    rays_FCHW = torch.tensor(camera.rays(rows, *golden["dataset.plucker"].shape[-2:])).permute(0, 3, 1, 2)
    golden.compare("dataset.plucker", rays_FCHW)
    golden.compare("dataset.packed24", wan.pack_frames(rays_FCHW[None]))
    golden.exact("pack.out", wan.pack_frames(golden["pack.in"]))
    three = "three_frames.plucker_per_ray_cross"  # plucker_as_reference crosses along frames: a fault we do not share
    rows = golden["three_frames.rows"].double().numpy()
    golden.compare(three, torch.tensor(camera.rays(rows, *golden[three].shape[1:3])))


def scheduler(golden: Golden, checkpoints: Checkpoints) -> None:
    objective = checkpoints.any()[0].objective
    golden.compare("sigmas", objective.levels, SCHEDULE)
    golden.compare("timesteps", objective.timestep(objective.levels), LOSS, "relative")


def transformer(golden: Golden, checkpoints: Checkpoints) -> None:
    family, parts = checkpoints.load(golden.path.stem)
    for case in golden.cases(".x"):
        joined = torch.cat([golden[f"{case}.x"], golden[f"{case}.y"]], dim=1)
        captions = padded(golden.numbered(f"{case}.text."), wan.TEXT_LENGTH)
        always = joined, golden[f"{case}.t"], captions, golden.get(f"{case}.clip_fea")
        out = parts.net(*always, golden.get(f"{case}.full_ref"), golden.get(f"{case}.y_camera"))
        golden.compare(f"{case}.out", out)
        for name in (f"{case}.out_noref", f"{case}.out_nocam"):
            if name in golden:
                with torch.no_grad():
                    golden.compare(name, parts.net(*always))
        gradients(golden, f"{case}.", parts, family, (out - golden[f"{case}.probe"]).square().mean())


def train_step(golden: Golden, checkpoints: Checkpoints) -> None:
    """First what the frozen networks make of the clips, then the step from the stored latents, noise and indices."""
    family, parts = checkpoints.load(golden.metadata["variant"])
    mode = MODES.get(golden.metadata["train_mode"], golden.metadata["train_mode"])
    full_ref = golden.metadata["add_full_ref_image_in_self_attention"] == "True"
    count, frames, _, height, width = golden["pixel_u8"].shape
    batch = batch_in(golden, kept(golden, mode, count, full_ref), golden.get("control_camera_values"))
    encoded = family.encode(parts, batch, mode, options={"add_full_ref_image_in_self_attention": full_ref})
    compare_captions(golden, parts, batch, encoded)
    if "clip_image_u8" in golden:
        seen_u8 = wan.cut_to_8_bit(wan.frames_at(batch.pixels_BFCHW, batch.ref_frame_B))
        golden.exact("clip_image_u8", seen_u8.permute(0, 2, 3, 1))
    golden.compare("latents", drawn(encoded.x0, golden["eps_latents"]))
    cond = settled(golden, encoded, parts)
    if "clip_fea" in golden:
        golden.compare("clip_fea", cond["image"])
    if "full_ref" in golden:
        golden.compare("full_ref", cond["full_ref"][:, :, 0])
    golden.exact("seq_len", torch.tensor(family.geometry.tokens(Shape(frames, height, width))))

    flow, x0, noise = family.objective, golden["latents"], golden["noise"]
    level_B = flow.levels[golden["indices"]]
    golden.compare("sigmas", level_B, SCHEDULE)
    golden.compare("timesteps", flow.timestep(level_B), LOSS, "relative")
    golden.compare("noisy_latents", flow.corrupt(x0, noise, level_B))
    golden.exact("target", flow.target(x0, noise, level_B))
    joined: list[Tensor] = []
    family.denoise(lambda channels, *_: joined.append(channels), x0, level_B, cond)  # a stand-in for the network
    golden.compare("y", joined[0][:, x0.shape[1] :])
    error = losses.error_at(family.denoise, parts.net, flow, x0, as_stored(golden, cond, parts), noise, level_B)
    golden.compare("noise_pred", error + golden["target"])
    value = losses.mean_square(error).mean()
    if golden.metadata["motion_sub_loss"] == "True" and x0.shape[2] > 2:
        value = value * (1 - MSL) + losses.mean_square(error.diff(dim=2)).mean() * MSL
    gradients(golden, "", parts, family, value)


def batch_in(golden: Golden, keep: dict[str, Tensor], camera_BFCHW: Tensor | None = None) -> Batch:
    """What a train step's file was made of. keep: as `kept`."""
    count = len(golden["pixel_u8"])
    return batch_of(
        golden["pixel_u8"],
        text=[golden.metadata[f"prompt.{i}"] for i in range(count)],
        ref_frame_B=golden["clip_idx"] if "clip_idx" in golden else torch.zeros(count, dtype=torch.int64),
        keep=keep,
        control_BFCHW=golden.get("control_pixel_u8"),
        camera_BFCHW=camera_BFCHW,
        mask_BFHW=golden["mask"][:, :, 0].bool() if "mask" in golden else None,
    )


def compare_captions(golden: Golden, parts: Parts, batch: Batch, encoded: Encoded) -> None:
    """Their tokens, and what the text encoder made of them."""
    tokenizer, length = parts.extras["tokenizer"], golden["input_ids"].shape[1]
    tokens = tokenizer(batch.text, padding="max_length", max_length=length, return_tensors="pt")
    golden.exact("input_ids", tokens.input_ids)
    golden.exact("attention_mask", tokens.attention_mask)
    for i in range(len(batch.text)):
        golden.compare(f"prompt_embeds.{i}", encoded.cond["text"][i, : len(golden[f"prompt_embeds.{i}"])])


def kept(golden: Golden, mode: str, count: int, full_ref: bool) -> dict[str, Tensor]:
    """The recorded coins (1 drops), in the order in which they were drawn, as keep_B by condition."""
    coins = iter(ast.literal_eval(golden.metadata["rng_draws"]))
    keep: dict[str, list[bool]] = {}

    def draw(*names: str) -> None:
        for _ in range(count):
            for name in names:
                keep.setdefault(name, []).append(not next(coins))

    if mode in ("control", "control_ref"):
        draw("control")
    if mode in ("control_ref", "control_ref_camera"):
        draw("ref", *(["full_ref"] if full_ref else []))
    if mode != "control":
        draw("image")
    if "t2v_flag" in golden:
        keep["inpaint"] = golden["t2v_flag"].bool().tolist()
    return {name: torch.tensor(flags) for name, flags in keep.items()}


def settled(golden: Golden, encoded: Encoded, parts: Parts) -> dict[str, Tensor]:
    """`encoded`'s conditions, drawn with the recorded noise and dropped by the recorded coins."""
    eps = {"control": "eps_control", "ref": "eps_ref", "full_ref": "eps_ref", "inpaint": "eps_mask_latents"}
    cond = {}
    for name, value in encoded.cond.items():
        if isinstance(value, Posterior):
            noise = golden[eps[name]]
            known = value.mean.shape[1] - noise.shape[1]  # mask channels are not drawn
            value = drawn(value, F.pad(noise, (0, 0, 0, 0, 0, 0, known, 0)))
        cond[name] = value
    return losses.blank(cond, encoded.keep, parts.null)


def as_stored(golden: Golden, cond: dict[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """The same conditions, from the file's own tensors wherever it has them."""
    out = dict(cond, text=padded(golden.numbered("prompt_embeds."), wan.TEXT_LENGTH))
    at = 0
    for name in ("control", "inpaint", "ref"):
        if name in cond:
            channels, frames = cond[name].shape[1:3]
            out[name] = golden["y"][:, at : at + channels, :frames]
            at += channels
    if "clip_fea" in golden:
        out["image"] = golden["clip_fea"]
    if "full_ref" in golden:
        out["full_ref"] = golden["full_ref"][:, :, None]
    return out


FILES: dict[str, Callable[[Golden, Checkpoints], None]] = {
    "vae": vae,
    "text_encoder": text_encoder,
    "clip": clip,
    "camera": camera_rays,
    "scheduler": scheduler,
    "transformer": transformer,
    "train_step": train_step,
}


def golden_files(goldens: Path) -> list[Path]:
    return sorted((goldens / "wan_fun" / "golden").rglob("*.safetensors"))


def kind_of(path: Path) -> str:
    """Which of FILES it is: its name says that, or its folder's."""
    return path.stem if path.stem in FILES else path.parent.name


def measure(path: Path) -> list[Row]:
    """All rows of one golden file."""
    golden = Golden(path)
    FILES[kind_of(path)](golden, beside(next(one for one in path.parents if one.name == "golden")))
    return golden.rows
