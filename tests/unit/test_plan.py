"""The plan of an epoch: who is drawn, how often, in what shape; pure, whole, and small."""

import pickle
import tracemalloc
from collections import Counter, defaultdict
from functools import partial

import numpy as np
import pytest

from reeltune.core.rng import permutation
from reeltune.core.types import Geometry, Shape
from reeltune.data.plan import Plan
from reeltune.data.shapes import BUCKETS, SizeRules, Source, frame_window, outcomes


class Measured:
    """Records reduced to what a plan reads."""

    def __init__(self, kind_video, frames, height, width, fps=24.0):
        self.kind_video = np.asarray(kind_video, dtype=bool)
        self.frames = np.asarray(frames, dtype=np.int32)
        self.height, self.width = (np.asarray(side, dtype=np.int32) for side in (height, width))
        self.fps = np.where(self.kind_video, fps, 0.0)

    def __len__(self):
        return len(self.frames)


def mixed(n: int, seed: int = 0) -> Measured:
    rng = np.random.RandomState(seed)
    video = rng.rand(n) < 0.7
    sizes = np.array([(480, 832), (720, 1280), (1280, 720), (512, 512), (300, 400), (1080, 1920)])
    height, width = sizes[rng.randint(len(sizes), size=n)].T
    return Measured(video, np.where(video, rng.choice([1, 3, 30, 60, 200], n), 1), height, width)


RULES = SizeRules(
    video_sample_n_frames=17,
    video_sample_size=128,
    image_sample_size=512,
    token_sample_size=256,
    enable_bucket=True,
    random_hw_adapt=True,
    training_with_video_token_length=True,
    random_frame_crop=True,
    control_ref_image="random",
)


def usable(records: Measured) -> set[int]:
    return set(np.flatnonzero(~records.kind_video | (records.frames >= 2)).tolist())


def drawn(plan: Plan) -> Counter:
    return Counter(draw.record for step in plan for draw in step)


