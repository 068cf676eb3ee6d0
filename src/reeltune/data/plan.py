"""An epoch, planned from measurements alone: every rank computes the same plan and takes its own share.

Every choice is a function of (seed, epoch, place in the epoch). The samples of a micro-step have one
Shape on all ranks, so that no rank waits for a larger picture. Groups run on over the epochs, so that none
is filled up with repeats. Memory: a few integers per record; the Draws are made when asked for.  (no torch)
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from reeltune.core.errors import UserError
from reeltune.core.reading import few
from reeltune.core.rng import dice, permutation, seed_of, uniform
from reeltune.core.types import Draw, Kind, Record, Shape
from reeltune.data.shapes import (
    BUCKETS,
    SQUARE,
    SizeRules,
    bucket_of,
    centre_crop,
    clip_length,
    cover,
    frame_indices,
    frame_window,
    loaded_size,
    reference_frame,
    rungs_for,
    shapes_of,
)

# Steps of two sequences over [0, 1) whose pairs fill the square evenly, however many are taken: the plastic number's
# inverse and its square (https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences/).
WINDOW_STEP, SHAPE_STEP = 0.7548776662466927, 0.5698402909980532


class Measures(Protocol):
    """What a plan reads of the records: one number each per record."""

    kind_video: np.ndarray  # bool
    frames: np.ndarray
    fps: np.ndarray
    height: np.ndarray
    width: np.ndarray

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> Record: ...  # asked for with variants alone


def sampled_lengths(records: Measures, rules: SizeRules) -> np.ndarray:
    """int[records]: frames that each gives: 1 of a picture, 0 of a clip that is too short for any."""
    return np.where(records.kind_video, clip_length(rules, records.frames, records.fps), 1)


def refuse_empty(plan: Plan, records: Sequence[Record]) -> None:
    """Raises UserError with the reason of each of its records, if none gives a sample."""
    if not plan.micro_steps_before(1):
        reasons = [f"{records[record].path}: {reason}" for record, reason in plan.left_out]
        raise UserError("train_data_meta: nothing to train on", few(reasons) or ["it has no usable entry"])


def strata_over(group: int, steps: int = 1000) -> int:
    """How many equal strata of a schedule of `steps` uniform_sampling divides a micro-step's samples into.

    The most that divide both evenly; each stratum is drawn from by group / strata neighbouring samples. As released,
    but for batches larger than one a process: there neighbours shared a stratum by the process that they came to.
    """
    return max(n for n in range(1, group + 1) if group % n == 0 and steps % n == 0)


class Plan:
    """One epoch: `plan[k]` are the `group` Draws of micro-step k over all ranks, of which rank r takes b from r * b.

    Records are grouped by kind, aspect bucket and legal length, so a short clip shortens no other. The n clips of a
    bucket (videos `video_repeat` times) are an endless sequence: a permutation for epoch 0, one for epoch 1, and so on.
    Group j is the clips at j * group to (j + 1) * group - 1, and belongs to the epoch in which it starts. So each is
    drawn as often as the others, to within one; an epoch has one group of a bucket more or fewer, or none.

    runs_on: without it each epoch fills up the last group of a bucket with clips that it has drawn already, which are
    repeats: the rule of checkpoints without a plan_version (core.types.Progress).

    variants: into how many ways of reading it each record is drawn (window, shape, reference frame, mask); 0 is ever
    new ones. They depend on the record's file name, bucket and measures alone, not on the seed, and more of them begin
    with the same. All samples of a micro-step are of one variant, and so of one Shape.
    """

    left_out: list[tuple[int, str]]  # (record, reason)

    def __init__(
        self,
        records: Measures,
        rules: SizeRules,
        epoch: int = 0,
        *,
        group: int,
        seed: int,
        strata: int = 1,
        video_repeat: int = 0,
        largest_first: bool = False,
        variants: int = 0,
        runs_on: bool = True,
    ):
        self._records, self._rules, self._variants = records, rules, variants
        self.group, self._strata, self._seed, self._epoch, self._runs_on = group, strata, seed, epoch, runs_on
        video = np.asarray(records.kind_video)
        lengths = sampled_lengths(records, rules)
        self.left_out = [(i, self._too_short(i)) for i in np.flatnonzero(lengths == 0).tolist()]
        times = np.where(lengths == 0, 0, np.where(video, max(video_repeat, 1), 1))
        items = np.repeat(np.arange(len(records), dtype=np.int32), times)
        if not runs_on:
            items = items[permutation(len(items), seed, "order", epoch)]

        buckets_of_records = self._buckets(video, lengths)
        self._bucket_of = np.where(lengths == 0, -1, buckets_of_records) if variants else None
        items = items[np.argsort(buckets_of_records[items], kind="stable")]  # bucket after bucket
        self._sizes = np.bincount(buckets_of_records[items], minlength=len(self._kinds))
        before, after = self._groups_before(epoch), self._groups_before(epoch + 1)
        groups = after - before
        self._first_group = np.cumsum(groups) - groups
        self._first_place = before * group - epoch * self._sizes if runs_on else np.zeros_like(groups)
        ends = np.maximum(self._first_place + groups * group, self._sizes)
        self._starts = np.cumsum(ends) - ends
        self._items = self._sequences(items, ends)
        self._bucket = np.repeat(np.arange(len(groups), dtype=np.int32), groups)  # of each group
        self._draw_shapes()
        self._order = permutation(len(self._bucket), seed, "micro-steps", epoch).astype(np.int32)
        if largest_first and epoch == 0 and len(self._order):
            self._largest_to_front()

    @property
    def rules(self) -> SizeRules:
        return self._rules

    def _groups_before(self, epoch: int) -> np.ndarray:
        """int[buckets]: how many of each bucket's groups start before this epoch."""
        if self._runs_on:
            return -(-epoch * self._sizes // self.group)
        return epoch * -(-self._sizes // self.group)

    def _sequences(self, items: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Bucket after bucket, each from this epoch's first clip to the last that its groups take, `ends` in number.

        items: bucket after bucket; in this epoch's order, if groups do not run on.
        """
        parts, first = [items[:0]], 0
        for b, (size, end) in enumerate(zip(self._sizes.tolist(), ends.tolist(), strict=True)):
            of_bucket, first = items[first : first + size], first + size
            if not self._runs_on:
                parts.append(np.resize(of_bucket, end))
                continue
            for done in range(0, end, max(size, 1)):
                order = permutation(size, self._seed, "order", self._epoch + done // size, *self._name(b))
                parts.append(of_bucket[order[: end - done]])
        return np.concatenate(parts)

    def _name(self, bucket: int) -> tuple[int | str, ...]:
        """What random choices name the bucket by: the same whatever other buckets there are."""
        return self._kinds[bucket], *(int(of[bucket]) for of in (self._aspects, self._lengths, self._open))

    def micro_steps_before(self, epoch: int) -> int:
        """Micro-steps of all epochs before this one; epochs differ in length."""
        return int(self._groups_before(epoch).sum())

    def epochs_within(self, micro_steps: int) -> int:
        """How many epochs a run of so many micro-steps begins."""
        if not self._sizes.any():
            return 0
        return bisect_left(range(micro_steps * self.group + 1), micro_steps, key=self.micro_steps_before)

    def repeats(self, epochs: int) -> int:
        """Samples of so many epochs beyond one of each item per epoch: what fills up the last group of each bucket."""
        return self.micro_steps_before(epochs) * self.group - epochs * int(self._sizes.sum())

    def _too_short(self, record: int) -> str:
        frames, fps, rules = int(self._records.frames[record]), float(self._records.fps[record]), self._rules
        if rules.video_sample_fps is None:
            return f"its length is {frames} frames; video_sample_stride needs at least {rules.video_sample_stride}"
        if fps <= 0:
            return "its frame rate is unknown; video_sample_fps needs one, video_sample_stride does not"
        return f"its length is {frames} frames at {fps:g} per second, less than one at video_sample_fps"

    def _buckets(self, video: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The bucket of each record; what the buckets are goes into _kinds, _aspects, _lengths and _open.

        With variants the rungs open to a record are a part of it, or its shapes would hang on its neighbours.
        """
        records, rules = self._records, self._rules
        if rules.enable_bucket and rules.fix_sample_size is None:
            aspects = bucket_of(*loaded_size(rules, video, records.height, records.width)).astype(np.int64)
        else:
            aspects = np.full(len(lengths), list(BUCKETS).index(SQUARE))
        taken, which = np.unique(lengths, return_inverse=True)
        legal = np.array([rules.geometry.legal_frames(int(frames)) for frames in taken])[which]
        keys = (aspects * 2 + video) * (rules.video_sample_n_frames + 1) + legal
        keys = keys * (len(rules.ladder) + 1) + (self._open_rungs(slice(None)) if self._variants else 0)
        unique, bucket = np.unique(keys, return_inverse=True)
        unique, self._open = np.divmod(unique, len(rules.ladder) + 1)
        self._lengths = unique % (rules.video_sample_n_frames + 1)
        rest = unique // (rules.video_sample_n_frames + 1)
        self._aspects = rest // 2
        self._kinds: list[Kind] = ["video" if code else "image" for code in rest % 2]
        return bucket.astype(np.int32)

    def _open_rungs(self, rows: slice | np.ndarray) -> np.ndarray:
        """How many rungs of the ladder are open to these records, over the last axis to the smallest of them."""
        records, rules = self._records, self._rules
        if not rules.by_budget or not len(records):
            return np.zeros(len(records) if isinstance(rows, slice) else len(rows), dtype=np.int64)
        height, width = loaded_size(rules, records.kind_video, records.height, records.width)
        mean = ((height + width).astype(np.float32) / 2)[rows]
        return rungs_for(rules, mean if isinstance(rows, slice) else mean.min(axis=1))

    def _draw_shapes(self) -> None:
        """The shape of each group, drawn from the support for its bucket and the smallest clip in it."""
        rules = self._rules
        rungs = self._open_rungs(self._slots(np.arange(len(self._bucket))))
        chance = uniform(len(self._bucket), self._seed, "shape", self._epoch)
        if self._variants:
            self._variant = (chance * self._variants).astype(np.int32)  # of each group
            chances = [[self._chance_of(b, v) for v in range(self._variants)] for b in range(len(self._kinds))]
            chance = np.array(chances).reshape(-1, self._variants)[self._bucket, self._variant]
        table: dict[Shape, int] = {}
        self._shape = np.zeros(len(self._bucket), dtype=np.int32)
        keys, which = np.unique(self._bucket * np.int64(len(rules.ladder) + 1) + rungs, return_inverse=True)
        alike = np.split(np.argsort(which, kind="stable"), np.cumsum(np.bincount(which))[:-1])
        for key, groups in zip(keys.tolist(), alike, strict=False):
            bucket, open_rungs = divmod(key, len(rules.ladder) + 1)
            shapes, edges = self._support(bucket, open_rungs)
            codes = np.array([table.setdefault(shape, len(table)) for shape in shapes], dtype=np.int32)
            self._shape[groups] = codes[np.searchsorted(edges, chance[groups], side="right")]
        self._shapes = list(table)

    def _support(self, bucket: int, rungs: int) -> tuple[list[Shape], np.ndarray]:
        """The shapes of a bucket, and where in [0, 1) the second and later ones begin."""
        aspect, length = int(self._aspects[bucket]), int(self._lengths[bucket])
        support = shapes_of(self._rules, self._kinds[bucket], aspect, length, rungs)
        return [shape for _, shape in support], np.cumsum([p for p, _ in support])[:-1]

    def _chance_of(self, bucket: int, variant: int) -> float:
        """Where in [0, 1) a variant's shape is taken from the bucket's."""
        return (dice(0, "shape", *self._name(bucket)).random() + variant * SHAPE_STEP) % 1

    def ways(self, record: int) -> list[Draw]:
        """A Draw of each of its variants, none of a record that is left out; their `seed` means nothing."""
        assert self._bucket_of is not None, "a plan without variants has no end of ways"
        bucket = int(self._bucket_of[record])
        if bucket < 0:
            return []
        shapes, edges = self._support(bucket, int(self._open[bucket]))
        chances = [self._chance_of(bucket, variant) for variant in range(self._variants)]
        places = np.searchsorted(edges, chances, side="right").tolist()
        return [
            Draw(record, shapes[place], seed=0, **self._seen(record, shapes[place], variant, ()))
            for variant, place in enumerate(places)
        ]

    def _largest_to_front(self) -> None:
        tokens = np.array([self._rules.geometry.tokens(shape) for shape in self._shapes])
        place = int(np.argmax(tokens[self._shape[self._order]]))
        self._order[[0, place]] = self._order[[place, 0]]

    def _places(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place in the bucket's sequence, bucket) of each sample of these groups."""
        bucket = self._bucket[groups]
        first = self._first_place[bucket] + (groups - self._first_group[bucket]) * self.group
        return first[:, None] + np.arange(self.group), bucket[:, None]

    def _slots(self, groups: np.ndarray) -> np.ndarray:
        """The record of each sample of these groups."""
        place, bucket = self._places(groups)
        return self._items[self._starts[bucket] + place]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, k: int) -> list[Draw]:
        return self.share(k, 0, self.group)

    def share(self, k: int, start: int, stop: int) -> list[Draw]:
        """plan[k][start:stop]"""
        k = range(len(self))[k]  # negative numbers, IndexError
        group = self._order[[k]]
        records, shape = self._slots(group)[0].tolist(), self._shapes[self._shape[group[0]]]
        places, bucket = self._places(group)
        repeat = [not self._runs_on and place >= self._sizes[bucket[0, 0]] for place in places[0].tolist()]
        return [self._draw(records[at], shape, repeat[at], k, at) for at in range(start, stop)]

    def stand_in(self, k: int, position: int, attempt: int) -> Draw:
        """What takes the place of plan[k][position] when its file cannot be read; attempts count from 1.

        First the others of its bucket, from the next group on; then records of its kind that are long enough.
        Raises LookupError when there are no more.
        """
        group = int(self._order[k])
        shape, b = self._shapes[self._shape[group]], int(self._bucket[group])
        size, start = int(self._sizes[b]), int(self._starts[b])
        if attempt < size:
            members = self._items[start : start + size]
            place = int(self._places(np.array([group]))[0][0, position])
            if place >= size:  # of a later epoch
                place = int(np.argmax(members == self._items[start + place]))
            record = int(members[(place + 1 + (self.group + attempt - 2) % (size - 1)) % size])
        else:
            record = self._elsewhere(b, shape.frames, attempt - size + position)
        return self._draw(record, shape, True, k, position, attempt)

    def _elsewhere(self, bucket: int, frames: int, which: int) -> int:
        """The record at place `which` of all other buckets of the kind whose clips have so many frames."""
        for b in np.roll(np.arange(len(self._kinds)), -bucket)[1:]:
            if self._kinds[b] == self._kinds[bucket] and self._lengths[b] >= frames:
                if which < self._sizes[b]:
                    return int(self._items[self._starts[b] + which])
                which -= int(self._sizes[b])
        raise LookupError("no other record can take this shape")

    def _draw(self, record: int, shape: Shape, repeat: bool, k: int, position: int, attempt: int = 0) -> Draw:
        where = (self._epoch, k, position, attempt)
        variant = int(self._variant[self._order[k]]) if self._variants else None
        return Draw(
            record,
            shape,
            **self._seen(record, shape, variant, where),
            seed=seed_of(self._seed, "sample", *where),
            stratum=(position * self._strata // self.group, self._strata),
            repeat=repeat,
        )

    def _seen(self, record: int, shape: Shape, variant: int | None, where: tuple[int, ...]) -> dict[str, Any]:
        """The fields of a Draw that decide what the frozen networks see: drawn anew each time, or the variant's."""
        records, rules = self._records, self._rules
        seed, at = self._seed, where
        if variant is not None:
            seed, at = 0, (os.path.basename(records[record].path), variant)
        frames: tuple[int, ...] = (0,)
        if records.kind_video[record]:
            fps = float(records.fps[record])
            _, latest = frame_window(rules, int(records.frames[record]), fps)
            if variant is None:
                start = dice(seed, "start", *at).randint(0, latest)
            else:
                start = int((dice(seed, "start", at[0]).random() + variant * WINDOW_STEP) % 1 * (latest + 1))
            frames = frame_indices(rules, fps, start, shape.frames)
        height, width = loaded_size(rules, records.kind_video[record], records.height[record], records.width[record])
        reference = dice(seed, "reference", *at)
        return {
            "crop": centre_crop(cover(rules, int(height), int(width), shape), shape),
            "frames": frames,
            "rate": rules.video_sample_fps if records.kind_video[record] else None,
            "ref_frame": reference.choices(range(shape.frames), reference_frame(rules, shape.frames))[0],
            "variant_seed": None if variant is None else seed_of(seed, "variant", *at),
        }

    def outline(self) -> tuple[list[Shape], np.ndarray, np.ndarray]:
        """(shapes, which of them each micro-step has, the record of each of its samples).

        In order; int32[steps], int32[steps, group].
        """
        return self._shapes, self._shape[self._order], self._slots(self._order)
