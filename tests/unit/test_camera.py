"""Pose files, their rays and packing, against the released tools' numbers and against geometry."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from reeltune.data.camera import CameraError, rays, read_poses, resample
from reeltune.families.wan_fun.conditions import pack_frames

ROW = "0 0.5 0.9 0.5 0.5 0 0 1 0 0 {x} 0 1 0 0 0 0 1 0"
LENS = "0 {} 0 0 1 0 0 0 0 1 0 0 0 0 1 0"
TURN = "0 0.9 1.6 0.5 0.5 0 0 {}"
TOLERANCE = 1e-5


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def write(path, text):
    path.write_text(text)
    return path


def test_any_white_space_and_blank_last_lines(tmp_path):
    path = write(tmp_path / "a.txt", "\n" + ROW.format(x=1) + "\r\n" + ROW.format(x=2).replace(" ", " \t ") + "\n\n \n")
    poses = read_poses(path)
    assert poses.shape == (2, 19)
    assert poses.dtype == np.float64
    assert poses[:, 10].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n" + ROW.format(x=0) + "\n" + ROW.format(x=0)[:-2], "line 3: 18 columns"),
        ("\n" + ROW.format(x="nan"), "line 2: a number is not finite"),
        ("\n" + ROW.format(x="inf"), "line 2: a number is not finite"),
        ("\n" + ROW.format(x="left"), "line 2: .*left"),
        ("\n" + "0 " * 19 + "\n" + ROW.format(x=0), "line 2: focal"),
        ("\n0 1 1 .5 .5 0 0" + " 0" * 12 + "\n" + ROW.format(x=0), "line 2: .*no inverse$"),
        (ROW.format(x=0) + "\n" + ROW.format(x=0), "line 1 is a pose"),
        (LENS.format("1152 1152 640 360") + "\n" + ROW.format(x=0), "line 1 is a pose"),  # a bad one is no header
        (ROW.format(x=0)[2:] + "\n" + ROW.format(x=0), "line 1 is a pose"),
        ("\n" + ROW.format(x=0) + "\n\n" + ROW.format(x=0), "line 3: 0 columns"),
        ("\n1 2\n1 2\n1 2", r"line 2: 2 columns.*\(2 more"),
        ("\n" + LENS.format("1152 1152 640 360"), r"line 2: focal lengths 1152, 1152 .*are these pixels\?"),
        ("\n" + LENS.format("0.9 1152 0.5 0.5"), r"line 2: .*are these pixels\?"),
        ("\n" + LENS.format("0.9 1.6 640 0.5"), r"line 2: .*centre 640, 0.5 .*are these pixels\?"),
        ("\n" + LENS.format("0.001 0.001 0.5 0.5"), "line 2: focal lengths 0.001, 0.001 .* no fractions"),
        ("\n" + LENS.format("0.9 1.6 -0.5 0.5"), "line 2: .*centre -0.5, 0.5 are no fractions"),
        ("\n" + TURN.format("100 0 0 0 0 100 0 0 0 0 100 0"), "line 2: .*a rotation scaled by 100$"),
        ("\n" + TURN.format("0.5 0 0 0 0 0.5 0 0 0 0 0.5 0"), "line 2: .*a rotation scaled by 0.5$"),
        ("\n" + TURN.format("1 0.5 0 0 0 1 0 0 0 0 1 0"), "line 2: .*sheared"),
        ("\n" + TURN.format("1 0 0 1 0 0 1 0 0 0 0 1"), "line 2: .*(sheared|no inverse)"),  # columns taken for rows
        ("\n" + TURN.format("1 0 0 0 0 -1 0 0 0 0 1 0"), "line 2: .*mirrors"),
        (
            "\n" + "\n".join(f"{t}{ROW.format(x=0)[1:]}" for t in (0, 5, 9, 7)),
            r"line 5: times run back.*7 .* 9",
        ),
        ("header", "no pose"),
        ("", "it is empty"),
        ("\n\n", "no pose"),
    ],
)
def test_bad_files_name_their_line(tmp_path, text, says):
    with pytest.raises(CameraError, match=says):
        read_poses(write(tmp_path / "a.txt", text))


def test_what_is_sound(tmp_path):
    """Equal times, and rotations written with three digits."""
    turned = "0.866 0 0.5 0.1 0 1 0 0.2 -0.5 0 0.866 3"
    text = "\n" + "\n".join(TURN.format(turned) for _ in range(3))
    assert read_poses(write(tmp_path / "a.txt", text)).shape == (3, 19)


def test_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(CameraError, match="cannot be read: it cannot be opened: No such file"):
        read_poses(tmp_path / "absent.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(CameraError, match="cannot be read as text; write it in UTF-8"):
        read_poses(tmp_path / "b.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(CameraError, match="it is not a regular file"):  # and nobody waits for what it brings
        read_poses(tmp_path / "pipe.txt")
    monkeypatch.setattr("reeltune.data.camera.MOST_BYTES", 300)
    with pytest.raises(CameraError, match="more than 300 letters"):
        read_poses(write(tmp_path / "long.txt", "\n" + "\n".join([ROW.format(x=0)] * 9)))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("short_row", "line 2: 18 columns"),
        ("nan", "line 2: a number is not finite"),
        ("singular", "line 2: .*no inverse"),
        ("no_header", "line 1 is a pose"),
    ],
)
def test_broken_inputs(bad_inputs, name, says):
    with pytest.raises(CameraError, match=says):
        read_poses(bad_inputs / "files" / f"camera_{name}.txt")


def test_double_space_is_sound(bad_inputs):
    assert len(read_poses(bad_inputs / "files/camera_double_space.txt")) > 1


def turned(angle, x):
    c, s = np.cos(angle), np.sin(angle)
    return [0, 0.6, 1.1, 0.5, 0.5, 0, 0, c, 0, s, x, 0, 1, 0, 0.2, -s, 0, c, 0.1]


def test_rays_are_unit_lines_through_the_camera():
    """The moment is perpendicular to the direction; |moment| is the origin's distance from the ray's line."""
    poses = np.array([turned(0.1 * i, 0.3 * i) for i in range(3)])  # 3 frames: the axis of a cross product matters
    lines = rays(poses, 6, 10)
    moment, direction = lines[..., :3].astype(float), lines[..., 3:].astype(float)
    close(np.linalg.norm(direction, axis=-1), 1)
    close((moment * direction).sum(-1), 0)
    assert np.abs(moment[0]).max() == 0  # the first camera is the origin
    first, third = (np.vstack([np.reshape(pose[7:], (3, 4)), [0, 0, 0, 1]]) for pose in poses[[0, 2]])
    centre = (first @ np.linalg.inv(third))[:3, 3]
    close(moment[2], np.cross(centre, direction[2]))


def test_resample_keeps_ends_and_is_linear():
    poses = np.arange(3 * 19, dtype=float).reshape(3, 19)
    rows = resample(poses, 5, [0, 1, 4])
    assert rows[0].tolist() == poses[0].tolist()
    assert rows[2].tolist() == poses[2].tolist()
    assert rows[1].tolist() == (poses[0] + 9.5).tolist()
    assert resample(poses, 1, [0]).tolist() == poses[:1].tolist()


def test_opposite_views_have_no_ray_between_them():
    poses = np.array([turned(0, 0), turned(np.pi, 0)])
    with pytest.raises(CameraError, match="between two poses"):
        rays(resample(poses, 3, [0, 1, 2]), 4, 4)


@pytest.mark.golden("data/camera.json")
def test_clips_of_the_reference(goldens, media):
    for case in json.loads((goldens / "data/camera.json").read_text()):
        poses = read_poses(media / "camera" / case["file"])
        assert len(poses) == case["rows"]
        tensors = load_file(goldens / "data" / f"camera_{case['file'].removesuffix('.txt')}.safetensors")
        for width, height in case["direct"]:
            close(rays(poses, height, width)[case["kept_rows"]], tensors[f"direct_w{width}_h{height}"])
        for path in case["paths"]:
            name, (height, width), (crop_height, crop_width) = path["name"], path["resize"], path["crop"]
            rows = resample(poses, path["video_frames"], path["indices"])
            close(rows, tensors[f"{name}_rows"])
            top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
            lines = rays(rows, height, width)[:, top : top + crop_height, left : left + crop_width]
            plucker = np.ascontiguousarray(lines.transpose(0, 3, 1, 2))
            close(plucker, tensors[f"{name}_plucker"])
            packed = pack_frames(torch.from_numpy(plucker)[None])[0]
            assert list(packed.shape) == path["packed_shape"]
            close(packed, tensors[f"{name}_packed"])


@pytest.mark.golden("wan_fun/golden/camera.safetensors")
def test_camera_family_of_the_reference(goldens):
    folder = goldens / "wan_fun/golden"
    tensors = load_file(folder / "camera.safetensors")
    sized = [name.rsplit("_", 1) for name in tensors if ".plucker_" in name and name[-1].isdigit()]
    assert sized
    for name, size in sized:
        kind = name.split(".")[0]
        height, width = map(int, size.split("x"))
        ours = rays(read_poses(folder / f"pose_{kind}.txt"), height, width)[tensors[f"{kind}.frame_index"]]
        close(ours, tensors[f"{name}_{size}"])
    rows = tensors["dataset.rows"].astype(np.float64)
    selected = resample(rows, int(tensors["dataset.video_length"]), tensors["dataset.batch_index"])
    close(selected, tensors["dataset.rows_selected"])
    height, width = tensors["dataset.plucker"].shape[-2:]
    plucker = rays(selected, height, width).transpose(0, 3, 1, 2)
    close(plucker, tensors["dataset.plucker"])
    close(pack_frames(torch.from_numpy(plucker)[None]), tensors["dataset.packed24"])
    assert torch.equal(pack_frames(torch.from_numpy(tensors["pack.in"])), torch.from_numpy(tensors["pack.out"]))
    three = tensors["three_frames.plucker_per_ray_cross"]
    close(rays(tensors["three_frames.rows"].astype(np.float64), *three.shape[1:3]), three)
    assert np.abs(three - tensors["three_frames.plucker_as_reference"]).max() > 0.01  # the fault we do not share
