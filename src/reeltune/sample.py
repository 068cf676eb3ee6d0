"""Noise -> clip, through the very functions that train."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reeltune.data.camera import CameraError, rays, read_poses, resample
from reeltune.data.held_out import fixed_draw
from reeltune.data.loader import Reader, collate, joined
from reeltune.data.media import MediaError, measure, write_clip
from reeltune.data.plan import Plan
from reeltune.data.shapes import SizeRules
from reeltune.diffusion import denoise
from reeltune.diffusion.loss import Cond, settle
from reeltune.diffusion.objective import Objective
from reeltune.engine import Engine
from reeltune.errors import UserError, refuse
from reeltune.families.spec import Family, Parts
from reeltune.inputs import choose_family, encode_options, load_parts, size_rules
from reeltune.recipe import Recipe
from reeltune.types import Batch, Described, Draw, Encoded, Kind, Record, Sample

CAPTIONS = 128  # remembered: at most 1.1 GB, at 512 x 4096 floats each


@dataclass(frozen=True)
class Setup:
    """All that a network is trained with, beside its weights."""

    family: Family
    mode: str
    parts: Parts
    objective: Objective
    autocast: Callable[[], AbstractContextManager] = nullcontext
    options: dict[str, Any] = field(default_factory=dict)

    def encode(self, batch: Batch) -> Encoded:
        """Sample by sample, because networks give other last bits in other batches; or as it came from the cache."""
        batch = batch.to(self.parts.device)
        encoded = batch.encoded or joined([self._encode_one(one) for one in batch.singles()])
        if "text" in encoded.keep:
            encoded.keep = encoded.keep | dict.fromkeys(self.family.caption, encoded.keep["text"])
        return encoded

    def _encode_one(self, batch: Batch) -> Encoded:
        described = None
        if not self.family.caption_sees_picture:
            known = self._describe(batch.text[0])
            described = Described({name: value.to(self.parts.device) for name, value in known.items()})
        return self.family.encode(self.parts, batch, self.mode, options=self.options, described=described)

    @cached_property
    def _describe(self) -> Callable[[str], dict[str, Tensor]]:
        """Caption -> its conditions on the CPU, encoded once for as long as it is remembered."""

        def describe(caption: str) -> dict[str, Tensor]:
            cond = self.family.describe(self.parts, [caption], None).cond
            return {name: value.cpu() for name, value in cond.items()}

        return lru_cache(maxsize=CAPTIONS)(describe)

    def denoise(self, net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: Cond) -> Tensor:
        with self.autocast():
            return self.family.denoise(net, x_BCThw, timestep_B, cond)


@contextmanager
def at_rest(net: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class Request:
    """One clip to make."""

    prompt: str
    batch: Callable[[], Batch]  # of one sample, on the CPU
    seed: int
    fps: float
    control: str | None = None  # the path of the control clip or pose file
    entry: int | None = None  # place in the metadata of a held-out clip


def make_clip(
    setup: Setup, net: nn.Module, request: Request, batch: Batch, path: Path, *, steps: int, guidance_scale: float
) -> None:
    """Writes one clip, and its prompt, seed and settings into a .json of the same name."""
    scheduler = denoise.sampler(setup.objective)
    with at_rest(net):
        encoded = setup.encode(batch)
        x0, cond = settle(encoded, [request.seed], setup.parts.null)
        x0 = denoise.sample(
            setup.denoise,
            net,
            setup.objective,
            cond,
            setup.parts.null | encoded.null,
            x0.shape,
            scheduler=scheduler,
            seeds=[request.seed],
            steps=steps,
            guidance=guidance_scale,
            caption=setup.family.caption,
            device=x0.device,
        )
        if setup.family.finish is not None:
            x0 = setup.family.finish(x0, cond)
        pixels_BFCHW = setup.family.decode(setup.parts, x0)
    write_pixels(path, ((pixels_BFCHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), request.fps)
    told = {
        "prompt": request.prompt,
        "seed": request.seed,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": type(scheduler).__name__,
        **batch.draws[0].shape._asdict(),
        "fps": request.fps,
        "control": request.control,
        "entry": request.entry,
    }
    path.with_suffix(".json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_pixels(path: Path, pixels_BFCHW: Tensor, fps: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, pixels_BFCHW[0].permute(0, 2, 3, 1).cpu().numpy(), fps)


def read_one(reader: Reader, draw: Draw) -> Batch:
    """A batch of one, on the CPU, read as training does. Raises UserError if the file has broken since the scan."""
    try:
        return collate([reader.open(draw)])
    except (MediaError, CameraError) as error:
        path = reader.records[draw.record].path
        raise UserError("validation", f"{path} {error}; mend or replace it") from error


def prompt_requests(
    family: Family, mode: str, prompts: Sequence[str], paths: Sequence[str], rules: SizeRules, *, seed: int
) -> list[Request]:
    """Clips for prompts, each with its control clip or pose file; what would come from a clip itself is dropped.

    Raises UserError for paths that are too few or too many, of the wrong kind, or cannot be read.
    """
    needs = frozenset(family.needs.get(mode, ()))
    guide = next((GUIDES[name] for name in GUIDES if name in needs), None)
    if len(paths) != (len(prompts) if guide else 0):
        rule = f"give {guide} for each prompt" if guide else "this train_mode takes none"
        raise UserError("validation_paths", f"{len(prompts)} prompts and {len(paths)} paths; {rule}")
    records, problems = [], []
    for i, (prompt, path) in enumerate(zip(prompts, paths or [""] * len(prompts), strict=True)):
        try:
            records.append(prompt_record(i, prompt, path, rules, needs))
        except (MediaError, CameraError) as error:
            problems.append(f"{path} {error}; this train_mode needs {guide}")
    refuse("validation_paths", problems)
    drop = {name: float(name != "control") for name in family.drop}
    plan = partial(Plan, records, rules, group=1, seed=seed)  # never asked for: these draws are fixed
    reader = Reader(records, plan, group=1, drop=drop, text_drop_ratio=0.0, needs=needs)
    requests = []
    for i, record in enumerate(records):
        draw = fixed_draw(record, i, rules)
        batch = partial(read_one, reader, draw) if record.path else partial(from_nothing, reader, draw)
        control = record.control_path or record.camera_path
        requests.append(Request(record.text, batch, seed + i, played(record, rules), control))
    return requests


GUIDES = {"control": "a control clip or picture", "camera": "a pose file"}
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def prompt_record(entry: int, prompt: str, path: str, rules: SizeRules, needs: frozenset[str]) -> Record:
    """A control clip stands for the clip to be made; without one it is a square clip of the sizes in the recipe."""
    if "control" in needs:
        kind: Kind = "image" if path.lower().endswith(PICTURES) else "video"
        seen = measure(path, kind)
        return Record(entry, path, prompt, kind, seen.frames, seen.fps, seen.height, seen.width, control_path=path)
    if "camera" in needs:
        read_poses(path)
    stride, side = rules.video_sample_stride, rules.video_sample_size
    frames, fps = rules.video_sample_n_frames * stride, (rules.video_sample_fps or NATIVE_FPS) * stride
    return Record(entry, "", prompt, "video", frames, fps, side, side, camera_path=path or None)


NATIVE_FPS = 16.0  # of Wan2.1's clips: sample_fps in https://github.com/Wan-Video/Wan2.1/blob/main/wan/configs


def from_nothing(reader: Reader, draw: Draw) -> Batch:
    """A batch of a prompt and perhaps a pose file: black pixels, of which the size alone is used."""
    record, (frames, height, width) = reader.records[draw.record], draw.shape
    made = Sample(draw, record.text, torch.zeros(frames, 3, height, width, dtype=torch.uint8))
    made.keep = {name: p < 1 for name, p in reader.drop.items()}
    if "mask" in reader.needs:
        made.mask_FHW = torch.ones(frames, height, width, dtype=torch.bool)
    if record.camera_path is not None:
        poses = resample(read_poses(record.camera_path), frames, range(frames))
        made.camera_FCHW = torch.from_numpy(rays(poses, height, width)).permute(0, 3, 1, 2).contiguous()
    return collate([made])


def played(record: Record, rules: SizeRules) -> float:
    """Frames per second at which the frames taken move as fast as in the file."""
    return 1.0 if record.kind == "image" else rules.video_sample_fps or record.fps / rules.video_sample_stride


def sample_clips(recipe: Recipe) -> list[Path]:
    """`reeltune sample`: a clip for each of validation_prompts into output_dir/samples, from the recipe's weights."""
    wanted, folder = recipe.validation, Path(recipe.output.output_dir) / "samples"
    if not wanted.validation_prompts:
        raise UserError("validation_prompts", "is empty, so there is nothing to make; give a prompt or more")
    family, mode, objective = choose_family(recipe)
    prompts, paths, seed = wanted.validation_prompts, wanted.validation_paths, recipe.training.seed
    requests = prompt_requests(family, mode, prompts, paths, size_rules(recipe, family), seed=seed)
    engine = Engine(recipe.training.mixed_precision, allow_tf32=recipe.training.allow_tf32)
    parts = load_parts(recipe, family, engine.device)
    setup = Setup(family, mode, parts, objective, engine.autocast, encode_options(recipe))
    made = [folder / f"{i}.mp4" for i in range(len(requests))]
    for path, request in zip(made, requests, strict=True):
        steps, guidance_scale = wanted.preview_steps, wanted.guidance_scale
        make_clip(setup, parts.net, request, request.batch(), path, steps=steps, guidance_scale=guidance_scale)
    return made
