"""How far a clip's poses are to be trusted: rules on what was found alone, whatever found it.  (no torch)

A network that looks for people finds one in a cat too. What gives it away is time: limbs of a body keep their lengths
from frame to frame, and its points do not leap. All lengths are in body sizes, the longer side of the seen points.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from reeltune.control.kind import Quality
from reeltune.data.keypoints import Keypoints, People
from reeltune.data.pose_drawing import SEEN_SCORE

BODY_POINTS = 17  # COCO's, with which both layouts begin
# Bones by their points of COCO, with their share of a body's height (Winter, Biomechanics and Motor Control of Human
# Movement, figure 4.1, after Drillis and Contini, 1966): a picture may shorten them, and never lengthens them.
BONES = {
    (5, 6): 0.259, (11, 12): 0.191, (5, 7): 0.186, (6, 8): 0.186, (7, 9): 0.146, (8, 10): 0.146, (11, 13): 0.245,
    (12, 14): 0.245, (13, 15): 0.246, (14, 16): 0.246, (5, 11): 0.288, (6, 12): 0.288,
}  # fmt: skip
MOST_LONGER = 2.0  # that the bone longest for its share may be beyond the third longest

# (at which a part of the score is 0, at which it is 1). Measured, 2026-11-26, with mediapipe 0.10.21 on clips of an
# astronaut, a hiker and two of a cat, which it takes for a person:
JITTER = (0.10, 0.04)  # people 0.005 to 0.022, cats 0.10 to 0.21
LIMB_CHANGE = (0.035, 0.020)  # people 0.003 to 0.010, cats 0.031 to 0.059
# By the drawing: limbs are 8 pixels wide, a body of a tenth of 480 pixels has 48.
SIZE = (0.05, 0.10)
POINTS_SEEN = (0, 5)  # head and shoulders have 7
LEAST_SCORE = 0.5


@dataclass(frozen=True)
class Person:
    """The body of one person in one frame, in pixels."""

    points_P2: np.ndarray
    seen_P: np.ndarray
    middle_2: np.ndarray  # of the box
    size: float  # the longer side of the seen points; 0 of fewer than two


def quality_of(keypoints: Keypoints) -> Quality:
    """The score is its worst part; facts has them all. A clip without people is left out whatever is asked for."""
    frames = [_people(keypoints.frame(number)) for number in range(keypoints.frames)]
    found = [person for people in frames for person in people]
    counts = [len(people) for people in frames]
    if not found:
        return Quality(0.0, {"frames_with_people": 0.0, "people": 0.0}, "has nobody in it")
    side = max(keypoints.height, keypoints.width)
    jitter, limb_change = jitter_of(frames), limb_change_of(frames)
    facts = {
        "frames_with_people": float(np.mean([count > 0 for count in counts])),
        "people": float(np.median([count for count in counts if count])),
        "mean_score": float(keypoints.scores[:, :BODY_POINTS].astype(np.float64).mean()),
        "points_seen": float(np.median([person.seen_P.sum() for person in found])),
        "size": float(np.median([max(person.size for person in people) for people in frames if people])) / side,
        "plausible": float(np.mean([is_plausible(person) for person in found])),
        "jitter": jitter,
        "limb_change": limb_change,
    }
    parts = [
        facts["frames_with_people"],
        facts["plausible"],
        _part(facts["points_seen"], POINTS_SEEN),
        _part(facts["size"], SIZE),
        _part(jitter, JITTER),
        _part(limb_change, LIMB_CHANGE),
    ]
    return Quality(min(parts), facts)


def _part(value: float, ends: tuple[float, float]) -> float:
    """How far a value is from the first end to the second: 0 to 1, and no further."""
    none, whole = ends
    return float(np.clip((value - none) / (whole - none), 0, 1))


def _people(people: People) -> list[Person]:
    made = []
    for points_P2, scores_P, box_4 in zip(people.points_NP2, people.scores_NP, people.boxes_N4, strict=True):
        body_P2, seen_P = points_P2[:BODY_POINTS], scores_P[:BODY_POINTS] >= SEEN_SCORE
        size = float(np.ptp(body_P2[seen_P], axis=0).max()) if seen_P.any() else 0.0
        if size > 0:
            made.append(Person(body_P2, seen_P, (box_4[:2] + box_4[2:]) / 2, size))
    return made


def is_plausible(person: Person) -> bool:
    """Whether no bone is longer than a body's proportions allow; of fewer than three bones nothing is known.

    Bones that a picture shortens tell nothing, so that the longest for its share is held against the third longest.
    """
    lengths = _lengths(person) / np.array(list(BONES.values()))
    longest = np.sort(lengths[np.isfinite(lengths)])[::-1]
    return len(longest) < 3 or bool(longest[0] <= MOST_LONGER * longest[2])


def _lengths(person: Person) -> np.ndarray:
    """Each bone's length in pixels, NaN where an end of it is not seen."""
    starts, ends = np.array(list(BONES)).T
    lengths = np.hypot(*(person.points_P2[starts] - person.points_P2[ends]).T)
    return np.where(person.seen_P[starts] & person.seen_P[ends], lengths, np.nan)


def limb_change_of(frames: list[list[Person]]) -> float:
    """How much a bone changes its length in the picture from one frame to the next: the median, in body sizes.

    0 where nobody is seen in two frames that follow each other.
    """
    pairs = ((person, _same(person, after)) for before, after in pairwise(frames) for person in before)
    return _median(
        [
            np.abs(_lengths(same) - _lengths(person)) / max(person.size, same.size)
            for person, same in pairs
            if same is not None
        ]
    )


def jitter_of(frames: list[list[Person]]) -> float:
    """How far a point lies from half way between where it was and where it comes to, twice: the median of its second
    difference, in body sizes. Steady motion has none. 0 where nobody is seen in three frames that follow each other.
    """
    leaps = []
    for before, now, after in zip(frames, frames[1:], frames[2:], strict=False):
        for person in now:
            first, last = _same(person, before), _same(person, after)
            if first is not None and last is not None:
                second_P2 = first.points_P2 - 2 * person.points_P2 + last.points_P2
                seen_P = first.seen_P & person.seen_P & last.seen_P
                leaps.append(np.hypot(*second_P2[seen_P].T) / person.size)
    return _median(leaps)


def _same(person: Person, others: list[Person]) -> Person | None:
    """Whom of another frame's people this is: the nearest, within a body."""
    near = min(others, key=lambda other: float(np.hypot(*(other.middle_2 - person.middle_2))), default=None)
    if near is None or np.hypot(*(near.middle_2 - person.middle_2)) > max(person.size, near.size):
        return None
    return near


def _median(parts: list[np.ndarray]) -> float:
    values = np.concatenate([np.zeros(0), *parts])
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else 0.0
