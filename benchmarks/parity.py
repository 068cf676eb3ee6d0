"""Our families against the reference's own numbers: `python -m benchmarks.parity [--goldens DIR] [--write FILE]`.

Every tensor of every golden file is recomputed in float32 on the CPU. Names, sizes and shapes come from the files.
Exits with 1 if any error is above its bound.
"""

from __future__ import annotations

import argparse
import ast
import platform
import re
import sys
from collections.abc import Callable
from datetime import date
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from reeltune import families
from reeltune.core.types import Batch, Encoded, Posterior, Shape
from reeltune.data import camera
from reeltune.diffusion import loss as losses
from reeltune.families import text as captions_to
from reeltune.families.spec import Family, Parts
from reeltune.families.wan_fun import family as wan
from tests.conftest import GOLDENS

PREDICTION, LOSS, NORM = 5e-5, 1e-5, 5e-5  # absolute; relative; relative
SCHEDULE = 1e-6  # absolute: a few float32 roundings
OTHERS = (
    "benchmarks.parity_hunyuan",
    "benchmarks.parity_easyanimate",
    "benchmarks.parity_cogvideox",
)  # each with golden_files(goldens) and measure(path); Wan2.1-Fun's are here
MODES = {"control_camera_ref": "control_ref_camera"}  # the reference's name: ours


class Row(NamedTuple):
    file: str
    tensor: str
    absolute: float  # largest difference
    relative: float  # over the largest value of the reference
    bound: float
    kind: str  # which of the two the bound is on

    @property
    def ok(self) -> bool:
        return (self.absolute if self.kind == "absolute" else self.relative) <= self.bound


