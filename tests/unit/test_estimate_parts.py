"""What a forecast is put together from: counts of the data, shares of an engine, rates, the search for what fits."""

import json
from dataclasses import replace
from importlib import resources
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.types import Shape
from reeltune.data.plan import Plan
from reeltune.data.shapes import SizeRules
from reeltune.estimate import page, sharding, throughput, turns
from reeltune.estimate.epoch import forecast_data
from reeltune.estimate.machines import Machines
from reeltune.estimate.page import COLOURS, expert_rows
from reeltune.estimate.remedies import MARGIN, Change, judge, search, spend
from reeltune.estimate.result import PARTS, StepEstimate
from reeltune.training.turns import Turns
from tests.unit import metrics_rows
from tests.unit.test_plan import RULES, Measured, mixed

GB = 10**9


# ---- data


def test_an_epoch_counted_by_hand():
    """Two wide clips cut to squares, one square clip, one picture; two to a batch."""
    records = Measured([True, True, True, False], [40, 40, 40, 1], [64, 64, 64, 64], [128, 128, 64, 64], fps=8.0)
    rules = SizeRules(video_sample_n_frames=5, video_sample_size=64, image_sample_size=64, video_sample_stride=2)
    found = forecast_data(Plan(records, rules, group=2, seed=0), records, rules)
    assert [(b.shape, b.samples, b.micro_steps, b.tokens, b.aspect, b.side, b.footage_s) for b in found.buckets] == [
        (Shape(5, 64, 64), 4, 2, 2 * 16, "1:1", 64, (9 / 8, 9 / 8)),
        (Shape(1, 64, 64), 2, 1, 16, "1:1", 64, (0, 0)),
    ]
    assert found.samples == 6
    assert found.micro_steps == 3
    clips = [draw.record for step in Plan(records, rules, group=2, seed=0) for draw in step if draw.record < 3]
    wide = sum(record < 2 for record in clips)
    assert found.cropped == pytest.approx(wide / 6)
    assert found.picture_lost == pytest.approx(wide / 6 / 2)
    assert found.footage_s == pytest.approx(4 * 9 / 8)  # frames 0, 2, 4, 6, 8 of each
    assert found.step_tokens == (pytest.approx((64 + 64 + 32) / 3), 64, 64)


def test_counts_are_those_of_the_draws():
    records = mixed(300)
    plan = Plan(records, RULES, group=4, seed=3, largest_first=True)
    found = forecast_data(plan, records, RULES, accumulate=3)
    draws = [draw for step in plan for draw in step]
    tokens = [4 * RULES.geometry.tokens(step[0].shape) for step in plan]
    per_step = [sum(tokens[i : i + 3]) for i in range(0, len(tokens) - 2, 3)]
    assert {b.shape: b.samples for b in found.buckets} == {
        shape: sum(draw.shape == shape for draw in draws) for shape in {draw.shape for draw in draws}
    }
    for bucket in found.buckets:
        spans = [
            (draw.frames[-1] + 1 - draw.frames[0]) / records.fps[draw.record] if records.kind_video[draw.record] else 0
            for draw in draws
            if draw.shape == bucket.shape
        ]
        assert bucket.footage_s == pytest.approx((min(spans), max(spans)))
    assert found.step_tokens == pytest.approx((np.mean(per_step), np.percentile(per_step, 95), max(per_step)))
    lost = [1 - 1 / (max(d.crop.width / d.shape.width, 1) * max(d.crop.height / d.shape.height, 1)) for d in draws]
    assert found.picture_lost == pytest.approx(np.mean(lost), abs=0.01)  # a crop is of whole pixels
    assert found.buckets[0].shape == plan[0][0].shape


# ---- engines

PSI = 1000
STEP = {"weights": 4 * PSI, "gradients": 4 * PSI, "optimizer": 8 * PSI, "activations": 700, "frozen": 90}


def estimate(**changes) -> StepEstimate:
    step = StepEstimate(
        peaks={"backward": STEP},
        flops={},
        resident={"optimizer": 8 * PSI},
        saved_bytes=700,
        gradient_bytes=4 * PSI,
        offloaded_bytes=0,
        swapped_bytes=0,
        parameters=PSI,
        trainable=PSI,
        number_bytes=2,
        weight_bytes={"network": 4 * PSI},
        kept_bytes=4 * PSI,
        block_parameters=100,
        block_bytes=200,
        blocks=7,
        still_blocks=0,
        other_parameters=40,
        buffer_bytes=0,
    )
    return replace(step, **changes)


