"""RT-DETR and ViTPose: pre- and post-processing against transformers' own, and folders that are no such networks."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file

from reeltune.control.pose_vit import decode_heat, find_boxes, find_points, open_vit
from reeltune.core.errors import UserError
from tests.unit.test_pose_onnx import frame
from tests.unit.tiny_pose_nets import write_people_net, write_pose_net

FRAMES = ((120, 208), (150, 90))  # height, width


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    write_people_net(folder / "rtdetr")
    write_pose_net(folder / "vitpose", seed=4)
    return folder


def test_people_and_points_are_those_of_transformers(folder):
    """By RTDetrImageProcessorPil and VitPoseImageProcessorPil of transformers 5.23 with SciPy 1.17, on the same
    networks and frames (recorded 2026-11-27). Points of boxes within the frame: at its edge SciPy does not blend to
    black, as OpenCV does and with it ViTPose's own code."""
    with np.load(Path(__file__).with_name("transformers_poses.npz")) as held:
        theirs = dict(held)
    people_net = transformers.RTDetrForObjectDetection.from_pretrained(folder / "rtdetr").eval()
    pose_net = transformers.VitPoseForPoseEstimation.from_pretrained(folder / "vitpose").eval()
    for number, (height, width) in enumerate(FRAMES):
        picture_HW3 = frame(height, width, number)
        boxes_N4, scores_N = find_boxes(people_net, picture_HW3, 1, "cpu")
        assert len(np.unique(boxes_N4.round(), axis=0)) == 10
        assert np.abs(boxes_N4 - theirs[f"boxes{number}"]).max() < 0.05
        assert np.abs(scores_N - theirs[f"scores{number}"]).max() < 1e-3
        points_NP2, scores_NP = find_points(pose_net, picture_HW3, theirs[f"inside{number}"].astype(float), "cpu")
        apart_NP = np.abs(points_NP2 - 0.5 - theirs[f"points{number}"]).max(axis=-1)
        found_NP = theirs[f"point_scores{number}"] > 0  # where it is not, transformers moves the point
        assert np.abs(scores_NP - theirs[f"point_scores{number}"]).max() < 0.02
        assert (apart_NP[found_NP] < 0.1).all() and found_NP.mean() > 0.8


def test_a_gaussian_peak_is_found_between_its_cells():
    rows, columns = np.mgrid[:16, :12]
    places = np.array([[4.3, 9.6], [7.0, 5.5]])
    heat_PHW = np.stack([np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 2.0**2)) for x, y in places])
    at_NP2, scores_NP = decode_heat(heat_PHW[None].astype(np.float32))
    assert np.abs(at_NP2[0] - places).max() < 0.02 and (scores_NP > 0.9).all()
    flat_NP2, scores_NP = decode_heat(np.zeros((1, 1, 8, 8), np.float32))
    assert flat_NP2.tolist() == [[[0, 0]]] and scores_NP.tolist() == [[0]]


def test_the_same_frame_gives_the_same_people(folder):
    finder, picture_HW3 = open_vit(folder, "cpu"), frame(*FRAMES[0], 0)
    first, second = finder.find(picture_HW3), open_vit(folder, "cpu").find(picture_HW3)
    assert finder.layout == "coco" and first.points_NP2.shape == (10, 17, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_digest_tells_networks_apart(folder, tmp_path):
    write_people_net(tmp_path / "a")
    write_pose_net(tmp_path / "b", points=133, seed=1)
    other = open_vit(tmp_path, "cpu")
    assert other.layout == "coco_wholebody" and other.digest != open_vit(folder, "cpu").digest
    assert other.find(frame(*FRAMES[0], 0)).points_NP2.shape == (10, 133, 2)


def test_folders_that_are_no_such_networks_are_refused_in_words(tmp_path):
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            open_vit(tmp_path, "cpu")

    write_pose_net(tmp_path / "pose", points=21)
    refused(r"no folder with a config.json of model_type rt_detr; those there: pose \(vitpose\)")
    write_people_net(tmp_path / "people", labels=("cat", "dog"))
    refused("knows no class `person`")
    write_people_net(tmp_path / "people")
    refused(r"finds 21 points a person; expected 17 \(coco\) or 133 \(coco_wholebody\)")
    weights = tmp_path / "people/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(r"model\.safetensors: .*\n.*its header promises")
    weights.unlink()
    refused("safetensors")
    (tmp_path / "people/config.json").write_text("{")
    refused("config.json")


def test_weights_that_are_missing_are_not_made_up(folder, tmp_path):
    write_people_net(tmp_path / "people")
    write_pose_net(tmp_path / "pose")
    weights = load_file(tmp_path / "pose/model.safetensors")
    del weights["head.conv.bias"]
    save_file(weights, tmp_path / "pose/model.safetensors")
    with pytest.raises(UserError, match=r"missing: head\.conv\.bias"):
        open_vit(tmp_path, "cpu")


def test_a_device_that_torch_does_not_have_is_refused(folder):
    with pytest.raises(UserError, match="--device xpu9 cannot be used"):
        open_vit(folder, "xpu9")
