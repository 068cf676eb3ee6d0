"""What to make clips of: prompts of the recipe, each perhaps with a file that it follows or begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from reeltune.config.recipe import Recipe
from reeltune.control.from_clip import Drawn, draw_controls
from reeltune.control.kind import Detector
from reeltune.control.kinds import kind_named, open_for_previews
from reeltune.core.errors import UserError, refuse
from reeltune.core.types import Batch, Draw, Kind, MaskLaw, Record, Sample, Shape
from reeltune.data.camera import CameraError, rays, read_poses, resample
from reeltune.data.findings import content_of, require_same
from reeltune.data.held_out import fixed_draw
from reeltune.data.keypoints import is_keypoints
from reeltune.data.loader import Reader, collate
from reeltune.data.media import MediaError, measure, measure_control, read_frames
from reeltune.data.plan import Plan
from reeltune.data.records import Records
from reeltune.data.shapes import SizeRules, clip_length
from reeltune.families.captions import cut_captions
from reeltune.families.spec import Family
from reeltune.families.tensor_files import notice

GUIDES = {  # input that a mode needs -> the file that is given for it; the first that applies
    "control": "a control clip or picture, or key points (.npz),",
    "camera": "a pose file",
    "ref": "a picture to begin with",
    "mask": "a picture to begin with",
}
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Request:
    """One clip to make."""

    prompt: str
    batch: Callable[[], Batch]  # of one sample, on the CPU
    seed: int
    fps: float
    control: str | None = None  # the path of the control clip, pose file or first picture
    entry: int | None = None  # place in the metadata of a held-out clip
    record: Record | None = None  # what it is read from
    drawn: Drawn | None = None  # where its control was drawn from a raw clip


def requests_of(
    recipe: Recipe, family: Family, mode: str, rules: SizeRules, drawn: Sequence[Drawn] = ()
) -> list[Request]:
    """Requests of validation_prompts, each with its file of validation_paths, or its control of those that were
    `drawn`. Raises UserError."""
    validation, seed = recipe.validation, recipe.training.seed
    paths = [str(one.path) for one in drawn] or validation.validation_paths
    requests = prompt_requests(family, mode, validation.validation_prompts, paths, rules, seed=seed)
    return [replace(one, drawn=its) for one, its in zip(requests, drawn, strict=True)] if drawn else requests


class DrawnControls(NamedTuple):
    drawn: Sequence[Drawn]
    detector: Detector | None  # that drew them; None where none are asked for


NOTHING_DRAWN = DrawnControls((), None)


def drawn_controls(recipe: Recipe, family: Family, mode: str, *, device: str = "cpu") -> DrawnControls:
    """Draws the controls that validation_control_from asks for into output_dir/drawn. Raises UserError."""
    validation = recipe.validation
    if not validation.validation_control_from:
        return NOTHING_DRAWN
    kind = validation.control_kind
    assert kind is not None  # a rule of the recipe
    refuse_other_control(kind, family, mode)
    clips, folder = validation.validation_control_from, Path(recipe.output.output_dir) / "drawn"
    detector = open_for_previews(kind, validation.control_detector, device)
    return DrawnControls(draw_controls(kind, detector, clips, folder), detector)


def refuse_other_control(kind: str, family: Family, mode: str) -> None:
    """Raises UserError for a kind of control that the mode takes none of."""
    wanted = "camera" if kind_named(kind).form == "camera" else "control"
    if wanted not in family.needs[mode]:
        raise UserError(
            "recipe",
            f"control_kind is {kind} and train_mode is {mode}, which takes no such control; leave one of the two out",
        )


def prompt_requests(
    family: Family, mode: str, prompts: Sequence[str], paths: Sequence[str], rules: SizeRules, *, seed: int
) -> list[Request]:
    """Clips for prompts, each with the file that its mode needs. Conditions that no file gives are dropped.

    A mode that needs a mask alone makes all of the clip, or all after the picture where pictures are given.
    Raises UserError for paths that are too few or too many, of the wrong kind, or cannot be read.
    """
    needs = frozenset(family.needs[mode])
    guide = next((name for name in GUIDES if name in needs), None)
    counts = {len(prompts)} if guide else {0}
    if guide == "mask":
        counts.add(0)
    if len(paths) not in counts:
        rule = f"give {GUIDES[guide]} for each prompt" if guide else f"train_mode {mode} takes none"
        rule += ", or none at all" if guide == "mask" else ""
        raise UserError("validation_paths", f"{len(prompts)} prompts and {len(paths)} paths; {rule}")
    records: list[Record] = []
    problems = []
    for i, (prompt, path) in enumerate(zip(prompts, paths or [""] * len(prompts), strict=True)):
        try:
            records.append(prompt_record(i, prompt, path, rules, guide, family.native_fps))
        except (MediaError, CameraError) as error:
            problems.append(f"{path} {error}; train_mode {mode} needs {GUIDES[guide or 'ref'].rstrip(',')}")
    refuse("validation_paths", problems)
    for record in records:
        notice_short(record, rules)
    begun = bool(paths) and guide in ("ref", "mask")
    drop = {name: float(name != "control" and not begun) for name in family.drop}
    plan = partial(Plan, Records.of(records), rules, group=1, seed=seed)  # never asked for: these draws are fixed
    everything = MaskLaw({"all": 1.0}, {"all": 1.0})  # is to be made of a clip that follows another
    reader = Reader(records, plan, group=1, drop=drop, text_drop_ratio=0.0, needs=needs, mask_law=everything)
    make = partial(read_one, make=Reader.open if guide == "control" else from_picture)
    notice_cut(family, [(f"prompt {i + 1}", prompt) for i, prompt in enumerate(prompts)])
    requests = []
    for i, record in enumerate(records):
        batch = partial(make, reader, fixed_draw(record, i, rules))
        requests.append(
            Request(record.text, batch, seed + i, played(record, rules), paths[i] if paths else None, None, record)
        )
    return requests


def prompt_record(entry: int, prompt: str, path: str, rules: SizeRules, guide: str | None, native_fps: float) -> Record:
    """What stands for the clip to be made: its control clip, or a clip of the recipe's length as its picture is
    shaped; without either it is square."""
    stride, side = rules.video_sample_stride, rules.video_sample_size
    frames, fps = rules.video_sample_n_frames * stride, (rules.video_sample_fps or native_fps) * stride
    if guide == "control":
        kind: Kind = "image" if path.lower().endswith(PICTURES) else "video"
        seen = measure_control(path, kind)
        kind = seen.kind if is_keypoints(path) else kind
        for note in seen.notes:
            notice("%s: %s", path, note)
        size = seen.height, seen.width
        return Record(entry, path, prompt, kind, seen.frames, seen.fps, *size, path, content=seen.content)
    if guide == "camera":
        read_poses(path)
        poses = {"camera_path": path, "control_content": content_of(path)}
        return Record(entry, "", prompt, "video", frames, fps, side, side, **poses)
    if path:
        seen = measure(path, "image")
        return Record(entry, path, prompt, "video", frames, fps, seen.height, seen.width, content=seen.content)
    return Record(entry, "", prompt, "video", frames, fps, side, side)


def notice_cut(family: Family, captions: Sequence[tuple[str, str]]) -> None:
    """Says which captions, (name, text), are longer than an encoder reads."""
    for line in cut_captions(family, captions):
        notice(line)


def notice_short(record: Record, rules: SizeRules) -> None:
    """Says so where a clip gives fewer frames than are asked for."""
    legal, rate = rules.geometry.legal_frames, rules.video_sample_fps
    frames, wanted = legal(int(clip_length(rules, record.frames, record.fps))), legal(rules.video_sample_n_frames)
    if record.kind == "video" and frames < wanted:
        step = f"at stride {rules.video_sample_stride}" if rate is None else f"at {rate:g} per second"
        name = record.control_path or record.path
        made = "1 frame is" if frames == 1 else f"{frames} frames are"
        notice(f"{name}: the clip has fewer than {wanted} frames {step}, and {made} made")


def read_one(reader: Reader, draw: Draw, *, make: Callable[[Reader, Draw], Sample] = Reader.open) -> Batch:
    """A batch of one, on the CPU, by default read as training does. Raises UserError if the file has broken since it
    was measured."""
    try:
        return collate([make(reader, draw)])
    except (MediaError, CameraError) as error:
        record = reader.records[draw.record]
        path = record.path or record.camera_path
        raise UserError("validation", f"{path} {error}; restore or mend it, and run again") from error


def from_picture(reader: Reader, draw: Draw) -> Sample:
    """The sample of a prompt, with the first frame and the poses that there are: the rest is black, and to be made.
    Raises MediaError or CameraError."""
    record, (frames, height, width) = reader.records[draw.record], draw.shape
    made = Sample(draw, record.text, torch.zeros(frames, 3, height, width, dtype=torch.uint8))
    made.keep = {name: p < 1 for name, p in reader.drop.items()}
    if "mask" in reader.needs:
        made.mask_FHW = torch.ones(frames, height, width, dtype=torch.bool)
        made.mask_FHW[: bool(record.path)] = False
    if record.path:
        require_same(record.path, record.content)
        first_FCHW = read_frames(record.path, (0,), draw.crop, Shape(1, height, width))
        made.pixels_FCHW[:1] = torch.from_numpy(first_FCHW)
    if record.camera_path is not None:
        require_same(record.camera_path, record.control_content)
        poses = resample(read_poses(record.camera_path), frames, range(frames))
        made.camera_FCHW = torch.from_numpy(rays(poses, height, width)).permute(0, 3, 1, 2).contiguous()
    return made


def played(record: Record, rules: SizeRules) -> float:
    """Frames per second at which the frames taken move as fast as in the file."""
    return 1.0 if record.kind == "image" else rules.video_sample_fps or record.fps / rules.video_sample_stride