class Golden:
    """One file's tensors; collects a Row for each that is compared."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata() or {}
        self.path, self.rows = path, []

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def cases(self, suffix: str) -> list[str]:
        """What stands before `suffix` in the names that end with it."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def numbered(self, prefix: str) -> list[Tensor]:
        return [self[f"{prefix}{i}"] for i in range(len([name for name in self.tensors if name.startswith(prefix)]))]

    def compare(self, name: str, ours: Tensor, bound: float = PREDICTION, kind: str = "absolute") -> None:
        theirs = self[name]
        if ours.shape != theirs.shape:
            raise AssertionError(f"{self.path.name} {name}: ours is {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
        difference = (ours.detach().double() - theirs.double()).abs().max().item()
        relative = difference / max(theirs.double().abs().max().item(), 1e-30)
        self.rows.append(Row(f"{self.path.parent.name}/{self.path.name}", name, difference, relative, bound, kind))

    def exact(self, name: str, ours: Tensor) -> None:
        self.compare(name, ours, bound=0.0)


class Checkpoints:
    """The tiny checkpoints beside the golden files, loaded in float32."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = next(iter(sorted(folder.glob("*.yaml"))), None)

    @cache  # noqa: B019
    def load(self, name: str) -> tuple[Family, Parts]:
        path = self.folder / "checkpoints" / name
        family = families.find(path, config_path=self.settings)
        return family, family.load(path, frozen_dtype=torch.float32)

    def any(self, with_image: bool = False) -> tuple[Family, Parts]:
        """One checkpoint; the frozen networks are the same in all."""
        for path in sorted((self.folder / "checkpoints").iterdir()):
            if path.is_dir() and (not with_image or "image" in self.load(path.name)[1].frozen):
                return self.load(path.name)
        raise FileNotFoundError(f"no checkpoint in {self.folder}")


def batch_of(pixels_u8: Tensor, **more: Any) -> Batch:
    empty = {"draws": [], "text": [], "ref_frame_B": torch.zeros(len(pixels_u8), dtype=torch.int64), "keep": {}}
    return Batch(**{"pixels_BFCHW": pixels_u8, **empty, **more}).to("cpu")


def padded(rows: list[Tensor], length: int) -> Tensor:
    return torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])


def drawn(found: Posterior, eps: Tensor) -> Tensor:
    return found.mean + (found.logvar / 2).exp() * eps


def gradients(golden: Golden, case: str, parts: Parts, family: Family, value: Tensor) -> None:
    """Backward of `value`; compares it, the norm over all gradients, and the stored ones by their released names."""
    golden.compare(f"{case}loss", value, LOSS, "relative")
    parts.net.zero_grad()
    value.backward()
    by_name = {name: p.grad for name, p in family.to_released(dict(parts.net.named_parameters()), parts.config).items()}
    if f"{case}grad_norm" in golden:
        norm = torch.stack([grad.norm() for grad in by_name.values() if grad is not None]).norm()
        golden.compare(f"{case}grad_norm", norm, NORM, "relative")
    for name in golden.tensors:
        if name.startswith(f"{case}grad."):
            golden.compare(name, by_name[name.removeprefix(f"{case}grad.")], NORM, "relative")


# ---- one function per golden file


def vae(golden: Golden, checkpoints: Checkpoints) -> None:
    _, parts = checkpoints.any()
    net = parts.frozen["vae"]
    mean, std = (torch.tensor(values) for values in (net.config.latents_mean, net.config.latents_std))
    golden.exact("latents_mean", mean)
    golden.exact("latents_std", std)
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
    for case in golden.cases("image_u8"):
        image_u8 = golden[f"{case}image_u8"][None]
        seen = wan.clip_pixels(image_u8, parts.frozen["image"].config.image_size)
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
    batch = batch_of(
        golden["pixel_u8"],
        text=[golden.metadata[f"prompt.{i}"] for i in range(count)],
        ref_frame_B=golden["clip_idx"] if "clip_idx" in golden else torch.zeros(count, dtype=torch.int64),
        keep=kept(golden, mode, count, full_ref),
        control_BFCHW=golden.get("control_pixel_u8"),
        camera_BFCHW=golden.get("control_camera_values"),
        mask_BFHW=golden["mask"][:, :, 0].bool() if "mask" in golden else None,
    )
    encoded = family.encode(parts, batch, mode, options={"add_full_ref_image_in_self_attention": full_ref})
    tokenizer, length = parts.extras["tokenizer"], golden["input_ids"].shape[1]
    tokens = tokenizer(batch.text, padding="max_length", max_length=length, return_tensors="pt")
    golden.exact("input_ids", tokens.input_ids)
    golden.exact("attention_mask", tokens.attention_mask)
    for i in range(count):
        golden.compare(f"prompt_embeds.{i}", encoded.cond["text"][i, : len(golden[f"prompt_embeds.{i}"])])
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
        value = value * 0.75 + losses.mean_square(error.diff(dim=2)).mean() * 0.25
    gradients(golden, "", parts, family, value)


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
    "vae.safetensors": vae,
    "text_encoder.safetensors": text_encoder,
    "clip.safetensors": clip,
    "camera.safetensors": camera_rays,
    "scheduler.safetensors": scheduler,
    "transformer": transformer,
    "train_step": train_step,
}


def golden_files(goldens: Path) -> list[Path]:
    return sorted((goldens / "wan_fun" / "golden").rglob("*.safetensors"))


def measure(path: Path, checkpoints: Checkpoints) -> list[Row]:
    """All rows of one golden file."""
    golden = Golden(path)
    (FILES.get(path.name) or FILES[path.parent.name])(golden, checkpoints)
    return golden.rows


# ---- the table


def table(rows: list[Row]) -> str:
    """Markdown; cases of one tensor (other shapes, prompts, frame counts) are one line, with the worst of them."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        tensor = re.sub(r"^([A-Za-z]\d*|\d+)\.|\.\d+$", "", row.tensor)
        key = row.file, tensor
        if key not in worst or row.absolute > worst[key].absolute:
            worst[key] = row._replace(tensor=tensor)
    same = [row for row in worst.values() if row.ok and row.absolute == 0]
    lines = [
        "# Parity with the original tools",
        "",
        "Largest differences from the numbers of the original tools (VideoX-Fun 804a425) on tiny random checkpoints,",
        "float32 on the CPU. Relative: over the largest value of the original's tensor.",
        f"Written by `make parity` on {date.today()}: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
        + ".",
        "",
        "| file | tensor | absolute | relative | bound | |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.file} | {row.tensor} | {row.absolute:.1e} | {row.relative:.1e} | {row.bound:g} {row.kind} "
        f"| {'' if row.ok else 'ABOVE'} |"
        for row in worst.values()
        if row not in same
    ]
    lines += ["", "Equal to the bit:", ""]
    for file in dict.fromkeys(row.file for row in same):
        lines.append(f"- {file}: {', '.join(row.tensor for row in same if row.file == file)}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--goldens", type=Path, default=GOLDENS, help="folder of golden files")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    arguments = parser.parse_args(argv)
    checkpoints = Checkpoints(arguments.goldens / "wan_fun")
    rows = [row for path in golden_files(arguments.goldens) for row in measure(path, checkpoints)]
    for other in map(import_module, OTHERS):
        rows += [row for path in other.golden_files(arguments.goldens) for row in other.measure(path)]
    text = table(rows)
    print(text)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(text)
    above = [row for row in rows if not row.ok]
    print(f"{len(rows)} tensors compared, {len(above)} above their bound")
    return 1 if above or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
