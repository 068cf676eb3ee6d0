"""What a run reads, from its recipe: the family, the scan, the split, the sizes, the plan of an epoch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from reeltune import families
from reeltune.config.recipe import Loss, Model, Recipe
from reeltune.core.errors import UserError, refuse, together
from reeltune.data.held_out import refuse_shared, split
from reeltune.data.loader import Reader
from reeltune.data.metadata import LeftOut
from reeltune.data.plan import Plan, strata_over
from reeltune.data.records import Records
from reeltune.data.scan import Scan, notice_of, scan
from reeltune.data.shapes import SizeRules, budget_frames, clip_length, lone_frames
from reeltune.diffusion.objective import Objective
from reeltune.families.spec import Family, Parts, check_mode
from reeltune.reporting.ledger import Ledger

FILE_INPUTS = frozenset({"control", "camera"})  # what a mode may need that comes from a file of its own
LEVEL_CHOICES = ("uniform_sampling", "weighting_scheme", "logit_mean", "logit_std", "mode_scale")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    scan: Scan
    unsuited: list[LeftOut]  # sound entries of train_data_meta that teach this model nothing
    train: Records
    held_out: Records
    rules: SizeRules
    plan: Callable[[int], Plan]  # epoch -> its plan
    reader: Reader  # of `train`
    held_out_reader: Reader


def choose_family(recipe: Recipe) -> tuple[Family, str, Objective]:
    """The family found in the checkpoint, the train mode, and the objective with the recipe's noise levels.

    Raises UserError if the checkpoint is unknown, or cannot do the mode, the loss and the sizes asked for.
    """
    family = families.find(recipe.model.pretrained_model_name_or_path, config_path=recipe.model.config_path)
    family = replace(family, geometry=replace(family.geometry, sides=even_side(recipe.parallel.context_parallel)))
    with together("recipe") as attempt:
        attempt(check_split, family, recipe.parallel.context_parallel)
        mode = attempt(check_mode, family, recipe.model.train_mode)
        objective = attempt(chosen_objective, family, recipe.loss)
        attempt(size_rules, recipe, family)
        attempt(check_reference, family, recipe.model)
    return family, mode, objective


def even_side(processes: int) -> int:
    """Tokens: sides that are multiples of it hold a number of tokens that so many processes can share evenly."""
    return next(side for side in range(1, processes + 1) if side**2 % processes == 0)


def check_split(family: Family, processes: int) -> None:
    """Raises UserError if so many processes are to share a clip and the family does not know how."""
    if processes > 1 and family.split is None:
        raise UserError(
            "recipe",
            f"context_parallel is {processes}, but {family.name} has no plan to deal out a clip's tokens; leave it "
            "out, and use engine fsdp or zero3, gradient_checkpointing, or smaller clips",
        )


def check_reference(family: Family, model: Model) -> None:
    """Raises UserError for reference tokens of a network that has no weights for them."""
    if model.add_full_ref_image_in_self_attention and "full_ref" not in family.drop:
        raise UserError(
            "recipe",
            f"add_full_ref_image_in_self_attention is true, but {family.name} has no weights for such a reference "
            "picture; leave it out",
        )


def chosen_objective(family: Family, loss: Loss) -> Objective:
    """Raises UserError for a loss that the checkpoint was not trained with."""
    trained_with = type(family.objective).__name__.lower()
    if loss.loss_type not in (None, trained_with):
        raise UserError(
            "recipe",
            f"loss_type is {loss.loss_type!r}, but a checkpoint of {family.name} was trained with {trained_with}; "
            "leave loss_type out",
        )
    return with_levels(family.objective, loss)


def with_levels(objective: Objective, loss: Loss) -> Objective:
    """The objective with the recipe's choice of noise levels. Raises UserError for a choice that it has not."""
    known = {field.name for field in fields(objective)}
    asked = {name: getattr(loss, name) for name in LEVEL_CHOICES}
    refuse(
        "recipe",
        [
            f"{name} is {value!r}, which is for flow alone; this checkpoint was trained with "
            f"{type(objective).__name__.lower()}; leave {name} out"
            for name, value in asked.items()
            if name not in known and value != getattr(Loss, name)
        ],
    )
    return replace(objective, **{name: value for name, value in asked.items() if name in known})