def test_experts_that_change_places_send_what_they_hold():
    step = estimate(peaks={"backward": STEP | {"still": 40 * PSI}})
    found = turns.changes_in(1000, 0.358, step, "one", "H100")
    assert found is not None and found.seconds is not None
    assert found.sent_bytes == 2 * 12 * PSI + 40 * PSI  # what does not learn is in the host's memory already
    least, most = found.seconds
    assert (found.count, least) == (716, pytest.approx(716 * 64 * PSI / 63e9)) and most == pytest.approx(1.26 * least)
    learner = SimpleNamespace(rest=lambda: None, wake=lambda: None)
    both = Turns([SimpleNamespace(learner=learner) for _ in range(2)], share=0.358, offset=0.2)
    whose = [both.at(step)[0] for step in range(1000)]
    assert abs(sum(a is not b for a, b in pairwise(whose)) - found.count) <= 2
    assert turns.changes_in(1000, 0.358, step, "ddp", "48GB") == replace(found, seconds=None)
    gigabytes = replace(found, sent_bytes=2 * GB, seconds=(60.0, 75.0))
    assert [row[:2] for row in expert_rows(gigabytes)] == [
        ("experts change places 716 times, between device and host", "2.0 GB each time"),
        ("time for that, beside the steps", "60.0 s to 75.0 s"),
    ]
    assert len(expert_rows(replace(found, seconds=None))) == 1
    assert turns.changes_in(1000, 0.358, step, "fsdp", "H100") is None


