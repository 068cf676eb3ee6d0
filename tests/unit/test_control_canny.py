"""Edges as controls: OpenCV's own in one frame, steady from frame to frame, by thresholds that a rule gives."""

import cv2
import numpy as np
import pytest

from reeltune.control import kind
from reeltune.control.canny import ENOUGH, UPPER, lines_of, open_canny, thresholds_of
from reeltune.control.kind import Settings, Source, pictures
from reeltune.core.errors import UserError

BY_CLIP, FIXED = Settings(), Settings(thresholds=(100, 200))


def scene(frames: int = 6, height: int = 90, width: int = 120, noise: float = 0.0) -> np.ndarray:
    """uint8 F H W 3: discs of many contrasts that move a pixel a frame."""
    rng = np.random.default_rng(3)
    made = np.full((frames, height, width, 3), 128, np.uint8)
    for x, y, *colour in rng.integers(10, 80, (14, 5)).tolist():
        for n in range(frames):
            cv2.circle(made[n], (x + n, y), 7, [c * 3 for c in colour], -1)
    return np.clip(made + noise * rng.standard_normal(made.shape), 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize(("low", "high"), [(100, 200), (49.5, 99), (30, 60), (80, 80)])
def test_one_frame_has_the_lines_of_opencv(low, high):
    for rgb_HW3 in scene(noise=12):
        expected_HW = cv2.Canny(rgb_HW3, low, high)
        assert 300 < cv2.countNonZero(expected_HW) < 6000
        np.testing.assert_array_equal(lines_of(rgb_HW3, low, high), expected_HW)


def bar(contrast: int) -> np.ndarray:
    frame_HW3 = np.full((40, 40, 3), 100, np.uint8)
    frame_HW3[:, 20:] += np.uint8(contrast)
    return frame_HW3


def test_a_line_about_the_upper_threshold_stays_once_it_is_there():
    strong, weak, none = bar(55), bar(40), bar(20)  # gradients 220, 160, 80
    before = lines_of(strong, 100, 200)
    assert before[15, 19:21].any() and not lines_of(weak, 100, 200).any()
    np.testing.assert_array_equal(lines_of(weak, 100, 200, before), lines_of(weak, 100, 100))
    assert not lines_of(none, 100, 200, before).any()
    elsewhere = np.roll(before, -12, axis=1)
    assert not lines_of(weak, 100, 200, elsewhere).any()


def test_a_clip_flickers_less_than_frame_by_frame():
    clip = np.stack([bar(55 if n % 2 == 0 else 42) for n in range(6)])
    drawn = pictures(open_canny(FIXED), Source.of(clip, 8))
    assert [int(frame.any()) for frame in drawn] == [1] * 6
    assert [int(cv2.Canny(frame, 100, 200).any()) for frame in clip] == [1, 0] * 3
    assert set(np.unique(drawn)) == {0, 255} and drawn.shape == clip.shape
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 2])


def test_the_upper_threshold_is_the_gradient_of_the_strongest_fiftieth():
    clip = scene(noise=20) // 3
    low, high = thresholds_of(Source.of(clip, 8))
    assert UPPER[0] < high < UPPER[1] and low == high / 2
    sizes = []
    for rgb_HW3 in clip:
        across, down = cv2.spatialGradient(cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2GRAY))
        sizes.append(np.abs(across).astype(int) + np.abs(down))
    share = [(np.stack(sizes) >= level).mean() for level in (high - 1, high)]
    assert share[0] > 0.02 >= share[1]
    assert thresholds_of(Source.of(scene(), 8))[1] == UPPER[1]  # no clip gets fewer lines than by the released tool
    assert thresholds_of(Source.of(np.full_like(clip, 9), 8))[1] == UPPER[0]


def test_scores():
    def quality(clip):
        return open_canny(BY_CLIP).detect(Source.of(clip, 8), lambda chunk: None)

    assert quality(scene()).score == 1
    black = quality(np.zeros((3, 40, 40, 3), np.uint8))
    assert (black.score, black.facts["lines_share"], black.reason) == (0, 0, "")
    noise = quality(np.random.default_rng(0).integers(0, 256, (3, 90, 120, 3), np.uint8))
    assert noise.score == 0 and noise.facts["lines_share"] > 0.3
    half = quality(np.concatenate([scene(2), np.zeros((2, 90, 120, 3), np.uint8)]))
    assert half.score == 0.5 and half.facts["lines_share"] > ENOUGH


def test_bits_do_not_depend_on_how_frames_come_and_few_are_held(monkeypatch):
    clip = scene(20, noise=15)
    whole = pictures(open_canny(BY_CLIP), Source.of(clip, 8))
    monkeypatch.setattr(kind, "CHUNK_BYTES", 3 * clip[0].nbytes)
    held = []
    quality = open_canny(BY_CLIP).detect(Source.of(clip, 8), held.append)
    assert [len(chunk) for chunk in held] == [3] * 6 + [2]
    np.testing.assert_array_equal(np.concatenate(held), whole)
    assert quality == open_canny(BY_CLIP).detect(Source.of(clip, 8), lambda chunk: None)


def test_a_detector_is_known_by_its_thresholds():
    digests = {open_canny(settings).digest for settings in (BY_CLIP, FIXED, Settings(thresholds=(100, 201)))}
    assert len(digests) == 3 and open_canny(Settings(device="cuda")).digest in digests
    for wrong in ((200, 100), (0, 10), (1, float("nan"))):
        with pytest.raises(UserError, match="lower comes first"):
            open_canny(Settings(thresholds=wrong))