def gather(
    recipe: Recipe,
    family: Family,
    mode: str,
    *,
    group: int | None = None,
    show_progress: bool = True,
    just_scanned: bool = False,
) -> Inputs:
    """Scans (with a progress bar on stderr), splits and plans. Raises UserError for unusable data.

    group: samples of a micro-step over all processes; those of one process, if not given.
    just_scanned: another process of this run has; what it found is taken, and no file is looked at.
    """
    data = recipe.data
    root = Path(data.train_data_dir)
    needs = FILE_INPUTS & set(family.needs[mode])
    rules = size_rules(recipe, family)

    def measured(meta: str) -> Scan:
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        with Progress(*columns, console=Console(stderr=True), disable=not show_progress, transient=True) as bar:
            task = bar.add_task(f"scan {Path(meta).name}", total=None)
            return scanned(meta, lambda done, files: bar.update(task, completed=done, total=files))

    def scanned(meta: str, progress: Callable[[int, int], None]) -> Scan:
        return scan(
            Path(meta),
            root,
            needs=needs,
            decode_check=data.decode_check,
            allow_outside_paths=data.allow_outside_paths,
            max_bad_share=data.max_bad_share,
            index_dir=Path(recipe.output.output_dir) / "index",
            workers=os.cpu_count() or 1,
            progress=progress,
            just_scanned=just_scanned,
        )

    found = measured(data.train_data_meta)
    usable, unsuited = suited(found.records, rules, family.least_frames)
    notices = [*found.notices, *lone_frames(rules), *short_clips(usable, rules)]
    if data.validation_data_meta is not None:
        train, held = usable, measured(data.validation_data_meta)
        held_out, short = suited(held.records, rules, family.least_frames)
        refuse_shared(train, held_out)
        told = [*map(str, held.left_out), *map(str, short), *held.notices, *short_clips(held_out, rules)]
        notices += [f"{Path(data.validation_data_meta).name}: {line}" for line in told]
    else:
        rows = split(usable, data.held_out_share, str(root))
        train, held_out = (usable.take(part) for part in rows)
    group = group or recipe.training.train_batch_size
    plan = partial(
        Plan,
        train,
        rules,
        group=group,
        seed=recipe.training.seed,
        strata=strata_over(group) if recipe.loss.uniform_sampling else 1,
        video_repeat=data.video_repeat,
        largest_first=True,
        variants=recipe.cache.cache_variants,
    )
    needed = frozenset(family.needs[mode])
    reader = partial(Reader, plan=plan, group=group, needs=needed, mask_law=family.masks.get(mode))
    return Inputs(
        scan=replace(found, notices=notices),
        unsuited=unsuited,
        train=train,
        held_out=held_out,
        rules=rules,
        plan=plan,
        reader=reader(train, drop=family.drop, text_drop_ratio=data.text_drop_ratio),
        held_out_reader=reader(held_out, drop=dict.fromkeys(family.drop, 0.0), text_drop_ratio=0.0),
    )


def suited(records: Records, rules: SizeRules, least_frames: int) -> tuple[Records, list[LeftOut]]:
    """(records of clips of `least_frames` frames or more, the others). Clips too short for any plan are the plan's.

    Raises UserError if nothing would be left, or clips would be cut to fewer.
    """
    longest = budget_frames(rules, rules.ladder[-1]) if rules.by_budget else rules.video_sample_n_frames
    if longest < least_frames:
        raise UserError(
            "recipe",
            f"the largest clips would be cut to {longest} frames, and this model learns nothing from fewer than "
            f"{least_frames}; raise video_sample_n_frames or token_sample_size, or lower image_sample_size",
        )
    lengths = np.where(records.kind_video, clip_length(rules, records.frames, records.fps), 1)
    short = (lengths < least_frames) & (lengths > 0)
    if not short.any():
        return records, []
    if short.all():
        raise UserError(
            "train_data_meta",
            f"has only images and clips of fewer than {least_frames} sampled frames, whose loss counts nothing in "
            "this model; give longer clips",
        )
    reason = f"this model learns nothing from fewer than {least_frames} sampled frames"
    remedy = {"image": "leave pictures out", "video": "use a longer clip or a smaller stride"}
    rows = records.take(np.flatnonzero(short))
    left_out = [LeftOut(record.entry, record.path, reason, remedy[record.kind]) for record in rows]
    return records.take(np.flatnonzero(~short)), left_out


