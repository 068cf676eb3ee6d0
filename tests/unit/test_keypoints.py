"""The file of key points: what goes in comes out, to a quarter of a pixel; whatever else is there is refused."""

import io
import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from reeltune.data.findings import MediaError
from reeltune.data.keypoints import REACH, Keypoints, People, digest_of, read_keypoints, write_keypoints
from tests.unit.people import figure, people, rewritten, walk


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clip.npz"
    write_keypoints(path, walk(3, 64, 48, count=2))
    return path


def arrays_of(path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as held:
        return dict(held)


def test_a_position_is_kept_to_a_quarter_of_a_pixel_of_1920(tmp_path):
    rng = np.random.default_rng(0)
    points_P2 = rng.uniform([0, 0], [1920, 1080], (133, 2))
    found = people(points_P2, figure(1500, 400, 700), score=0.7)
    made = Keypoints.of([found], [0.0], layout="coco_wholebody", height=1080, width=1920, detector="d")
    write_keypoints(tmp_path / "a.npz", made)
    read = read_keypoints(tmp_path / "a.npz").frame(0)
    error_px = np.abs(read.points_NP2 - found.points_NP2).max()
    assert 0.1 < error_px <= 1920 / 2 * 2**-12  # 0.23
    assert np.abs(read.boxes_N4 - found.boxes_N4).max() <= 0.25
    assert np.abs(read.scores_NP - 0.7).max() < 1e-3 and np.abs(read.box_scores_N - 0.7).max() < 1e-3


def test_positions_mean_the_same_at_any_size(file):
    small, large = read_keypoints(file).frame(1), read_keypoints(file).frame(1, 128, 144)
    assert np.array_equal(large.points_NP2, small.points_NP2 * [3, 2])
    assert np.array_equal(large.boxes_N4, small.boxes_N4 * [3, 2, 3, 2])


def test_people_are_found_in_their_frames(tmp_path):
    nobody = People.nobody("coco_wholebody")
    one, two = people(figure(20, 30, 50)), people(figure(10, 30, 40), figure(40, 30, 30))
    made = Keypoints.of([nobody, two, nobody, one], [0, 1, 2, 4.5], layout="coco_wholebody", height=64, width=64,
                        detector="d")  # fmt: skip
    write_keypoints(tmp_path / "a.npz", made)
    read = read_keypoints(tmp_path / "a.npz")
    assert [len(read.frame(i).points_NP2) for i in range(4)] == [0, 2, 0, 1]
    assert np.abs(read.frame(1).points_NP2[1] - two.points_NP2[1]).max() < 0.02
    assert np.abs(read.frame(3).points_NP2[0] - one.points_NP2[0]).max() < 0.02
    assert (read.frames, read.fps, read.height, read.width) == (4, 3 / 4.5, 64, 64)
    with pytest.raises(MediaError, match="has 4 frames, so no frame 4"):
        read.frame(4)


def test_the_same_key_points_are_the_same_bytes(tmp_path):
    for name, drift in (("a", 0), ("b", 0), ("c", 0.01)):
        made = walk(3, 64, 48)
        write_keypoints(tmp_path / f"{name}.npz", replace(made, scores=(made.scores - drift).astype(np.float16)))
    bytes_of = {name: (tmp_path / f"{name}.npz").read_bytes() for name in "abc"}
    assert bytes_of["a"] == bytes_of["b"] != bytes_of["c"] and len(bytes_of["a"]) == len(bytes_of["c"])
    digests = [digest_of(str(tmp_path / f"{name}.npz")) for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_a_point_far_out_is_held_at_the_limit():
    far = people(figure(20, 30, 50) + np.array([1e5, -1e9]))
    made = Keypoints.of([far], [0.0], layout="coco_wholebody", height=64, width=64, detector="d")
    assert (made.points == [REACH, -REACH]).all()


def nan(arrays):
    arrays["points"][0, 5, 1] = np.nan


def infinite(arrays):
    arrays["box_scores"][0] = np.inf


def far(arrays):
    arrays["boxes"][1, 2] = 100


def negative(arrays):
    arrays["scores"][0, 0] = -1


def turned_box(arrays):
    arrays["boxes"][0] = [1, 0, 0, 1]


def backwards(arrays):
    arrays["times_s"][2] = 0.1


def late(arrays):
    arrays["times_s"] += 1


def uncounted(arrays):
    arrays["people"][0] = 1


def crowded(arrays):
    arrays["people"][:] = [0, 1001, 0]
    for name in ("points", "scores", "boxes", "box_scores"):
        arrays[name] = np.resize(arrays[name], (1001, *arrays[name].shape[1:]))


def negative_count(arrays):
    arrays["people"][:] = [-1, 3, 4]


def of_double(arrays):
    arrays["points"] = arrays["points"].astype(np.float64)


def flat(arrays):
    arrays["points"] = arrays["points"].reshape(-1, 2)


def another_layout(arrays):
    arrays["points"], arrays["scores"] = arrays["points"][:, :17], arrays["scores"][:, :17]


def objects(arrays):
    arrays["people"] = np.array([{"a": 1}], object)


def missing(arrays):
    del arrays["boxes"]


def another_kind(arrays):
    arrays["facts"] = np.frombuffer(arrays["facts"].tobytes().replace(b'"pose"', b'"nose"'), np.uint8)


def a_later_format(arrays):
    arrays["facts"] = np.frombuffer(arrays["facts"].tobytes().replace(b'"format": 1', b'"format": 2'), np.uint8)


def no_facts(arrays):
    arrays["facts"] = np.frombuffer(b"[1]", np.uint8)


def deep_facts(arrays):
    arrays["facts"] = np.frombuffer(b"[" * 100_000, np.uint8)


def no_size(arrays):
    arrays["facts"] = np.frombuffer(arrays["facts"].tobytes().replace(b"64", b"-4"), np.uint8)


def unknown_layout(arrays):
    arrays["facts"] = np.frombuffer(arrays["facts"].tobytes().replace(b"coco_", b"mpii_"), np.uint8)


REFUSED = {
    nan: "points holds what is no finite number",
    infinite: "box_scores holds what is no finite number",
    far: "points or boxes lie more than 8 half pictures from the centre",
    negative: "a score is negative",
    turned_box: "a box ends before it begins",
    backwards: "its times do not ascend from 0",
    late: "its times do not ascend from 0",
    uncounted: "it has 3 times, and 3 counts of people for 6 of them",
    crowded: "a frame has 1,001 people, and 1,000 are allowed",
    negative_count: "3 counts of people for 6",
    of_double: "points is float64 with 3 dimensions, not float16 with 3",
    flat: "points is float16 with 2 dimensions, not float16 with 3",
    another_layout: r"points has the shape \(6, 17, 2\), not \(6, 133, 2\)",
    objects: "people is object with 1 dimensions, not int32 with 1",
    missing: "it holds box_scores, facts, people, points, scores, times_s, not",
    another_kind: "has {'format': 1, 'kind': 'nose'}, not key points of kind pose in format 1",
    a_later_format: "has {'format': 2, 'kind': 'pose'}, not key points",
    no_facts: "has no facts, not key points",
    deep_facts: "facts has 100,128 bytes, and at most 4,096",
    no_size: "its size is",
    unknown_layout: "its layout is 'mpii_wholebody', none of coco, coco_wholebody",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_is_not_sound_is_refused_in_words(file, spoil):
    arrays = {name: array.copy() for name, array in arrays_of(file).items()}
    spoil(arrays)
    np.savez(file, **arrays)
    with pytest.raises(MediaError, match=REFUSED[spoil]) as refusal:
        read_keypoints(file)
    assert refusal.value.lasting and refusal.value.remedy


def npy(shape: tuple[int, ...], dtype: str = "<f2", data: bytes = b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue() + data


def test_a_header_that_promises_more_than_is_there_takes_no_memory(file):
    for shape in ((2**40, 133, 2), (2**62, 2**62, 2), (0, 133, 2)):
        rewritten(file, {"points.npy": npy(shape, data=b"ab")})
        with pytest.raises(MediaError, match=r"points of shape .* has 2 bytes"):
            read_keypoints(file)
    rewritten(file, {"points.npy": npy((-1, 133, 2))})
    with pytest.raises(MediaError, match="not a sound file of key points"):
        read_keypoints(file)


def test_a_bomb_is_not_unpacked(file, monkeypatch):
    rewritten(file, {"points.npy": bytes(2**28 + 1)}, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**19
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("it is unpacked"))  # by which read does
    with pytest.raises(MediaError, match="it unpacks to more than 268,435,456 bytes"):
        read_keypoints(file)


def test_damage_is_found_by_its_checksum(file):
    data = bytearray(file.read_bytes())
    place = data.find(b"\x93NUMPY", data.find(b"points.npy")) + 200
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(MediaError, match=r"Bad CRC-32 for file 'points\.npy'"):
        read_keypoints(file)


def test_what_is_no_such_file(tmp_path):
    path = tmp_path / "a.npz"
    for data, words in ((b"", r"is empty \(0 bytes\)"), (b"PK\3\4", "File is not a zip"), (b"<html>", "not a zip")):
        path.write_bytes(data)
        with pytest.raises(MediaError, match=words):
            read_keypoints(path)
    path.unlink()
    with pytest.raises(MediaError, match="No such file") as refusal:
        read_keypoints(path)
    assert not refusal.value.lasting
    os.mkfifo(path)  # opening it would wait for ever
    with pytest.raises(MediaError, match="not a regular file"):
        read_keypoints(path)
