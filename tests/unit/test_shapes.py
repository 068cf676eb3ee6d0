"""Sizes and frame windows, enumerated: against the released tools' supports, and where we decided otherwise."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from reeltune.core.types import Geometry, Shape, SizeLaw
from reeltune.data.shapes import (
    BUCKETS,
    RATIO_CROPS,
    SizeRules,
    Source,
    bucket_of,
    budget_frames,
    centre_crop,
    clip_length,
    frame_indices,
    frame_window,
    loaded_size,
    lone_frames,
    outcomes,
    reference_frame,
    rungs_for,
    shapes_of,
)

LAWS = {  # the families of sizes.json: first weight, nearest rung, geometry
    "fun_control": (SizeLaw(0.9, 0.5), Geometry()),
    "fun": (SizeLaw(0.9, None), Geometry()),
    "fun22": (SizeLaw(0.9, 0.5), Geometry()),
    "plain": (SizeLaw(0.75, None), Geometry()),
    "cogvideox": (SizeLaw(0.75, None), Geometry()),
    "cogvideox15": (SizeLaw(0.75, None), Geometry(patch_time=2)),
    "easyanimate": (SizeLaw(0.75, None), Geometry()),
}
SAME = 1e-11  # probabilities in the files have 12 digits


def family_rules(family: str, **flags) -> SizeRules:
    name, _, stride = family.partition("_s") if family.startswith("fun22") else (family, "", "")
    law, geometry = LAWS[name]
    if stride:
        geometry = replace(geometry, space_stride=int(stride))
    known = {f.name for f in fields(SizeRules)}
    flags = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items()}
    assert flags.keys() <= known
    return SizeRules(enable_bucket=True, law=law, geometry=geometry, **flags)


def golden_frames(rules: SizeRules, side: int) -> int:
    """The released tools' frames at a side: rounds to 4k before adding 1, so it can pass budget and request."""
    n = rules.video_sample_n_frames
    return int(min(n * rules.token_sample_size**2 / side / side, n) // 4 * 4 + 1)


@pytest.mark.golden("data/sizes.json")
def test_sizes_of_the_reference(goldens, monkeypatch):
    """Everything equal, but for frames under a token budget and the resize pair of all examples but the first."""
    cases = json.loads((goldens / "data/sizes.json").read_text())
    assert len(cases) > 100
    for case in cases:
        rules = family_rules(case["family"], **case["flags"])
        batch = []
        for b in case["batch"]:
            video = b["kind"] == "video"
            size = loaded_size(rules, video, b["height"], b["width"])
            taken = clip_length(rules, b["frames"], 24.0) if video else 1
            assert (*size, taken) == (b["loaded_height"], b["loaded_width"], b["loaded_frames"]), case["id"]
            batch.append(Source(b["kind"], b["height"], b["width"], int(taken)))
        if rules.by_budget and batch[0].kind == "video":
            check_budget(case, rules, batch, monkeypatch)
        else:
            same_support(case, rules, outcomes(rules, batch))


def check_budget(case, rules, batch, monkeypatch):
    """Equal to the golden once our frames(L) is replaced by theirs, which is never shorter."""
    ours = outcomes(rules, batch)
    assert all(outcome.frames <= rules.video_sample_n_frames for outcome in ours)
    assert all(budget_frames(rules, side) <= golden_frames(rules, side) for side in rules.ladder)
    with monkeypatch.context() as patch:
        patch.setattr(
            "reeltune.data.shapes.budget_frames",
            lambda rules, side: rules.geometry.legal_frames(golden_frames(rules, side)),
        )
        theirs = outcomes(rules, batch)
    same_support(case, rules, theirs)
    assert {outcome.crop for outcome in ours} == {outcome.crop for outcome in theirs}


def same_support(case, rules, ours):
    first = {(o.resize[0], o.crop, o.frames): o.p for o in ours}
    assert len(first) == len(ours)
    golden = {(tuple(o["resize"][0]), tuple(o["crop"]), o["frames"]): o["p"] for o in case["outcomes"]}
    assert first.keys() == golden.keys(), case["id"]
    assert all(abs(first[key] - golden[key]) < SAME for key in golden), case["id"]
    for outcome in case["outcomes"]:
        if not rules.random_ratio_crop:  # theirs: the first example's pair for all
            assert all(resize == outcome["resize"][0] for resize in outcome["resize"])
    if rules.random_ratio_crop:  # theirs: each its own, as ours
        resizes = {(tuple(map(tuple, o["resize"])), tuple(o["crop"])) for o in case["outcomes"]}
        assert resizes == {(o.resize, o.crop) for o in ours}


@pytest.mark.golden("data/frames.json")
def test_frames_of_the_reference(goldens):
    checked = 0
    for case in json.loads((goldens / "data/frames.json").read_text()):
        if (case["drop_start"], case["drop_end"]) != (0.0, 1.0):
            continue  # cutting off the ends of clips is not offered
        rules = SizeRules(video_sample_n_frames=case["n_frames"], video_sample_stride=case["stride"])
        count, latest = frame_window(rules, case["total"], 24.0)
        checked += 1
        if "error" in case:
            assert count == 0
            continue
        assert count == case["n_sampled"]
        assert [0, latest] == case["start_range"]
        assert list(frame_indices(rules, 24.0, 0, count)) == case["indices_first"]
        assert list(frame_indices(rules, 24.0, latest, count)) == case["indices_last"]
    assert checked > 20


@pytest.mark.golden("data/buckets.json")
def test_tables_of_the_reference(goldens):
    golden = json.loads((goldens / "data/buckets.json").read_text())
    assert {float(key): tuple(size) for key, size in golden["table_512"].items()} == BUCKETS
    assert {float(key): tuple(size) for key, size in golden["random_crop_table_512"].items()} == {
        key: BUCKETS[key] for key in RATIO_CROPS
    }
    for case in golden["closest"]:
        key = list(BUCKETS)[int(bucket_of(case["height"], case["width"]))]
        assert (key, BUCKETS[key]) == (float(case["ratio_key"]), tuple(case["size_512"]))
    for case in golden["scaled"]:
        rules = SizeRules(
            image_sample_size=case["sample_size"],
            enable_bucket=True,
            geometry=Geometry(space_stride=case["multiple"] // 2),
        )
        for i, size in enumerate(case["table"].values()):
            [(p, shape)] = shapes_of(rules, "image", i, 1, 1)
            assert (p, shape[1:]) == (1.0, tuple(size))


@pytest.mark.golden("data/resize_frame.json")
def test_short_side_shrink_of_the_reference(goldens):
    for case in json.loads((goldens / "data/resize_frame.json").read_text()):
        rules = SizeRules(video_sample_size=case["target_short_side"], image_sample_size=16)
        assert list(loaded_size(rules, True, case["height"], case["width"])) == case["out"]


@pytest.mark.golden("data/stochastic.json")
def test_stochastic_tables_of_the_reference(goldens):
    golden = json.loads((goldens / "data/stochastic.json").read_text())
    for case in golden["length_to_frames"]:
        sizes = {key: value for key, value in case.items() if key != "table"}
        rules = SizeRules(enable_bucket=True, random_hw_adapt=True, training_with_video_token_length=True, **sizes)
        assert rules.ladder == [int(side) for side in case["table"]]
        for side, frames in case["table"].items():
            assert golden_frames(rules, int(side)) == frames
            assert budget_frames(rules, int(side)) <= frames
    for case in golden["clip_index"]:
        for rule in ("first_frame", "random"):
            ours = reference_frame(SizeRules(control_ref_image=rule), case["frames"])
            np.testing.assert_allclose(ours, case[rule], rtol=0, atol=1e-12)
    for case in golden["downsample_ratio"]:
        kind, size = case["kind"], case["sample_size"]
        sizes = {"video_sample_size": size} if kind == "video" else {
            "image_sample_size": size, "video_sample_size": case["video_sample_size"]
        }  # fmt: skip
        for name, first_weight in (("p_fun", 0.9), ("p_plain", 0.75)):
            rules = SizeRules(enable_bucket=True, random_hw_adapt=True, law=SizeLaw(first_weight), **sizes)
            ours = {shape.height: p for p, shape in shapes_of(rules, kind, list(BUCKETS).index(1.0), 1, 1)}
            theirs = {}
            for ratio, p in zip(case["ratios"], case[name], strict=True):
                side = int(size / ratio / 16) * 16
                theirs[side] = theirs.get(side, 0) + p
            assert ours.keys() == theirs.keys()
            assert all(abs(ours[side] - theirs[side]) < SAME for side in ours)
    constants = golden["constants"]
    assert {
        f"{key:g}" if key % 1 else f"{key:.1f}": w / sum(RATIO_CROPS.values()) for key, w in RATIO_CROPS.items()
    } == (pytest.approx(constants["random_ratio_crop_prob"], abs=SAME))


def frame_support(rules: SizeRules, frames: int) -> dict[int, float]:
    support: dict[int, float] = {}
    for p, shape in shapes_of(rules, "video", 20, frames, 1):
        support[shape.frames] = support.get(shape.frames, 0.0) + p
    return support


@pytest.mark.golden("data/train_step_ops.json")
def test_training_step_cuts_of_the_reference(goldens):
    """Families that cut pixel frames by a pixel count agree with us; the others take its latent count for it."""
    checked = set()
    for case in json.loads((goldens / "data/train_step_ops.json").read_text()):
        family, n, given = case["family"], case["video_sample_n_frames"], case.get("frames_in")
        if family not in LAWS:  # easyanimate_nocache: a VAE of 4k frames, which no supported checkpoint has
            continue
        golden = pytest.approx({o["frames"]: o["p"] for o in case["outcomes"]}, abs=SAME)
        rules = SizeRules(video_sample_n_frames=n, random_frame_crop=True, geometry=LAWS[family][1])
        sound = family in ("cogvideox", "cogvideox15", "easyanimate")
        if case["op"] == "random_frame_crop" and n % 4 != 1 and n > 4:
            continue  # theirs passes the request
        if case["op"] == "random_frame_crop" and sound:
            assert frame_support(rules, given) == golden
        elif case["op"] == "random_frame_crop":
            latents = {}
            for pixels, p in frame_support(rules, n).items():
                cut = min((pixels - 1) // 4 + 1, given)
                latents[cut] = latents.get(cut, 0) + p
            assert latents == golden
        elif case["op"] == "keep_all_node_same_token_length" and sound and case["height"] == case["width"]:
            # The frames that a budget allows, as ours; but the budget is drawn anew, where we keep the given one.
            top = case["token_sample_size"]
            tokens = sorted({*range(256, top + 1, 128), top}) if top > 256 else [256]
            ours = {}
            for token in tokens:
                frames = min(budget_frames(replace(rules, token_sample_size=token), case["height"]), given)
                ours[frames] = ours.get(frames, 0) + 1 / len(tokens)
            assert ours == golden
        checked.add((case["op"], sound))
    assert {("random_frame_crop", True), ("random_frame_crop", False)} <= checked
    assert ("keep_all_node_same_token_length", True) in checked


@pytest.mark.parametrize(
    ("n", "token", "side", "frames"),
    [
        (49, 512, 512, 49),
        (49, 512, 640, 29),
        (49, 512, 768, 21),
        (49, 512, 896, 13),
        (49, 512, 1024, 9),
        (49, 512, 5000, 1),
        (81, 640, 640, 81),
        (81, 640, 768, 53),
        (81, 640, 1024, 29),
        (80, 512, 512, 77),  # never over the request
        (49, 512, 256, 49),
    ],
)
def test_frames_under_a_token_budget(n, token, side, frames):
    rules = SizeRules(video_sample_n_frames=n, token_sample_size=token)
    assert budget_frames(rules, side) == frames
    assert (frames - 1) % 4 == 0
    assert frames == 1 or frames * side**2 <= n * token**2


def test_a_clip_is_enlarged_by_less_than_a_quarter():
    rules = SizeRules(video_sample_size=256, image_sample_size=1024)
    assert rules.ladder == [256, 384, 512, 640, 768, 896, 1024]
    assert rungs_for(rules, [512, 512.5, 520, 5000, 200]).tolist() == [3, 4, 4, 7, 7]


def test_every_example_is_covered_by_its_own_size():
    rules = SizeRules(enable_bucket=True, video_sample_size=256, image_sample_size=256)
    [outcome] = outcomes(rules, [Source("video", 720, 1280, 49), Source("video", 480, 832, 49)])
    assert outcome.crop == (192, 336)
    assert outcome.resize == ((192, 341), (194, 336))
    assert centre_crop((192, 341), Shape(49, 192, 336)) == (192, 341, 0, 2)
    assert centre_crop((197, 339), Shape(49, 192, 336)) == (197, 339, 2, 2)


def test_no_bucket_is_a_centre_square():
    rules = SizeRules(video_sample_size=250, image_sample_size=96, random_frame_crop=True, video_sample_n_frames=9)
    clip = outcomes(rules, [Source("video", 480, 832, 9)])
    assert {(o.crop, o.frames): round(o.p, 9) for o in clip} == {((240, 240), 5): 0.1, ((240, 240), 9): 0.9}
    assert {o.resize for o in clip} == {((240, 415),)}
    [image] = outcomes(rules, [Source("image", 1000, 500, 1)])
    assert (image.resize, image.crop, image.frames) == (((192, 96),), (96, 96), 1)
    assert image.p == pytest.approx(1)


def test_sizes_never_vanish():
    rules = SizeRules(image_sample_size=16, enable_bucket=True)
    assert shapes_of(rules, "image", 0, 1, 1) == [(1.0, Shape(1, 16, 32))]


def test_two_latent_frames_a_token():
    geometry = Geometry(patch_time=2)
    assert [geometry.legal_frames(frames) for frames in (1, 5, 9, 13, 49, 81)] == [1, 5, 5, 13, 45, 77]
    rules = SizeRules(video_sample_n_frames=17, random_frame_crop=True, geometry=geometry)
    assert frame_support(rules, 17) == pytest.approx({5: 0.2 / 3, 13: 0.9 + 0.1 / 3})


@pytest.mark.parametrize(
    ("fps", "rate", "expected"),
    [
        (30.0, 15.0, (0, 2, 4, 6, 8)),
        (29.97, 9.99, (0, 3, 6, 9, 12)),
        (24.0, 16.0, (0, 1, 3, 4, 6)),
        (8.0, 16.0, (0, 0, 1, 1, 2)),
    ],
)
def test_resampling_in_time(fps, rate, expected):
    rules = SizeRules(video_sample_n_frames=5, video_sample_fps=rate, video_sample_stride=7)
    count, latest = frame_window(rules, 40, fps)
    assert frame_indices(rules, fps, 0, count) == expected
    assert frame_indices(rules, fps, latest, count)[-1] == 39
    assert clip_length(rules, [40, 1, 40], [fps, fps, 0.0]).tolist() == [5, int(rate / fps + 1e-6), 0]


def test_supports_add_to_one():
    rules = SizeRules(
        video_sample_size=256,
        image_sample_size=1024,
        enable_bucket=True,
        random_hw_adapt=True,
        training_with_video_token_length=True,
        random_frame_crop=True,
        random_ratio_crop=True,
    )
    for source in (Source("video", 720, 1280, 49), Source("image", 900, 600, 1)):
        support = outcomes(rules, [source])
        assert len(support) > 40
        assert sum(o.p for o in support) == pytest.approx(1, abs=1e-12)
        assert all(h >= o.crop[0] and w >= o.crop[1] for o in support for h, w in o.resize)


def test_sides_at_which_clips_become_pictures_are_told():
    rules = SizeRules(
        video_sample_n_frames=9,
        video_sample_size=256,
        image_sample_size=640,
        token_sample_size=256,
        random_hw_adapt=True,
        training_with_video_token_length=True,
    )
    assert [budget_frames(rules, side) for side in rules.ladder] == [9, 1, 1, 1]
    (line,) = lone_frames(rules)
    assert line.startswith("at side 384, 512, 640 the token budget leaves one frame")
    assert lone_frames(replace(rules, token_sample_size=640)) == []
    assert lone_frames(replace(rules, video_sample_n_frames=1)) == []
    assert lone_frames(replace(rules, training_with_video_token_length=False)) == []
