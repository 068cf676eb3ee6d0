"""Inputs that were once answered wrongly: each is answered rightly, refused in words, or noticed."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Record, Shape
from reeltune.data.camera import CameraError, read_poses
from reeltune.data.held_out import refuse_shared
from reeltune.data.media import MediaError, frames_on_show, measure, read_frames
from reeltune.data.scan import scan
from reeltune.data.shapes import SizeRules
from reeltune.sampling.prompts import notice_short, prompt_record


def whole(path: Path) -> np.ndarray:
    """uint8 F C H W: all of it."""
    found = measure(path, "image" if path.suffix == ".png" else "video", "full")
    size = found.height, found.width
    return read_frames(path, range(found.frames), Crop(*size, 0, 0), Shape(found.frames, *size))


def trimmed(folder: Path, name: str, first: int, count: int):
    source, shown = whole(folder / "src_75f.mp4"), whole(folder / name)
    assert len(shown) == count
    assert np.array_equal(shown[0], source[first])


def hdr(folder: Path):
    with pytest.raises(MediaError, match="HDR") as refused:
        measure(folder / "hdr_hlg_phone.mov", "video", "header")
    assert "SDR" in refused.value.remedy
    assert measure(folder / "sdr_same.mp4", "video").notes == ()


def alpha(folder: Path):
    clip, picture = whole(folder / "alpha_prores4444.mov")[0].astype(int), whole(folder / "alpha.png")[0]
    assert np.abs(clip - picture).mean() < 3
    assert (picture[:, :8, :8] == 255).all() and clip[:, :8, :8].min() > 250
    assert "transparent" in measure(folder / "alpha_prores4444.mov", "video").notes[0]


def profile(folder: Path):
    red, green, blue = whole(folder / "icc_profile_red_is_blue.png")[0, :, 30, 30].tolist()
    assert blue > 200 and max(red, green) < 40


def interlaced(folder: Path):
    path = folder / "interlaced_h264.mp4"
    assert measure(path, "video").notes == ("its frames are interlaced, and are deinterlaced",)


def size_changes(folder: Path):
    with pytest.raises(MediaError, match="changes its size: 160x96 pixels at first, 96x160 from frame 25 on"):
        measure(folder / "size_changes_midway.ts", "video")


def default_stream(folder: Path):
    found = measure(folder / "two_streams_default_second.mkv", "video")
    assert (found.width, found.height, found.frames) == (160, 96, 25)
    assert "several video streams" in found.notes[0]


def uneven(folder: Path):
    path = folder / "vfr_30_then_5.mp4"
    found = measure(path, "video")
    assert "at 5 to 30 a second" in found.notes[0]
    ranks = frames_on_show(str(path), list(range(28)), found.fps, 10.0)  # 30 frames in 1 s, then 10 in 2 s
    assert ranks[:10] == list(range(0, 30, 3))
    assert ranks[10:] == [30 + n // 2 for n in range(18)]


def short_control(folder: Path, caplog):
    rules = SizeRules(video_sample_n_frames=9, video_sample_stride=4, video_sample_size=64, image_sample_size=64)
    path = str(folder / "three_frame_control.mp4")
    with caplog.at_level(logging.WARNING):
        notice_short(prompt_record(0, "a thing", path, rules, "control", 16.0), rules)
    assert f"{path}: the clip has fewer than 9 frames at stride 4, and 1 frame is made" in caplog.text


MEDIA = {
    "trim_copy_ss0.6.mp4": lambda folder: trimmed(folder, "trim_copy_ss0.6.mp4", first=15, count=37),
    "trim_phone_end.mp4": lambda folder: trimmed(folder, "trim_phone_end.mp4", first=0, count=50),
    "hdr_hlg_phone.mov": hdr,
    "alpha_prores4444.mov": alpha,
    "icc_profile_red_is_blue.png": profile,
    "interlaced_h264.mp4": interlaced,
    "size_changes_midway.ts": size_changes,
    "two_streams_default_second.mkv": default_stream,
    "vfr_30_then_5.mp4": uneven,
    "three_frame_control.mp4": short_control,
}


@pytest.mark.parametrize("name", MEDIA)
def test_media(cases, caplog, name):
    if not (cases / "media" / name).exists():
        pytest.skip(f"no {name}")
    MEDIA[name](cases / "media", *([caplog] if name == "three_frame_control.mp4" else []))


CAMERA = {
    "good.txt": None,
    "pixel_intrinsics_1280x720.txt": r"line 2: focal lengths 1152, 1152 .*are these pixels\?",
    "scaled_rotation.txt": "line 2: .*a rotation scaled by 100",
    "timestamps_backwards.txt": r"line 3: times run backwards \(767418 comes after 800784\)",
    "cameractrl_18_no_time.txt": "line 2: 18 columns; a pose has 19 numbers",
}


@pytest.mark.parametrize("name", CAMERA)
def test_camera(cases, name):
    path = cases / "camera" / name
    if CAMERA[name] is None:
        assert read_poses(path).shape[1] == 19
    else:
        with pytest.raises(CameraError, match=CAMERA[name]):
            read_poses(path)


REFUSED = {  # the words for each entry
    "windows_backslashes.json": ["there is train/c1.mp4 (with / and not \\)", "there is train/c2.mp4 (with / and"],
    "wrong_case.json": ["there is c1.mp4 (in other letter case)", "there is train/c1.mp4 (in other letter case)"],
    "keys_of_other_tools_musubi.json": ["has no file_path, but video_path; has no text, but caption; control_file_"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_lists_that_are_refused(cases, name):
    with pytest.raises(UserError) as refused:
        scan(cases / "meta" / name, cases / "meta", needs=frozenset({"control"}), max_bad_share=1.0)
    _, *lines = refused.value.problems
    for line, words in zip(lines, REFUSED[name], strict=True):
        assert words in line


def test_captions_that_are_paths_are_said(cases):
    found = scan(cases / "meta/text_is_path_to_txt.json", cases / "meta", needs=frozenset({"control"}))
    assert any(notice.startswith("2 entries (0, 1): the caption is a file's name") for notice in found.notices)


def test_a_training_clip_held_out_under_another_name_is_refused(cases, tmp_path):
    folder = tmp_path / "meta"
    shutil.copytree(cases / "meta", folder)
    for path in (folder, folder / "val"):
        path.chmod(0o755)
    link = folder / "val/link"
    if not link.exists():
        link.symlink_to("..")

    def records(name: str) -> list[Record]:
        return list(scan(folder / name, folder, needs=frozenset({"control"})).records)

    held_out = records("validation_same_file_by_symlink_and_copy.json")
    assert len(held_out) == len(json.loads((folder / "validation_same_file_by_symlink_and_copy.json").read_text()))
    with pytest.raises(UserError, match=r"train_data_meta has 2 of its files too: .*the same as .*/c1\.mp4"):
        refuse_shared(records("resume_base.json"), held_out)
