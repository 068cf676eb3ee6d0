"""The sizes that a recipe asks for, checked against what its family can do and what its clips have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError, refuse
from reeltune.core.types import Draw
from reeltune.data.display import refuse_unmade
from reeltune.data.metadata import LeftOut
from reeltune.data.plan import sampled_lengths
from reeltune.data.records import Records
from reeltune.data.scan import notice_of
from reeltune.data.shapes import SizeRules, budget_frames, clip_length
from reeltune.families.spec import Family

MOST_BYTES = 2**34  # of pixels in a step


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
    lengths = sampled_lengths(records, rules)
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
    full = rules.geometry.legal_frames(rules.video_sample_n_frames)
    lengths = np.where(records.kind_video, clip_length(rules, records.frames, records.fps), 0)
    short = np.flatnonzero((lengths > 0) & (lengths < full))
    rate = rules.video_sample_fps
    step = f"at stride {rules.video_sample_stride}" if rate is None else f"at {rate:g} per second"
    sentence = f"the clip has fewer than {full} frames {step}, and is used as it is"
    return [notice_of(len(short), records.entry[short].tolist(), sentence)] if len(short) else []


def refuse_too_large(draws: Sequence[Draw]) -> None:
    """Raises UserError for samples of one shape that no machine could read at once, or no reader could make."""
    (frames, height, width), count = draws[0].shape, len(draws)
    if count * frames * 3 * height * width > MOST_BYTES:
        raise UserError(
            "recipe",
            f"the largest step has {count} x {frames} frames of {width} x {height}, more than {MOST_BYTES / 1e9:.0f} "
            "GB of pixels before anything is computed; lower the sample sizes, video_sample_n_frames or "
            "train_batch_size",
        )
    if frames > 1:
        for draw in draws:
            refuse_unmade(draw.crop.height, draw.crop.width)