def short_clips(records: Records, rules: SizeRules) -> list[str]:
    """A notice of clips that give fewer frames than are asked for, if there are any. Those too short are the plan's."""
    wanted = rules.geometry.legal_frames(rules.video_sample_n_frames)
    lengths = np.where(records.kind_video, clip_length(rules, records.frames, records.fps), 0)
    short = np.flatnonzero((lengths > 0) & (lengths < wanted))
    rate = rules.video_sample_fps
    step = f"at stride {rules.video_sample_stride}" if rate is None else f"at {rate:g} per second"
    sentence = f"the clip has fewer than {wanted} frames {step}, and is used as it is"
    return [notice_of(len(short), records.entry[short].tolist(), sentence)] if len(short) else []


def size_rules(recipe: Recipe, family: Family) -> SizeRules:
    """Raises UserError for sizes that the family's geometry has not."""
    refuse("recipe", list(_misfits(recipe, family)))
    sizes = asdict(recipe.sizes)
    del sizes["keep_all_node_same_token_length"]  # always on
    return SizeRules(
        **sizes,
        control_ref_image=recipe.model.control_ref_image,
        geometry=family.geometry,
        law=family.size_law,
    )


def _misfits(recipe: Recipe, family: Family) -> Iterator[str]:
    frames, most, geometry = recipe.sizes.video_sample_n_frames, family.most_frames, family.geometry
    if frames > 1 and geometry.legal_frames(frames) == 1:
        least = next(n for n in range(2, 1000) if geometry.legal_frames(n) > 1)
        yield (
            f"video_sample_n_frames is {frames}, of which {family.name} could use 1; set it to {least} or more, "
            "or to 1 to train on pictures"
        )
    if most is not None and geometry.legal_frames(frames) > most:
        yield (
            f"video_sample_n_frames is {frames}, but {family.name} has positions for {most} frames; "
            f"set video_sample_n_frames to {most} or less"
        )
    fixed, multiple = recipe.sizes.fix_sample_size, geometry.multiple
    if fixed is not None and any(side % multiple for side in fixed):
        nearest = " ".join(str(max(round(side / multiple), 1) * multiple) for side in fixed)
        yield (
            f"fix_sample_size is {fixed[0]} {fixed[1]}, but {family.name} takes multiples of {multiple}; "
            f"set it to {nearest}"
        )


def ledger_of(recipe: Recipe, inputs: Inputs) -> Ledger:
    """The account of train_data_meta's entries, nothing used yet."""
    unplanned = [
        LeftOut(inputs.train[record].entry, inputs.train[record].path, reason, "use longer clips or a smaller stride")
        for record, reason in inputs.plan(0).left_out
    ]
    return Ledger(
        inputs.scan.entries,
        inputs.train,
        held_out=inputs.held_out if recipe.data.validation_data_meta is None else None,
        left_out=[*inputs.scan.left_out, *unplanned],
        unsuited=inputs.unsuited,
        max_bad_share=recipe.data.max_bad_share,
    )


def encode_options(recipe: Recipe) -> dict[str, Any]:
    """Choices of the recipe that `encode` follows."""
    return {
        "add_full_ref_image_in_self_attention": recipe.model.add_full_ref_image_in_self_attention,
        "vae_tiling": recipe.memory.vae_tiling,
    }


def load_parts(
    recipe: Recipe,
    family: Family,
    device: torch.device,
    transformer: Path | None = None,
    *,
    encoders: bool = True,
    network: bool = True,
    start_on: torch.device | None = None,
) -> Parts:
    """The networks: the trained one as trained_weights says, the frozen ones in the run's precision.

    transformer: the folder to take the trained network from when a run is resumed. Without `encoders` the frozen ones
    are read when they are needed; without `network` the trained one's weights are not read. start_on: where all
    networks are to be at first, if not on the device.
    """
    parts = family.load(
        recipe.model.pretrained_model_name_or_path,
        dtype=torch.float32 if recipe.model.trained_weights == "fp32" else torch.bfloat16,
        frozen_dtype=DTYPES[recipe.training.mixed_precision],
        device=device if start_on is None else start_on,
        low_vram=recipe.training.low_vram,
        encoders=encoders,
        network=network,
        network_device=torch.device("cpu") if recipe.memory.blocks_to_swap else None,
        vae_tiling=recipe.memory.vae_tiling,
        transformer_path=transformer or recipe.model.transformer_path,
    )
    parts.device = device
    return parts
