"""Key points in a metadata list: held against their clip, refused in words, and noticed when they change."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Record, Shape
from reeltune.data import pose_drawing
from reeltune.data.clips import index_of
from reeltune.data.identity import Identity, changes
from reeltune.data.keypoints import Keypoints, People, digest_of, write_keypoints
from reeltune.data.media import frames_on_show, read_frames, write_clip
from reeltune.data.records import Records
from reeltune.data.scan import scan
from reeltune.data.shapes import SizeRules
from reeltune.families.toy.family import FAMILY
from reeltune.sampling.prompts import prompt_requests
from tests.unit.people import rewritten, walk
from tests.unit.test_media import encode, numbered

CONTROL = frozenset({"control"})


@pytest.fixture
def folder(tmp_path):
    frames_FHWC = np.random.RandomState(0).randint(0, 255, (5, 6, 8, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    write_clip(tmp_path / "a.mp4", frames_FHWC, 8.0)
    Image.fromarray(frames_FHWC[0]).save(tmp_path / "a.png")
    return tmp_path


def scanned(folder, *controls, index=None):
    """Of a row for each (control, its clip)."""
    rows = [
        {
            "file_path": clip,
            "text": "x",
            "type": "video" if clip.endswith("mp4") else "image",
            "control_file_path": name,
        }
        for name, clip in controls
    ]
    (folder / "list.json").write_text(json.dumps(rows))
    return scan(folder / "list.json", folder, needs=CONTROL, max_bad_share=0.0, index_dir=index)


def assert_refused(folder, expected: dict[tuple[str, str], str]) -> None:
    """expected: (control, its clip) -> words of the refusal, which names the entry."""
    with pytest.raises(UserError) as caught:
        scanned(folder, *expected)
    told = caught.value.problems[1:]
    assert len(told) == len(expected)
    for entry, (line, ((control, clip), words)) in enumerate(zip(told, expected.items(), strict=True)):
        assert line.startswith(f"entry {entry}, {clip}: ") and control in line and words in line, line


def test_key_points_of_the_clip_are_its_control(folder):
    write_keypoints(folder / "a.npz", walk(5, 48, 64))
    write_keypoints(folder / "halved.npz", walk(5, 24, 32))  # found on a smaller copy
    write_keypoints(folder / "rounded.npz", walk(5, 48, 64, times_s=np.arange(5) / 8 + [0, 9e-4, 0, -9e-4, 0]))
    write_keypoints(folder / "still.npz", walk(1, 48, 64))
    names = ["a.npz", "halved.npz", "rounded.npz"]  # as Matroska rounds times
    found = scanned(folder, *((name, "a.mp4") for name in names), ("still.npz", "a.png"))
    assert [row.control_path for row in found.records] == [str(folder / name) for name in [*names, "still.npz"]]
    assert [(row.frames, row.height, row.width) for row in found.records] == [(5, 48, 64)] * 3 + [(1, 48, 64)]


def test_what_does_not_fit_its_clip_is_refused_in_words(folder):
    made = {
        "short": walk(4, 48, 64),
        "tall": walk(5, 64, 48),
        "slow": walk(5, 48, 64, fps=7.9),
        "late": walk(5, 48, 64, times_s=np.arange(5) / 8 + [0, 0, 0, 0, 0.0015]),
        "moving": walk(2, 48, 64),
    }
    for name, keypoints in made.items():
        write_keypoints(folder / f"{name}.npz", keypoints)
    assert_refused(
        folder,
        {
            ("short.npz", "a.mp4"): "has 4 frames, its clip 5: lengths differ",
            ("tall.npz", "a.mp4"): "has 48x64 pixels, its subject 64x48: aspects differ",
            ("slow.npz", "a.mp4"): "has frame 1 at 0.127 s, its clip at 0.125 s: times differ. Make it again",
            ("late.npz", "a.mp4"): "has frame 4 at 0.50",
            ("moving.npz", "a.png"): "has 2 frames",
        },
    )


def test_what_is_no_file_of_key_points_is_refused_in_words(folder):
    for name in ("cut", "parts"):
        write_keypoints(folder / f"{name}.npz", walk(5, 48, 64))
    (folder / "noise.npz").write_bytes(b"x" * 100)
    (folder / "cut.npz").write_bytes((folder / "cut.npz").read_bytes()[:-300])
    np.savez(folder / "pickle.npz", people=np.array([{}], object))
    rewritten(folder / "parts.npz", {"facts.npy": b"\x93NUMPY\1\0\x10\0" + b"{" * 16})
    assert_refused(
        folder,
        {
            ("absent.npz", "a.mp4"): "No such file",
            ("noise.npz", "a.mp4"): "is not a sound file of key points: File is not a zip file",
            ("cut.npz", "a.mp4"): "is not a sound file of key points",
            ("pickle.npz", "a.mp4"): "it holds people, not facts",
            ("parts.npz", "a.mp4"): "Make it again with reeltune control",
        },
    )


def test_key_points_are_no_clip(folder):
    write_keypoints(folder / "a.npz", walk(5, 48, 64))
    (folder / "list.json").write_text(json.dumps([{"file_path": "a.npz", "text": "x", "type": "video"}]))
    with pytest.raises(UserError, match="cannot be opened as a clip"):
        scan(folder / "list.json", folder, needs=frozenset())


def test_frames_without_people_are_told(folder):
    nobody = People.nobody("coco")
    made = Keypoints.of([nobody] * 5, np.arange(5) / 8, layout="coco", height=48, width=64, detector="d")
    write_keypoints(folder / "a.npz", made)
    assert any(
        "nobody is in 5 of its 5 frames, which are drawn black" in line
        for line in scanned(folder, ("a.npz", "a.mp4")).notices
    )


def test_another_clip_under_the_same_name_is_noticed_by_a_second_scan(folder):
    write_keypoints(folder / "a.npz", walk(5, 48, 64))
    assert len(scanned(folder, ("a.npz", "a.mp4"), index=folder / "index").records) == 1
    write_clip(folder / "a.mp4", np.zeros((5, 48, 64, 3), np.uint8), 12.0)
    with pytest.raises(UserError, match="times differ"):
        scanned(folder, ("a.npz", "a.mp4"), index=folder / "index")


def test_a_run_that_goes_on_notices_other_key_points_of_the_same_size(folder, monkeypatch):
    path = folder / "a.npz"

    def identity(drift: float) -> Identity:
        made = walk(5, 48, 64)
        write_keypoints(path, replace(made, points=(made.points + np.float16(drift)).astype(np.float16)))
        os.utime(path, ns=(0, int(drift * 1000)))
        record = Record(0, str(folder / "a.mp4"), "x", "video", 5, 8.0, 48, 64, control_path=str(path))
        return Identity.of(Records.of([record]), folder)

    first, same, other = identity(0), identity(0), identity(0.25)
    assert not changes(first, same).any and changes(first, other).replaced == [0]
    before = pose_drawing.drawing_digest(str(path))
    monkeypatch.setattr(pose_drawing, "DRAWING_VERSION", 99)
    assert pose_drawing.drawing_digest(str(path)) == f"99 {digest_of(str(path))}" != before


def test_frames_of_uneven_times_are_the_ones_on_show(tmp_path):
    """The same frames as of the clip from which the key points were made, at any rate."""
    clip = tmp_path / "a.mp4"
    encode(clip, numbered(40), pts=[n if n < 30 else 30 + 6 * (n - 30) for n in range(40)], ticks=30, bf=0, crf=12)
    times_s = index_of(str(clip)).times_s
    count = len(times_s)
    write_keypoints(tmp_path / "a.npz", walk(count, 48, 64, times_s=times_s))
    fps = (count - 1) / times_s[-1]
    for rate, start in ((10.0, 0), (5.0, 7)):
        frames = list(range(start, start + 12))
        on_show = frames_on_show(clip, frames, fps, rate)
        assert list(frames_on_show(tmp_path / "a.npz", frames, fps, rate)) == list(on_show) != frames
    write_keypoints(tmp_path / "even.npz", walk(9, 48, 64))
    assert frames_on_show(tmp_path / "even.npz", [0, 2, 4], 8.0, 4.0) == [0, 2, 4]


def test_a_prompt_follows_key_points_as_it_follows_a_clip(folder):
    write_keypoints(folder / "a.npz", walk(9, 48, 64))
    write_keypoints(folder / "still.npz", walk(1, 48, 64))
    sizes = {"video_sample_n_frames": 9, "video_sample_stride": 1, "video_sample_size": 32, "image_sample_size": 32}
    rules = SizeRules(**sizes, geometry=FAMILY.geometry)
    paths = [str(folder / "a.npz"), str(folder / "still.npz")]
    clip, still = prompt_requests(FAMILY, "control", ["walk", "stand"], paths, rules, seed=0)
    batch = clip.batch()
    draw = batch.draws[0]
    assert clip.fps == 8.0 and batch.control_BFCHW.shape[1] == 9 and still.batch().control_BFCHW.shape[1] == 1
    drawn_FCHW = read_frames(paths[0], draw.frames, draw.crop, draw.shape)
    assert drawn_FCHW.any() and np.array_equal(batch.control_BFCHW[0], drawn_FCHW)
    assert draw.shape[1:] == drawn_FCHW.shape[2:] and isinstance(draw.crop, Crop) and isinstance(draw.shape, Shape)
    (folder / "a.npz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is not a sound file of key points.* needs a control clip or picture, or key"):
        prompt_requests(FAMILY, "control", ["walk"], paths[:1], rules, seed=0)