@pytest.mark.parametrize(
    ("engine", "gpus", "shared"),
    [
        ("one", 1, 16 * PSI),
        ("ddp", 4, 20 * PSI),  # gradients once more in buckets
        ("zero2", 4, 2 * PSI + (4 + 8 + 4) * PSI // 4 + 2 * sharding.BUCKET),
        ("zero3", 4, 2 * PSI // 4 + (4 + 8 + 4) * PSI // 4 + 2 * sharding.BUCKET + 2 * PSI),
        ("fsdp", 4, (4 + 8 + 4) * PSI // 4 + 2 * 2 * 100 + 4 * 40 + (2 + 4) * 100),
    ],
)
def test_bytes_of_weights_gradients_and_state_on_each_device(engine, gpus, shared):
    parts = sharding.peaks(estimate(), engine, gpus)[0]["backward"]
    assert parts.pop("activations") == 700
    assert parts.pop("frozen") == 90
    assert sum(parts.values()) == shared


@pytest.mark.parametrize(("engine", "gathered"), [("zero3", 120 * PSI // 100), ("fsdp", 2 * 120 + 4 * 40)])
def test_weights_in_8_bits_are_sharded_and_gathered_as_they_are(engine, gathered):
    """10 adapters' numbers of 100 of a block; scales, which are buffers, are whole in each process."""
    parts = {**STEP, "weights": 400, "gradients": 400, "optimizer": 800, "still": 950}
    coarse = estimate(peaks={"backward": parts}, trainable=100, block_bytes=120, buffer_bytes=50)
    coarse = replace(coarse, resident={"optimizer": 800})
    found = sharding.peaks(coarse, engine, 4)[0]["backward"]
    assert found["still"] == 50 + 900 // 4
    assert found["gathered"] == gathered + (0 if engine == "zero3" else (2 + 4) * 10)
    assert sharding.peaks(coarse, "zero2", 4)[0]["backward"]["still"] == 950


def test_shards_shrink_with_devices_and_copies_do_not():
    def total(engine, gpus):
        return sum(sharding.peaks(estimate(), engine, gpus)[0]["backward"].values())

    assert total("fsdp", 8) < total("fsdp", 4) < total("fsdp", 2) < total("ddp", 2) == total("ddp", 8)


def test_copies_are_of_the_precision_that_computes():
    half, full = (sharding.peaks(estimate(number_bytes=n), "zero2", 4)[0]["backward"] for n in (2, 4))
    assert {part: full[part] / half[part] for part in half if full[part] != half[part]} == dict.fromkeys(
        ("weights", "buckets"), 2
    )


def test_what_is_offloaded_is_counted_elsewhere_and_what_stays_gathered_here():
    peaks, host = sharding.peaks(estimate(), "fsdp", 4, offload=True)
    assert host == (4 + 8 + 4) * PSI // 4
    assert peaks["backward"] == {"gathered": 4 * 100 + 4 * 40 + 6 * 100, "activations": 700, "frozen": 90}
    peaks, host = sharding.peaks(estimate(), "fsdp", 4, keep_gathered=True)
    assert host == 0
    assert peaks["backward"]["gathered"] == 2 * (PSI - 40) + 4 * 40 + 6 * 100


def test_each_part_of_the_memory_has_a_colour():
    drawn = [part for _, parts in COLOURS.values() for part in parts]
    assert sorted(drawn) == sorted(PARTS)


# ---- time


def test_a_curve_goes_through_what_was_found_and_is_quadratic_between():
    curve = throughput.curve([100, 50, 10], [3 * n + 2 * n * n for n in (100, 50, 10)])
    assert [curve(n) for n in (10, 30, 100)] == pytest.approx([3 * n + 2 * n * n for n in (10, 30, 100)])


def run_folder(folder, seconds, processes=2):
    rows = [
        metrics_rows.STEP | metrics_rows.TIMES | {"step": i, "step_s": s, "samples": 4, "tokens": 400}
        for i, s in enumerate(seconds, 1)
    ]
    half = '{"kind": "step", "step_s": 1'  # of a run that still writes
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + half)
    (folder / "run.json").write_text(json.dumps({"processes": processes}))
    return folder


def test_throughput_of_an_earlier_run_and_its_error(tmp_path):
    """400 tokens in 4 samples are two micro-steps of two; 6 FLOPs a token, over two processes."""
    batch_flops = throughput.curve([100], [1200])

    def measured(seconds):
        return throughput.measured(throughput.timed_steps(run_folder(tmp_path, seconds)), batch_flops, 2)

    even = measured([9, 9, 2, 2, 2, 2])
    assert (even.low, even.high) == pytest.approx((600, 600))
    uneven = measured([9, 9, 1, 3, 1, 3])
    error = 1.96 * np.std([1, 3, 1, 3], ddof=1) / 2 / 2
    assert (uneven.low, uneven.high) == pytest.approx((600 * max(1 - error, 0.01), 600 * (1 + error)))
    assert throughput.seconds(6000, uneven, 1)[0] == pytest.approx(6000 / uneven.high)
    with pytest.raises(UserError, match="1 timed steps"):
        throughput.timed_steps(run_folder(tmp_path, [9, 9, 1]))
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        throughput.timed_steps(tmp_path / "none")


# ---- verdict


def test_what_has_less_room_than_the_error_is_not_called_safe():
    near = judge({"forward": {"weights": 60}, "backward": {"weights": 60, "gradients": 38}}, 100)
    assert (near.phase, near.need_bytes, near.spare_bytes) == ("backward", 98, 2)
    assert near.fits
    assert not near.safe
    assert judge({"forward": {"weights": int(100 / (1 + MARGIN))}}, 100).safe


SAVINGS = {"a": 10, "b": 25, "c": 30, "d": 45, "e": 60}


def offered(candidates, tried, *, goes=lambda changes: True, taken_bytes=140):
    """Names of each set offered, and the offers, where a change takes its own bytes off. tried: what is rehearsed."""

    def try_out(changes):
        names = [name for change in changes for name in change.settings]
        tried.append(names)
        left = taken_bytes - sum(SAVINGS.get(name, 0) for name in names)
        return judge({"step": {"weights": left}, "encode": {"weights": 90}}, 100), estimate()

    before = judge({"step": {"weights": taken_bytes}, "encode": {"weights": 90}}, 100), estimate()
    offers = search(candidates, goes, try_out, before)
    assert all(offer.verdict.safe for offer in offers)
    return [[name for change in offer.changes for name in change.settings] for offer in offers], offers


def named(*names, **more) -> list[Change]:
    return [Change({name: True}, f"price of {name}", **more) for name in names]


def test_the_cheapest_sets_of_changes_that_fit_come_first():
    """45 bytes are needed: each set does without the cheapest change of those before it, and has none to spare."""
    tried = []
    names, offers = offered(named(*SAVINGS), tried)
    assert names == [["b", "c"], ["d"], ["e"]]
    assert offers[0].prices == ("price of b", "price of c")
    assert ["a", "b"] not in tried and ["a", "b", "c"] not in tried  # known beforehand, from each alone
    alone = [["d"], ["e"]]
    assert (
        offered(named(*SAVINGS), [], goes=lambda changes: {"b": True} not in [c.settings for c in changes])[0] == alone
    )
    assert offered(named("a", "b"), [])[0] == []
    assert offered(named("a", "b"), [], taken_bytes=95)[0] == []  # it fits as it is


def test_a_change_takes_the_place_of_one_it_does_not_go_with():
    def goes(changes):
        return not {"b", "d"} <= {name for change in changes for name in change.settings}

    assert offered(named("b", "d"), [], goes=goes)[0] == [["d"]]
    assert offered([Change({"b": 1}, ""), Change({"b": 2, "d": 1}, "")], [])[0] == [["b", "d"]]


def test_what_spares_nothing_in_the_fullest_phase_is_not_tried():
    tried = []
    assert offered([*named("e", phases=frozenset({"encode"})), *named("d")], tried)[0] == [["d"]]
    assert tried == [["d"]]


def test_changes_that_spare_less_together_are_not_offered():
    def try_out(changes):
        names = {name for change in changes for name in change.settings}
        left = 140 - (30 if names & {"x", "y"} else 0) - (20 if "z" in names else 0)  # x and y spare the same
        return judge({"step": {"weights": left}}, 100), estimate()

    before = judge({"step": {"weights": 140}}, 100), estimate()
    offers = search(named("x", "y", "z"), lambda changes: True, try_out, before)
    assert [[name for change in offer.changes for name in change.settings] for offer in offers] == [
        ["x", "z"],
        ["y", "z"],
    ]


def test_more_devices_come_last_and_as_few_as_are_enough():
    machines = [Change({"gpus": count, f"m{count}": True}, "{gpus} devices") for count in (2, 4, 8)]
    candidates = [*named("c", "d"), *machines]
    with mock.patch.dict(SAVINGS, m2=20, m4=50, m8=70):
        names, offers = offered(candidates, [])
        assert names == [["d"], ["gpus", "m4"]]
        assert offers[1].prices == ("4 devices",)
        names, _ = offered(candidates, [], taken_bytes=190)  # none alone: the most, with what it takes beside
        assert names == [["c", "gpus", "m8"]]


def spent(speedups, room_bytes, *, gone=(), flops=4):
    """Settings of what is taken where each change takes its value in bytes more of the room, and their prices."""

    def try_out(changes):
        more = sum(value for change in changes for value in change.settings.values())
        return judge({"step": {"weights": 100 - room_bytes + more}}, 100), estimate(flops={"forward": 4})

    before = judge({"step": {"weights": 100 - room_bytes}}, 100), estimate(flops={"forward": flops})
    offer = spend(speedups, lambda changes: all(change.settings.keys() - gone for change in changes), try_out, before)
    return None if offer is None else ([change.settings for change in offer.changes], offer.prices, offer.verdict)


def test_room_is_spent_on_the_dearest_first_and_never_to_the_end():
    def ways(name, *values, price=""):
        return [Change({name: value}, price or f"price of {name}") for value in values]

    speedups = [ways("a", 50, 30, 20), ways("b", 25), ways("c", 5)]
    chosen, prices, verdict = spent(speedups, 45)
    assert (chosen, prices) == ([{"a": 30}, {"c": 5}], ("price of a", "price of c"))
    assert verdict.safe and verdict.need_bytes == 90
    assert spent(speedups, 45, gone={"a"})[0] == [{"b": 25}, {"c": 5}]  # what does not go with the rest is passed over
    assert spent(speedups, 5) is None and spent(speedups, 4) is None and spent([], 45) is None
    more = [ways("a", 20, price="{more_flops:+.0%}, {offloaded_gb:.0f} GB")]
    assert spent(more, 45) is None  # it costs nothing as it is
    assert spent(more, 45, flops=5)[1] == ("+25%, 0 GB",)


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", "{}"), ("a.html", "<!doctype html>mine"), ("new.txt", None)]
)
def test_a_page_is_written_over_no_other_file(name, content, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"must end in \.html|is no page of reeltune plan"):
        page.tell(Recipe(), Machines(), file)
    assert not file.exists() or file.read_text() == content


def test_a_page_is_written_anew(tmp_path):
    """The mark by which it is known is in the template's head."""
    template = resources.files("reeltune.estimate").joinpath("plan.html").read_bytes()
    (tmp_path / "plan.html").write_bytes(template)
    assert list(page._other_file(tmp_path / "plan.html")) == list(page._other_file(tmp_path / "new.html")) == []
