"""The ways in which a clip is read, where they are limited: pure, evenly spread, and the ones that the plan draws."""

from dataclasses import replace

import numpy as np
import pytest

from reeltune.core.types import Record
from reeltune.data.plan import Plan
from reeltune.data.records import Records
from reeltune.data.shapes import SizeRules, frame_window

RULES = SizeRules(
    video_sample_n_frames=17,
    video_sample_stride=2,
    video_sample_size=256,
    image_sample_size=512,
    token_sample_size=384,
    enable_bucket=True,
    random_hw_adapt=True,
    training_with_video_token_length=True,
    random_frame_crop=True,
    control_ref_image="random",
)


def records(count: int = 60) -> Records:
    rng = np.random.RandomState(1)
    rows = []
    for i in range(count):
        still = i % 5 == 0
        frames = 1 if still or i == 7 else int(rng.randint(2, 120))
        height, width = (int(side) for side in rng.randint(200, 900, 2))
        rate = 0.0 if still else 24.0
        rows.append(Record(i, f"/data/{i}.mp4", "", "image" if still else "video", frames, rate, height, width))
    return Records.of(rows)


def plan(epoch=0, seed=3, variants=4, given=None, **more) -> Plan:
    return Plan(given or records(), RULES, epoch, group=3, seed=seed, variants=variants, **more)


def seen(draw):
    return draw.shape, draw.crop, draw.frames, draw.ref_frame, draw.variant_seed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
def test_every_draw_is_one_of_its_records_ways(seed):
    ways = [[seen(draw) for draw in plan().ways(record)] for record in range(len(records()))]
    met = [set() for _ in ways]
    for epoch in range(36):
        drawn = plan(epoch, seed, largest_first=True)
        for k in range(len(drawn)):
            draws = drawn[k]
            assert len({draw.shape for draw in draws}) == 1
            for draw in draws:
                met[draw.record].add(ways[draw.record].index(seen(draw)))
    left_out = {record for record, _ in plan().left_out}
    assert left_out == {7} and all(not ways[record] for record in left_out)
    assert all(len(ways[record]) == 4 for record in range(len(ways)) if record not in left_out)
    assert sum(len(each) for each in met) > 0.9 * 4 * (len(ways) - len(left_out))


def test_noise_is_new_at_every_use():
    seeds = [draw.seed for epoch in range(3) for step in plan(epoch) for draw in step]
    assert len(set(seeds)) == len(seeds)


def test_more_variants_begin_with_the_same():
    few, many = plan(variants=2), plan(variants=5)
    for record in range(len(records())):
        assert [seen(draw) for draw in few.ways(record)] == [seen(draw) for draw in many.ways(record)][:2]


def test_ways_depend_neither_on_order_nor_place_of_the_data():
    rows = [replace(record, path=record.path.replace("/data", "/elsewhere")) for record in records()]
    turned = plan(given=Records.of(rows[::-1]))
    for record in range(len(rows)):
        ours, theirs = plan().ways(record), turned.ways(len(rows) - 1 - record)
        assert [seen(draw) for draw in ours] == [seen(draw) for draw in theirs]


def test_windows_are_spread_evenly():
    """The largest gap between the starts of a long clip's 8 windows is far under that of 8 chance ones."""
    long = Records.of(Record(i, f"/data/{i}.mp4", "", "video", 2000, 24.0, 512, 512) for i in range(40))
    _, latest = frame_window(RULES, 2000, 24.0)
    gaps = []
    for record in range(40):
        starts = sorted(draw.frames[0] for draw in plan(given=long, variants=8).ways(record))
        gaps.append(max(np.diff(starts)) / latest)
    assert np.mean(gaps) < 0.25  # of chance ones: 0.30


def test_shapes_keep_their_distribution():
    """The share of each shape among many variants is that of the plan without."""
    alike = Records.of(Record(i, f"/data/{i}.mp4", "", "video", 200, 24.0, 512, 512) for i in range(600))
    free = [plan(epoch, variants=0, given=alike)[k][0].shape for epoch in range(5) for k in range(200)]
    fixed = [draw.shape for draw in plan(given=alike, variants=2000).ways(0)]
    assert set(free) <= set(fixed) and len(set(free)) > 5
    for shape in set(fixed):
        share = fixed.count(shape) / 2000
        assert abs(free.count(shape) / 1000 - share) < 4 * (share / 1000) ** 0.5


def test_no_variants_no_end_of_ways():
    with pytest.raises(AssertionError, match="no end"):
        plan(variants=0).ways(0)
