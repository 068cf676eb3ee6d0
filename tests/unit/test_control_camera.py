"""Camera paths from clips: a known walk is found again; files mean what `data.camera` reads; refusals in words."""

import cv2
import numpy as np
import pytest

from reeltune.control.camera_path import NEAR_M, Path3D, _near, _quality, open_camera, poses_of
from reeltune.control.camera_picture import PATH, START, path_picture
from reeltune.control.kind import Settings, Source
from reeltune.data.camera import rays
from tests.unit.room import view, walk

FOCAL_PX, HEIGHT, WIDTH = 200.0, 160, 200


def path3d(**more) -> Path3D:
    centres, turns = walk(4)
    shifts = -np.einsum("fij,fj->fi", turns, centres)
    poses = np.concatenate([turns, shifts[..., None]], 2)
    given = {"places": np.arange(4), "focal_px": FOCAL_PX, "error_px": 0.4, "points": 900, "near": 2 * NEAR_M}
    return Path3D(to_camera_N34=poses, **{**given, **more})


def source(frames: int, height: int, width: int) -> Source:
    return Source(height, width, np.arange(frames) / 8, lambda: iter(()))


def centres_of(poses_F19: np.ndarray) -> np.ndarray:
    to_camera = poses_F19[:, 7:].reshape(-1, 3, 4)
    return -np.einsum("fji,fj->fi", to_camera[:, :, :3], to_camera[:, :, 3])


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (100, 100), (60, 200)])
def test_a_file_means_the_cameras_own_rays(height, width):
    """Whatever the aspect: the released reader takes intrinsics for those of a 16:9 picture."""
    poses = poses_of(path3d(), np.arange(4), source(4, height, width), (height, width))
    found = rays(poses[:1], height, width)[0, ..., 3:]
    y, x = np.mgrid[:height, :width] + 0.5
    expected = np.stack([(x - width / 2) / FOCAL_PX, (y - height / 2) / FOCAL_PX, np.ones_like(x)], -1)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_frames_between_get_the_path_between():
    poses = poses_of(path3d(), np.array([0, 4, 8, 10]), source(12, 90, 160), (90, 160))
    centres, (true_centres, turns) = centres_of(poses), walk(4)
    np.testing.assert_allclose(centres[[0, 4, 8, 10]], true_centres / 2, atol=1e-9)  # the scenery is twice as near
    np.testing.assert_allclose(centres[2], (true_centres[0] + true_centres[1]) / 4, atol=1e-9)
    np.testing.assert_array_equal(poses[11, 7:], poses[10, 7:])
    np.testing.assert_array_equal(poses[:, 0], np.arange(12) / 8)
    rotations = poses[:, 7:].reshape(-1, 3, 4)[:, :, :3]
    first, second, third = (np.linalg.norm(cv2.Rodrigues(rotations[n] @ turns[0].T)[0]) for n in (1, 2, 4))
    assert third > 0.05
    np.testing.assert_allclose([4 * first, 2 * second], third, atol=1e-6)


def test_the_nearest_scenery_sets_the_scale():
    ahead = np.array([[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]])
    points = np.array([[0, 0, depth] for depth in (*np.linspace(2, 12, 101), -5.0)])
    assert _near(ahead, points) == pytest.approx(2.5)
    assert _near(ahead, points[:0]) == 0


def test_what_is_refused():
    good = _quality(path3d(), 4)
    assert good.reason == "" and good.score == pytest.approx(1 - 0.4 / 3)
    bad = _quality(path3d(error_px=2.0, points=9), 6)
    assert bad.reason == (
        "has a reprojection error of 2.00 px, and 1.5 is the most; has a camera path for 67% of its frames, and 80% is "
        "the least; shows 9 points that a path could hold on to, and 50 is the least"
    )
    pytest.importorskip("pycolmap")
    still = open_camera(Settings()).detect(Source.of(np.zeros((4, 64, 64, 3), np.uint8), 8), lambda poses: None)
    assert "no camera motion" in still.reason
    assert (
        "is 2 frames, and a camera's path needs 3"
        in open_camera(Settings()).detect(source(2, 64, 64), lambda poses: None).reason
    )


def test_a_known_walk_is_found_again():
    pytest.importorskip("pycolmap")
    centres, turns = walk(7)
    clip = np.stack([view(*pose, FOCAL_PX, HEIGHT, WIDTH) for pose in zip(centres, turns, strict=True)])
    put: list[np.ndarray] = []
    quality = open_camera(Settings()).detect(Source.of(clip, 8), put.append)
    assert quality.reason == "" and quality.facts["error_px"] < 0.5 and quality.facts["frames_share"] == 1
    (poses,) = put
    rotations = poses[:, 7:].reshape(-1, 3, 4)[:, :, :3]
    for found, true in zip(rotations @ rotations[0].T, turns @ turns[0].T, strict=True):
        assert np.degrees(np.linalg.norm(cv2.Rodrigues(found @ true.T)[0])) < 0.5
    found = (centres_of(poses) - centres_of(poses)[0]) @ rotations[0].T
    true = (centres - centres[0]) @ turns[0].T
    scaled = found * (found * true).sum() / (found * found).sum()
    assert np.abs(scaled - true).max() < 0.02 * np.abs(true).max()
    assert poses[0, 2] == pytest.approx(FOCAL_PX / HEIGHT, rel=0.05)


def test_the_picture_of_a_path(tmp_path):
    """Forward is up: an L-shaped walk, forward and then to the right."""
    rows = np.zeros((5, 19))
    rows[:, 1:5] = 0.5, 0.9, 0.5, 0.5
    for row, (x, z) in zip(rows, [(0, 0), (0, 1), (0, 2), (1, 2), (2, 2)], strict=True):
        row[7:] = np.concatenate([np.eye(3), [[-x], [0], [-z]]], 1).ravel()
    (tmp_path / "path.txt").write_text("\n" + "\n".join(" ".join(map(str, row)) for row in rows))
    picture = path_picture(tmp_path / "path.txt", 100)
    assert tuple(picture[88, 12]) == START  # lower left
    assert tuple(picture[12, 50]) == PATH and tuple(picture[50, 12]) == PATH
    assert tuple(picture[50, 88]) != PATH and tuple(picture[88, 50]) != PATH