def test_every_record_is_drawn_in_every_epoch():
    records = mixed(200)
    good = usable(records)
    assert len(good) < 200
    orders = []
    for epoch in (0, 1, 7):
        plan = Plan(records, RULES, epoch, group=1, seed=3)
        assert {record for record, _ in plan.left_out} == set(range(200)) - good
        assert all("1 frames; video_sample_stride needs at least 2" in reason for _, reason in plan.left_out)
        assert drawn(plan) == Counter(good)
        orders.append([draw.record for step in plan for draw in step])
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("group", [4, 7, 64])
def test_groups_run_on_and_nothing_repeats(group):
    """After any number of epochs the clips of a bucket were drawn equally often to within one."""
    records, counts, lengths = mixed(200), Counter(), []
    bucket_of = {}
    for record in usable(records):
        taken = frame_window(RULES, int(records.frames[record]), 24.0)[0] if records.kind_video[record] else 1
        ratio = records.height[record] / records.width[record]
        aspect = min(BUCKETS, key=lambda key: abs(key - ratio))
        bucket_of[record] = bool(records.kind_video[record]), aspect, Geometry().legal_frames(taken)
    members = defaultdict(list)
    for record, bucket in bucket_of.items():
        members[bucket].append(record)
    assert min(map(len, members.values())) < 7
    for epoch in range(9):
        plan = Plan(records, RULES, epoch, group=group, seed=3)
        assert plan.micro_steps_before(epoch) == sum(lengths)
        lengths.append(len(plan))
        assert not any(draw.repeat for step in plan for draw in step)
        assert all(len({bucket_of[draw.record] for draw in step}) == 1 for step in plan)
        counts += drawn(plan)
        for inside in members.values():
            samples = -(-(epoch + 1) * len(inside) // group) * group
            each, more = divmod(samples, len(inside))
            found = sorted(counts[record] for record in inside)
            assert found == [each] * (len(inside) - more) + [each + 1] * more
        assert plan.repeats(epoch + 1) == counts.total() - (epoch + 1) * len(bucket_of) >= 0
    assert len(set(lengths)) > 1
    if group == 64:
        assert max(plan.repeats(epochs) for epochs in (10, 100, 1000)) < group * len(members)


def in_order(monkeypatch) -> None:
    """The groups of an epoch come bucket after bucket, as they were cut."""

    def ordered(n: int, seed: int, what: str, *where: int | str) -> np.ndarray:
        return np.arange(n) if what == "micro-steps" else permutation(n, seed, what, *where)

    monkeypatch.setattr("reeltune.data.plan.permutation", ordered)


@pytest.mark.parametrize("n", [1, 3, 5, 12])
def test_groups_are_cut_from_one_endless_sequence(monkeypatch, n):
    """Of whatever size they are; each belongs to the epoch in which it starts; and other buckets change nothing."""
    in_order(monkeypatch)
    clips = [50] * n
    alone = Measured([True] * n, clips, [64] * n, [64] * n)
    beside = Measured([True] * n + [False] * 9, clips + [1] * 9, [64] * (n + 9), [64] * (n + 9))
    rules = SizeRules(video_sample_n_frames=5)

    def sequence(records, group) -> list[int]:
        found = []
        for epoch in range(12):
            steps = [step for step in Plan(records, rules, epoch, group=group, seed=2) if step[0].record < n]
            for step in steps:
                assert epoch * n <= len(found) < (epoch + 1) * n
                found += [draw.record for draw in step]
            assert len(found) >= (epoch + 1) * n  # none of the epoch is left for a later one
        return found[: 12 * n]

    whole = sequence(alone, 1)
    assert all(set(whole[i : i + n]) == set(range(n)) for i in range(0, len(whole), n))
    assert len({tuple(whole[i : i + n]) for i in range(0, len(whole), n)}) > 1 or n == 1
    for group in (2, 5, 7, 30):
        assert sequence(alone, group) == sequence(beside, group) == whole


def test_a_bucket_smaller_than_a_group_skips_epochs():
    records = Measured([True], [200], [64], [64])
    lengths = [len(Plan(records, SizeRules(video_sample_n_frames=5), epoch, group=4, seed=0)) for epoch in range(9)]
    assert lengths == [1, 0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("runs_on", [True, False])
def test_epochs_and_micro_steps_count_alike(runs_on):
    records = mixed(60)
    plan = Plan(records, RULES, group=8, seed=1, runs_on=runs_on)
    before = [plan.micro_steps_before(epoch) for epoch in range(30)]
    assert before[0] == 0 and before == sorted(before)
    for micro_steps in range(1, before[-1] + 1):
        epochs = plan.epochs_within(micro_steps)
        assert before[epochs - 1] < micro_steps <= before[epochs]
    assert Plan(Measured([], [], [], []), RULES, group=8, seed=1).epochs_within(5) == 0


def test_old_checkpoints_fill_up_every_epoch():
    """The rule of runs begun without a plan_version: each epoch draws all, and repeats of its own fill the groups."""
    records = mixed(200)
    for epoch in (0, 1, 7):
        plan = Plan(records, RULES, epoch, group=4, seed=3, runs_on=False)
        draws = [draw for step in plan for draw in step]
        assert Counter(draw.record for draw in draws if not draw.repeat) == Counter(usable(records))
        assert len(draws) == len(plan) * 4 == len(usable(records)) + sum(draw.repeat for draw in draws)
        assert plan.micro_steps_before(epoch) == epoch * len(plan)
        assert plan.repeats(3) == 3 * sum(draw.repeat for draw in draws) > 0
        assert all({d.record for d in step if d.repeat} < {d.record for d in draws} for step in plan)


def test_groups_are_of_one_kind_aspect_and_length():
    records = mixed(300)
    plan = Plan(records, RULES, group=4, seed=3)
    for step in plan:
        assert len({draw.shape for draw in step}) == 1
        legal = {
            Geometry().legal_frames(frame_window(RULES, int(records.frames[draw.record]), 24.0)[0])
            if records.kind_video[draw.record]
            else 1
            for draw in step
        }
        assert len(legal) == len({bool(records.kind_video[draw.record]) for draw in step}) == 1
        ratios = {int(records.height[d.record]) / int(records.width[d.record]) for d in step}
        assert max(ratios) - min(ratios) < 0.02


def test_draws_are_in_the_support_and_in_the_file():
    records = mixed(300)
    plan = Plan(records, RULES, group=2, seed=5)
    references = Counter()
    for step in plan:
        sources, kinds = [], set()
        for draw in step:
            i = draw.record
            kind = "video" if records.kind_video[i] else "image"
            taken = frame_window(RULES, int(records.frames[i]), 24.0)[0] if kind == "video" else 1
            sources.append(Source(kind, int(records.height[i]), int(records.width[i]), taken))
            kinds.add(kind)
            assert len(draw.frames) == draw.shape.frames
            assert 0 <= draw.frames[0] <= draw.frames[-1] < records.frames[i]
            assert set(np.diff(draw.frames).tolist()) <= {2}
            assert 0 <= draw.ref_frame < draw.shape.frames
            assert 0 <= draw.crop.top <= draw.crop.height - draw.shape.height
            assert 0 <= draw.crop.left <= draw.crop.width - draw.shape.width
            references[draw.ref_frame == 0, draw.shape.frames > 1] += 1
        support = {(o.resize, Shape(o.frames, *o.crop)) for o in outcomes(RULES, sources)}
        assert (tuple((d.crop.height, d.crop.width) for d in step), step[0].shape) in support
    assert references[False, True] > references[True, True] > 0  # 0.6 and 0.4


def test_shapes_are_drawn_with_the_probabilities_of_the_support(monkeypatch):
    """Fed with evenly spaced chances instead of drawn ones, the counts are the probabilities."""
    n = 6000
    monkeypatch.setattr("reeltune.data.plan.uniform", lambda n, *_: (np.arange(n) + 0.5) / n)
    records = Measured([True] * n, [200] * n, [720] * n, [1280] * n)
    plan = Plan(records, RULES, group=1, seed=5)
    counts = Counter(plan[k][0].shape for k in range(n))
    support = outcomes(RULES, [Source("video", 720, 1280, 17)])
    assert len(counts) == len(support) > 8
    for outcome in support:
        assert abs(counts[Shape(outcome.frames, *outcome.crop)] - n * outcome.p) <= 1


def test_starts_are_even():
    records = Measured([True], [40], [64], [64])
    rules = SizeRules(video_sample_n_frames=17, video_sample_size=64, image_sample_size=64)
    starts = Counter(Plan(records, rules, epoch, group=1, seed=0)[0][0].frames[0] for epoch in range(2000))
    assert set(starts) == set(range(8))  # 40 - 33 + 1
    assert max(abs(count - 250) for count in starts.values()) < 70  # 4.7 standard deviations


def test_random_frame_crop_takes_the_first_frames_of_the_same_window():
    records = Measured([True], [40], [64], [64])
    rules = SizeRules(video_sample_n_frames=17, video_sample_size=64, image_sample_size=64)
    shorter = SizeRules(video_sample_n_frames=17, video_sample_size=64, image_sample_size=64, random_frame_crop=True)
    lengths = set()
    for epoch in range(60):
        whole = Plan(records, rules, epoch, group=1, seed=0)[0][0]
        cut = Plan(records, shorter, epoch, group=1, seed=0)[0][0]
        lengths.add(cut.shape.frames)
        assert cut.frames == whole.frames[: cut.shape.frames]
    assert lengths > {17}


def test_a_plan_is_a_function_of_its_arguments():
    records = mixed(150)
    make = partial(Plan, records, RULES, group=4, seed=9, strata=2, largest_first=True)
    plan, again = make(2), pickle.loads(pickle.dumps(make))(epoch=2)  # noqa: S301
    assert list(plan) == list(again)
    assert plan.share(3, 1, 3) == plan[3][1:3]
    assert plan[-1] == plan[len(plan) - 1]
    with pytest.raises(IndexError):
        plan[len(plan)]
    other = partial(Plan, records, RULES, 2, group=4, strata=2)(seed=10)
    assert [d.record for step in plan for d in step] != [d.record for step in other for d in step]
    seeds = [draw.seed for epoch in range(3) for step in make(epoch) for draw in step]
    assert len(set(seeds)) == len(seeds)


def test_equal_records_in_one_batch_differ():
    records = Measured([True], [200], [64], [64])
    for runs_on in (True, False):
        [step] = plan = Plan(records, SizeRules(video_sample_n_frames=5), group=4, seed=0, runs_on=runs_on)
        assert [draw.repeat for draw in step] == [False] + [not runs_on] * 3
        assert len({draw.seed for draw in step}) == 4
        assert len({draw.frames for draw in step}) > 1
        assert plan.repeats(1) == 3


def test_largest_first():
    records = mixed(400)
    tokens = [
        [
            RULES.geometry.tokens(step[0].shape)
            for step in Plan(records, RULES, epoch, group=4, seed=1, largest_first=True)
        ]
        for epoch in (0, 1)
    ]
    assert tokens[0][0] == max(tokens[0]) > tokens[0][1]
    assert tokens[1][0] < max(tokens[1])
    usual = Plan(records, RULES, 0, group=4, seed=1)
    assert sorted(RULES.geometry.tokens(step[0].shape) for step in usual) == sorted(tokens[0])


@pytest.mark.parametrize(("repeat", "times"), [(-1, 1), (0, 1), (1, 1), (3, 3)])
def test_video_repeat(repeat, times):
    records = Measured([True, True, False], [50, 50, 1], [64, 64, 64], [64, 64, 64])
    plan = Plan(records, SizeRules(video_sample_n_frames=5), group=1, seed=0, video_repeat=repeat)
    assert Counter(step[0].record for step in plan) == {0: times, 1: times, 2: 1}


@pytest.mark.parametrize("runs_on", [True, False])
def test_stand_ins(runs_on):
    """Same shape and long enough, each record of the bucket once and never the broken one; then others of the kind."""
    records = mixed(60, seed=4)
    plan = Plan(records, RULES, group=4, seed=2, runs_on=runs_on)
    outside = 0
    for k in range(len(plan)):
        for position, draw in enumerate(plan[k]):
            tried = []
            for attempt in range(1, 100):
                try:
                    other = plan.stand_in(k, position, attempt)
                except LookupError:
                    break
                assert other == plan.stand_in(k, position, attempt)
                assert (other.shape, other.repeat) == (draw.shape, True)
                assert records.kind_video[other.record] == records.kind_video[draw.record]
                assert other.frames[-1] < records.frames[other.record]
                tried.append(other.record)
            assert draw.record not in tried
            assert len(set(tried)) == len(tried)
            outside += any(records.frames[record] != records.frames[draw.record] for record in tried)
        first = [plan.stand_in(k, position, 1).record for position in range(4) if not plan[k][position].repeat]
        assert len(first) < 2 or len(set(first)) > 1
    assert outside


def test_the_first_stand_in_is_from_the_next_group():
    records = Measured([True] * 12, [50] * 12, [64] * 12, [64] * 12)
    plan = Plan(records, SizeRules(video_sample_n_frames=5), group=4, seed=2)
    nexts = {frozenset(plan.stand_in(k, i, 1).record for i in range(4)) for k in range(3)}
    assert nexts == {frozenset(draw.record for draw in step) for step in plan}


def test_time_resampling_without_a_frame_rate():
    records = Measured([True, True], [50, 50], [64, 64], [64, 64], fps=np.array([0.0, 30.0]))
    rules = SizeRules(video_sample_n_frames=5, video_sample_fps=10.0)
    plan = Plan(records, rules, group=1, seed=0)
    assert plan.left_out == [(0, "its frame rate is unknown; video_sample_fps needs one, video_sample_stride does not")]
    assert np.diff(plan[0][0].frames).tolist() == [3, 3, 3, 3]
    short = Plan(Measured([True], [2], [64], [64], fps=30.0), rules, group=1, seed=0)
    assert len(short) == 0
    assert "2 frames at 30 per second" in short.left_out[0][1]


def test_strata_follow_the_ranks():
    records = Measured([True] * 12, [50] * 12, [64] * 12, [64] * 12)
    plan = Plan(records, SizeRules(video_sample_n_frames=5), group=12, seed=0, strata=4)
    assert [draw.stratum for draw in plan[0]] == [(i, 4) for i in range(4) for _ in range(3)]


@pytest.mark.slow
def test_a_million_records():
    """Building takes about a second and 130 MB for a moment, and 17 bytes a record stay (measured, 2026-11)."""
    records = mixed(1_000_000)
    tracemalloc.start()
    plan = Plan(records, RULES, group=1, seed=1, largest_first=True)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 20e6 + 200 * len(plan.left_out)
    assert peak < 200e6
    before = tracemalloc_of(lambda: [plan[k] for k in range(0, len(plan), 10_000)])
    assert before < 1e6
    assert np.array_equal(np.unique(plan.outline()[2]), np.flatnonzero(~records.kind_video | (records.frames >= 2)))


def tracemalloc_of(work) -> int:
    tracemalloc.start()
    work()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return kept
