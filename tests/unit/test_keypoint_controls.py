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


def scanned(folder, *controls, clip="a.mp4", index=None):
    kind = "video" if clip.endswith("mp4") else "image"
    rows = [{"file_path": clip, "text": "x", "type": kind, "control_file_path": control} for control in controls]
    (folder / "list.json").write_text(json.dumps(rows))
    return scan(folder / "list.json", folder, needs=CONTROL, max_bad_share=1.0, index_dir=index)


def refusal(folder, control, clip="a.mp4") -> str:
    with pytest.raises(UserError, match="1 of 1 entries") as caught:
        scanned(folder, control, clip=clip)
    assert "entry 0, a." in caught.value.problems[1]
    return caught.value.problems[1]


def test_key_points_of_the_clip_are_its_control(folder):
    write_keypoints(folder / "a.npz", walk(5, 48, 64))
    write_keypoints(folder / "halved.npz", walk(5, 24, 32))  # found on a smaller copy
    write_keypoints(folder / "still.npz", walk(1, 48, 64))
    found = scanned(folder, "a.npz", "halved.npz")
    assert [row.control_path for row in found.records] == [str(folder / "a.npz"), str(folder / "halved.npz")]
    assert [(row.frames, row.height, row.width) for row in found.records] == [(5, 48, 64)] * 2
    assert len(scanned(folder, "still.npz", clip="a.png").records) == 1


def test_what_does_not_fit_its_clip_is_refused_in_words(folder):
    write_keypoints(folder / "short.npz", walk(4, 48, 64))
    assert "control " in (told := refusal(folder, "short.npz")) and "has 4 frames, its clip 5" in told
    write_keypoints(folder / "tall.npz", walk(5, 64, 48))
    assert "has 48x64 pixels, its subject 64x48: aspects differ" in refusal(folder, "tall.npz")
    write_keypoints(folder / "slow.npz", walk(5, 48, 64, fps=7.9))
    told = refusal(folder, "slow.npz")
    assert "has frame 1 at 0.127 s, its clip at 0.125 s: times differ" in told and "Make it again" in told
    write_keypoints(folder / "rounded.npz", walk(5, 48, 64, times_s=np.arange(5) / 8 + [0, 9e-4, 0, -9e-4, 0]))
    assert len(scanned(folder, "rounded.npz").records) == 1  # as Matroska rounds times
    write_keypoints(folder / "late.npz", walk(5, 48, 64, times_s=np.arange(5) / 8 + [0, 0, 0, 0, 0.0015]))
    assert "has frame 4 at 0.50" in refusal(folder, "late.npz")
    write_keypoints(folder / "moving.npz", walk(2, 48, 64))
    assert "has 2 frames" in refusal(folder, "moving.npz", clip="a.png")


def test_what_is_no_file_of_key_points_is_refused_in_words(folder):
    path = folder / "a.npz"
    assert "No such file" in refusal(folder, "a.npz")
    path.write_bytes(b"x" * 100)
    assert "is not a sound file of key points: File is not a zip file" in refusal(folder, "a.npz")
    write_keypoints(path, walk(5, 48, 64))
    path.write_bytes(path.read_bytes()[:-300])
    assert "is not a sound file of key points" in refusal(folder, "a.npz")
    np.savez(path, people=np.array([{}], object))
    assert "it holds people, not facts" in refusal(folder, "a.npz")
    write_keypoints(path, walk(5, 48, 64))
    rewritten(path, {"facts.npy": b"\x93NUMPY\1\0\x10\0" + b"{" * 16})
    assert "Make it again with reeltune control" in refusal(folder, "a.npz")


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
        "nobody is in 5 of its 5 frames, which are drawn black" in line for line in scanned(folder, "a.npz").notices
    )


def test_another_clip_under_the_same_name_is_noticed_by_a_second_scan(folder):
    write_keypoints(folder / "a.npz", walk(5, 48, 64))
    assert len(scanned(folder, "a.npz", index=folder / "index").records) == 1
    write_clip(folder / "a.mp4", np.zeros((5, 48, 64, 3), np.uint8), 12.0)
    with pytest.raises(UserError, match="times differ"):
        scanned(folder, "a.npz", index=folder / "index")


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
