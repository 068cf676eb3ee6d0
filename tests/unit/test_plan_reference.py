"""The plan of an epoch beside what the released tools draw."""

import json
from collections import Counter, defaultdict
from functools import partial

import pytest

from reeltune.data.plan import Plan, strata_over
from reeltune.data.shapes import BUCKETS, SizeRules
from tests.unit.test_plan import Measured


@pytest.mark.golden("data/discrete_sampling.json")
def test_strata_of_the_reference(goldens):
    for case in json.loads((goldens / "data/discrete_sampling.json").read_text()):
        if case["sp_size"] != 1:
            continue  # sequence parallelism is not offered
        world, steps, first = case["world_size"], case["num_idx"], case["start_num_idx"]
        n = strata_over(world, steps) if case["uniform_sampling"] else 1
        per_rank = 2
        records = Measured(*([value] * world * per_rank for value in (False, 1, 64, 64)))
        [step] = Plan(records, SizeRules(), group=world * per_rank, seed=0, strata=n)
        for rank, support in enumerate(case["support_per_rank_inclusive"]):
            share = {draw.stratum for draw in step[rank * per_rank : (rank + 1) * per_rank]}
            assert [[first + i * steps // n, first + (i + 1) * steps // n - 1] for i, n in share] == [support]


@pytest.mark.golden("data/resume.json")
def test_resume_goes_on_with_the_rest(goldens):
    """The released tools go on with the permutation of epoch 0; a resume of ours with what this epoch has left."""
    for case in json.loads((goldens / "data/resume.json").read_text()):
        n, done = case["items"], len(case["indices_drawn"])
        records = Measured([True] * n, [50] * n, [64] * n, [64] * n)
        make = partial(Plan, records, SizeRules(video_sample_n_frames=5), group=1, seed=case["seed"])
        before = [step[0] for step in make(case["epoch_when_saved"])][:done]
        resumed = make(case["epoch_when_saved"])
        rest = [resumed[k][0] for k in range(done, n)]
        assert sorted(draw.record for draw in before + rest) == list(range(n))
        theirs = case["reference_resumes_with"]
        assert not set(theirs).isdisjoint(case["indices_drawn"])  # theirs repeats some


@pytest.mark.golden("data/batch_sampler.json")
def test_buckets_of_the_reference(goldens):
    """The same records share a bucket, none is carried over, and the length of an epoch is known."""
    for case in json.loads((goldens / "data/batch_sampler.json").read_text()):
        items, b = case["items"], case["batch_size"]
        video = [item["type"] == "video" for item in items]
        records = Measured(
            video, [60 if v else 1 for v in video], *([i[side] for i in items] for side in ("height", "width"))
        )
        rules = SizeRules(enable_bucket=True, video_sample_size=4096, image_sample_size=64)
        theirs = defaultdict(set)
        for kind, left in case["left_over"].items():
            for key, members in left.items():
                theirs[kind, key].update(members)
        ours = defaultdict(set)
        for epoch in range(30):
            plan = Plan(records, rules, epoch, group=b, seed=case["seed"], runs_on=False)
            assert Counter(d.record for step in plan for d in step if not d.repeat) == Counter(range(len(items)))
            for step in plan:
                for draw in step:
                    ours[draw.record] |= {other.record for other in step}
        together = [set(batch) for batches in case["epoch_batches"] for batch in batches] + list(theirs.values())
        for members in together:
            keys = {nearest(items[i]) for i in members}
            assert len(keys) == 1
        for record, others in ours.items():
            assert {nearest(items[i]) for i in others} == {nearest(items[record])}
        sizes = Counter(nearest(item) for item in items)
        assert len(plan) == sum(-(-size // b) for size in sizes.values())


def nearest(item) -> tuple[str, float]:
    return item["type"], min(BUCKETS, key=lambda key: abs(key - item["height"] / item["width"]))
