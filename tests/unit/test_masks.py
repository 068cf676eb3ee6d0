"""Masks: frame patterns exactly, coverage against the released tools' statistics, and one seed one mask."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from reeltune.core.types import MaskLaw, Shape
from reeltune.data.masks import KINDS, MOST_GIVEN, draw_mask

MISS = 1e-9  # chance that a test of draws may fail although the masks are right
DEVIATIONS = 6.5  # of a mean; beyond is rarer than that
DRAWS = 400  # for means
REFERENCE_KINDS = list(MaskLaw().clip)  # in the order of the reference's numbers


def draws_for(probability: float) -> int:
    """How many see everything that is no rarer."""
    return math.ceil(math.log(MISS * probability) / math.log1p(-probability))  # there are at most 1 / probability


def only(kind: str) -> MaskLaw:
    return MaskLaw(clip={kind: 1.0}, picture={kind: 1.0})


def patterns(kind: str, frames: int) -> set[tuple[int, ...]]:
    masks = [draw_mask(seed, Shape(frames, 8, 8), only(kind)) for seed in range(draws_for(1 / MOST_GIVEN))]
    for mask in masks:
        assert (mask == mask[:, :1, :1]).all()
    return {tuple(map(int, mask[:, 0, 0])) for mask in masks}


@pytest.mark.golden("data/stochastic.json")
def test_probabilities_of_the_reference(goldens):
    constants = json.loads((goldens / "data/stochastic.json").read_text())["constants"]
    for law, name in ((MaskLaw().clip, "mask_index_video"), (MaskLaw().picture, "mask_index_image")):
        assert {REFERENCE_KINDS[int(index)]: p for index, p in constants[name].items()} == law


@pytest.mark.golden("data/masks.json")
def test_frame_patterns_of_the_reference(goldens):
    for case in json.loads((goldens / "data/masks.json").read_text())["deterministic"]:
        frames = case["frames"]
        mask = draw_mask(0, Shape(frames, 4, 4), MaskLaw({"after_first": 1.0}, {"all": 1.0}))
        assert mask[:, 0, 0].astype(int).tolist() == case["image_start_only"]
        for kind, name in (("after_start", "type2"), ("between_ends", "type3")):
            if case[name] is not None:
                assert patterns(kind, frames) == {tuple(pattern) for pattern in case[name].values()}


@pytest.mark.slow
@pytest.mark.golden("data/masks.json")
def test_coverage_of_the_reference(goldens):
    for case in json.loads((goldens / "data/masks.json").read_text())["statistics"]:
        if case["errors"]:  # theirs fails on sides under 8 pixels
            continue
        shape, kind = Shape(case["frames"], case["height"], case["width"]), REFERENCE_KINDS[case["mask_index"]]
        per_frame = np.array([draw_mask(seed, shape, only(kind)).mean(axis=(1, 2)) for seed in range(DRAWS)])
        per_mask = per_frame.mean(axis=1)
        for ours, theirs in ((per_frame, case["coverage_per_frame"]), (per_mask, case["coverage_mean"])):
            spread = DEVIATIONS * ours.std(axis=0) * math.sqrt(1 / DRAWS + 1 / case["draws"])
            assert (abs(ours.mean(axis=0) - theirs) <= spread + ROUNDED).all(), (kind, shape)
        rare = MISS ** (1 / case["draws"])  # their largest of so many is no smaller than this share of masks
        assert np.quantile(per_mask, rare - MARGIN) <= case["coverage_max"] + ROUNDED, (kind, shape)
        assert np.quantile(per_mask, 1 - rare + MARGIN) >= case["coverage_min"] - ROUNDED, (kind, shape)


ROUNDED = 1e-3  # the reference's numbers have three digits
MARGIN = 0.05  # of a quantile over DRAWS


def rarest(kind: str, frames: int) -> float:
    """A bound from below on the probability of any count of touched frames; none is as rare as all frames by coin."""
    middle = frames // 2
    outcomes = {
        "after_start": MOST_GIVEN,
        "between_ends": MOST_GIVEN,
        "block_in_time": max(middle, 1) * max(frames - middle, 1),  # first frame, last frame
        "boxes": max(middle, 1),
        "frames": 2**frames,
    }
    return 1 / max(outcomes.get(kind, 1), 2)


@pytest.mark.golden("data/masks.json")
def test_touched_frames_of_the_reference(goldens):
    """All that they touched in their draws, and nothing more that they could not have missed."""
    for case in json.loads((goldens / "data/masks.json").read_text())["statistics"]:
        frames, kind = case["frames"], REFERENCE_KINDS[case["mask_index"]]
        if case["errors"] or (kind == "frames" and frames > MOST_TOSSED):
            continue
        draws = draws_for(rarest(kind, frames))
        masks = (draw_mask(seed, Shape(frames, 8, 8), only(kind)) for seed in range(draws))  # sides do not matter
        touched = Counter(int(mask.any(axis=(1, 2)).sum()) for mask in masks)
        assert touched.keys() >= set(case["touched_frames"]), (kind, frames)
        often = {count for count, times in touched.items() if (1 - times / draws / 2) ** case["draws"] < MISS}
        assert often <= set(case["touched_frames"]), (kind, frames)


MOST_TOSSED = 5  # frames by coin of which all and none are soon drawn


def test_a_seed_is_a_mask():
    shape = Shape(9, 32, 48)
    masks = [draw_mask(seed, shape, MaskLaw()) for seed in range(50)]
    assert all(mask.shape == shape and mask.dtype == bool for mask in masks)
    assert len({mask.tobytes() for mask in masks}) > 20
    for seed, mask in enumerate(masks):
        np.testing.assert_array_equal(draw_mask(seed, shape, MaskLaw()), mask)
    fixed = draw_mask(7, Shape(2, 4, 4), only("coin")).astype(int).tolist()
    assert fixed == [
        [[1, 0, 0, 1], [1, 1, 1, 0], [1, 0, 0, 1], [1, 1, 0, 1]],
        [[0, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1], [0, 1, 0, 0]],
    ]


def test_share_of_kinds():
    """1,000 seeds: each kind within four standard deviations of its probability, told by its own look."""
    masks = [draw_mask(seed, Shape(5, 8, 8), MaskLaw()) for seed in range(1000)]
    everything = sum(mask.all() for mask in masks) / 1000
    assert abs(everything - (0.2 + 0.05 / 32)) < 4 * 0.0127


@pytest.mark.parametrize("frames", [1, 5])
def test_spots(frames):
    shape = Shape(frames, 32, 32)
    for kind in ("ellipse", "disc"):
        first = draw_mask(3, shape, only(kind))
        assert first[0].any()
        assert not first[1:].any()
        everywhere = draw_mask(3, shape, MaskLaw({kind: 1.0}, {kind: 1.0}, spots_on_all_frames=True))
        assert (everywhere == first[:1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [Shape(1, 1, 1), Shape(2, 2, 3), Shape(5, 7, 4)])
def test_tiny_clips_have_masks_too(kind, shape):
    for seed in range(20):
        assert draw_mask(seed, shape, only(kind)).shape == shape
