"""Which poses are to be trusted: on detections of mediapipe 0.10.21 in five clips, and in closed form.

recorded_poses/ (2026-11-26): `solutions.pose`, complexity 1, tracking, least confidence 0.5, COCO's 17 of its 33
points, of every frame or of every fourth. It finds a person in the cat in 25 of 29 frames, in 7 of every fourth's 8.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reeltune.control.pose_quality import (
    BONES,
    LEAST_SCORE,
    Person,
    is_plausible,
    jitter_of,
    limb_change_of,
    quality_of,
)
from reeltune.data.keypoints import Keypoints, People, read_keypoints
from tests.unit.people import figure, people, walk

RECORDED = Path(__file__).with_name("recorded_poses")


def recorded(name: str) -> Keypoints:
    return read_keypoints(RECORDED / f"{name}.npz")


@pytest.mark.parametrize("name", ["astronaut", "hiker", "astronaut_fourth", "hiker_fourth"])
def test_people_are_trusted(name):
    found = quality_of(recorded(name))
    assert found.score == 1.0 and not found.reason
    assert found.facts["frames_with_people"] == 1.0 and found.facts["people"] == 1
    assert found.facts["jitter"] < 0.025 and found.facts["limb_change"] < 0.011


@pytest.mark.parametrize(("name", "share"), [("cat", 25 / 29), ("cat_fourth", 7 / 8), ("cat_portrait", 16 / 29)])
def test_a_cat_is_no_person_though_one_is_found_in_it(name, share):
    found = quality_of(recorded(name))
    assert found.facts["frames_with_people"] == pytest.approx(share) and not found.reason
    assert found.score < 0.1 < LEAST_SCORE
    assert found.facts["jitter"] > 0.09 and found.facts["limb_change"] > 0.03


def test_a_clip_with_nobody_is_left_out_whatever_is_asked_for():
    found = quality_of(recorded("anime"))
    assert (found.score, found.reason, found.facts["frames_with_people"]) == (0.0, "has nobody in it", 0.0)


def test_what_is_found_of_a_walk():
    found = quality_of(walk(8, 480, 832, count=2))
    assert found.score == 1.0 and found.facts["people"] == 2 and found.facts["mean_score"] == 1.0
    assert found.facts["points_seen"] == 17 and found.facts["plausible"] == 1.0
    assert found.facts["size"] == pytest.approx(0.8 * 480 * 3.35 / 4 / 832, rel=0.01)
    assert found.facts["jitter"] < 0.002 and found.facts["limb_change"] < 0.002  # rounding alone


def test_the_worst_part_is_the_score():
    nobody, someone = People.nobody("coco_wholebody"), people(figure(300, 240, 400))

    def score(*frames: People) -> float:
        made = Keypoints.of(frames, np.arange(len(frames)), layout="coco_wholebody", height=480, width=832, detector="")
        return quality_of(made).score

    assert score(*[someone] * 3, nobody) == 0.75
    assert score(people(figure(300, 240, 0.075 * 832 * 4 / 3.35))) == pytest.approx(0.5, abs=0.01)
    head = people(figure(300, 240, 400))
    head.scores_NP[0, [1, 2, 3, 4, *range(7, 133)]] = 0.1  # nose and shoulders alone
    assert score(head) == pytest.approx(0.6)
    assert score(someone) == 1.0


def persons(*points_of_frames: np.ndarray) -> list[list[Person]]:
    return [
        [Person(points_P2, np.ones(17, bool), points_P2.mean(axis=0), 100.0) for points_P2 in people_of_frame]
        for people_of_frame in points_of_frames
    ]


def test_jitter_is_the_second_difference_in_body_sizes():
    body_P2 = figure(0, 0, 100)[:17]
    steady = persons(*([body_P2 + np.array([4 * frame, 0])] for frame in range(5)))
    assert jitter_of(steady) == pytest.approx(0, abs=1e-12)
    shaking = persons(*([body_P2 + np.array([3 * (frame % 2), 0])] for frame in range(5)))
    assert jitter_of(shaking) == pytest.approx(0.06)
    assert jitter_of(steady[:2]) == 0 and jitter_of([steady[0], [], steady[1]]) == 0
    apart = persons([body_P2], [body_P2 + np.array([500, 0])], [body_P2])  # another person
    assert jitter_of(apart) == 0


def test_limb_change_knows_no_motion_of_the_whole_but_that_of_lengths():
    body_P2 = figure(0, 0, 100)[:17]
    turn = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
    assert limb_change_of(persons([body_P2], [body_P2 @ turn + [20, 9]])) == pytest.approx(0, abs=1e-12)
    lengths = [np.hypot(*(body_P2[start] - body_P2[end])) for start, end in BONES]
    assert limb_change_of(persons([body_P2], [body_P2 * 1.2])) == pytest.approx(0.2 * np.median(lengths) / 100)


def test_several_people_are_told_apart_by_where_they_are():
    left_P2, right_P2 = figure(0, 0, 100)[:17], figure(300, 0, 80)[:17]
    frames = persons([left_P2, right_P2], [right_P2, left_P2], [left_P2, right_P2])
    assert jitter_of(frames) == 0 and limb_change_of(frames) == 0


def test_a_bone_that_no_body_has_is_noticed():
    body_P2 = figure(0, 0, 100)[:17]
    seen = np.ones(17, bool)
    assert is_plausible(Person(body_P2, seen, body_P2.mean(axis=0), 100.0))
    flung_P2 = body_P2.copy()
    flung_P2[9] += [0, 10]  # a forearm 1.5 times as long for its share as the third longest bone
    assert is_plausible(Person(flung_P2, seen, body_P2.mean(axis=0), 100.0))
    flung_P2[9] += [0, 12]  # 2.2 times
    assert not is_plausible(Person(flung_P2, seen, body_P2.mean(axis=0), 100.0))
    unseen = replace(Person(flung_P2, seen, body_P2.mean(axis=0), 100.0), seen_P=np.arange(17) != 9)
    assert is_plausible(unseen)
