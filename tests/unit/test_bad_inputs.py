"""Broken and awkward inputs: each file and list gets its answer, whatever else happens, in bounded time."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Shape
from reeltune.data.media import MediaError, measure, read_frames
from reeltune.data.scan import scan

SECONDS = 120  # a case may take, on a busy machine; each needs under one

# What `measure` finds: (kind, frames, height, width, words of a note), or the words of a refusal.
FILES = {
    "good.mp4": ("video", 40, 96, 128, None),
    "control_40f.mp4": ("video", 40, 96, 128, None),
    "good.png": ("image", 1, 96, 128, None),
    "truncated_no_moov.mp4": "cannot be opened",
    "truncated_faststart.mp4": "cut short",
    "bitrot_mdat.mp4": "does not decode",
    "zero_byte.mp4": "is empty",
    "zero_byte.png": "is empty",
    "text_as_video.mp4": "cannot be opened",
    "text_as_image.jpg": "is not a picture",
    "audio_only.mp4": "no video stream",
    "single_frame.mp4": ("video", 1, 96, 128, None),
    "three_frames.mp4": ("video", 3, 96, 128, None),
    "vfr.mp4": ("video", 72, 96, 128, "unevenly spaced"),
    "rotated_90.mp4": ("video", 24, 160, 96, None),
    "hevc_10bit.mp4": ("video", 24, 96, 128, None),
    "vp9.webm": ("video", 24, 96, 128, None),
    "av1.mp4": ("video", 24, 96, 128, None),
    "odd_dims_444.mp4": ("video", 24, 95, 127, None),
    "odd_dims.png": ("image", 1, 95, 127, None),
    "sar_2_1.mp4": ("video", 24, 96, 192, "not square"),
    "extreme_aspect.mp4": ("video", 24, 48, 640, None),
    "control_short_12f.mp4": ("video", 12, 96, 128, None),
    "control_other_aspect.mp4": ("video", 40, 128, 96, None),
    "truncated.png": "cannot be read",
    "corrupt_crc.png": "cannot be read",
    "rgba.png": ("image", 1, 96, 128, None),
    "gray16.png": ("image", 1, 96, 128, None),
    "cmyk.jpg": ("image", 1, 96, 128, None),
    "exif_rotated.jpg": ("image", 1, 128, 96, None),
    "one_pixel.png": "too small: 1x1",
}


class Answer(NamedTuple):
    """Of a list that can be read: entries kept, entries refused with words of the reason, words of the notices."""

    kept: list[int]
    refused: Mapping[int, str] = MappingProxyType({})
    notices: tuple[str, ...] = ()


LENGTHS, ASPECTS, NO_CONTROL = "lengths differ", "aspects differ", "needs a control"

# For the mode that needs a control clip or picture, unless `needs_of` says otherwise. A string: refused as a whole.
LISTS = {
    "all_good.json": Answer([0, 1]),
    "good.csv": Answer([0, 1]),
    "not_json.json": "line 2, column 3: dots are not JSON",
    "trailing_comma.json": "line 1, column 58: not JSON: a comma before the closing bracket",
    "truncated.json": "cut short",
    "empty.json": "the file is empty",
    "jsonl.json": "line 2, column 1: a second object; JSON lines belong in a file that ends in .jsonl",
    "metadata.jsonl": Answer([0]),
    "metadata.txt": ".json, .jsonl, .csv",
    "empty_list.json": "nothing to train on",
    "top_level_object.json": "expected a list of objects, found an object; the list under 'samples'",
    "list_of_strings.json": Answer([], {0: "is a string, not an object"}),
    "file_path_list.json": Answer([], {0: "file_path is a list, not a string"}),
    "missing_file_path.json": Answer([1], {0: "no file_path"}),
    "missing_text.json": Answer([1], {0: "no text"}),
    "missing_control.json": Answer([1], {0: NO_CONTROL}),
    "missing_type_is_video.json": Answer([0, 1], {}, ("1 entry (0): there is no type",)),
    "null_control_video.json": Answer([], {0: "control_file_path is null; this mode " + NO_CONTROL}),
    "null_control_image.json": Answer([], {0: "control_file_path is null; this mode " + NO_CONTROL}),
    "control_file_absent.json": Answer([1], {0: "nope.mp4 cannot be opened: No such file"}),
    "media_file_absent.json": Answer([1], {0: "the file cannot be opened: No such file"}),
    "control_shorter.json": Answer([1], {0: "has 12 frames, its clip 40: " + LENGTHS}),
    "control_other_aspect.json": Answer([], {0: "has 96x128 pixels, its subject 128x96: " + ASPECTS}),
    "control_is_image_for_video.json": Answer([], {0: "good.png is a picture, not a clip"}),
    "unknown_type.json": Answer([1, 2], {0: "type is audio"}, ("(1): type Video is taken as 'video'",)),
    "type_mismatch.json": Answer([2], {0: "is not a picture", 1: "is a picture, not a clip"}),
    "path_escape.json": Answer([3], dict.fromkeys((0, 1, 2), "leaves the data folder")),
    "empty_text.json": Answer(
        [0, 1], {2: "text is null", 3: "text is a number", 4: "text is a list"}, ("2 entries (0, 1): the caption is",)
    ),
    "duplicates.json": Answer([0, 1, 2, 3, 4], {}, ("(1, 4): the entry repeats", "(2): an earlier entry has the same")),
    "non_utf8.json": "byte 0xe9 at offset 39 (line 1) is not UTF-8",
    "utf16.json": "the file is UTF-16 (byte 0xff at offset 0)",
    "utf8_bom.json": Answer([0]),
    "wrong_size_fields.json": Answer(
        [0, 1, 5],
        {2: "width is 0, not a positive", 3: "height is -1", 4: "width is wide"},
        ("1 entry (0): width and height are exchanged",),
    ),
    "all_bad_videos.json": Answer([], {0: "is empty", 1: "cannot be opened", 2: "cannot be opened"}),
    "short_videos.json": Answer([0, 1, 2]),
    "subject_missing.json": Answer([1, 2], {0: "nope.png cannot be opened"}),
    "camera.json": Answer(
        [3],
        {0: "line 2: 18 columns", 1: "line 2: a number is not finite", 2: "no inverse", 4: "line 1 is a pose"},
    ),
    "long_and_control_chars.json": Answer([0, 1]),
    "csv_no_header.csv": "no column file_path and no column text",
    "csv_ragged.csv": Answer([], {0: "line 2 has 4 columns", 1: "line 3 has 1 columns"}),
    "csv_semicolon.csv": "no column file_path and no column text; the first row must name the columns, "
    "and reads file_path;text;type; separate the columns by commas",
    "codecs.json": Answer([0, 1, 2, 3, 4, 5, 6, 7], {}, ("not square", "unevenly spaced", "longer than 4:1")),
    "images.json": Answer(
        [0, 1, 2, 4],
        {3: ASPECTS, 5: "too small", 6: "cannot be read", 7: "cannot be read", 8: "is empty", 9: "is not a picture"},
    ),
}
NO_NEEDS = ("codecs.json", "short_videos.json", "missing_type_is_video.json")


def needs_of(name: str) -> frozenset[str]:
    return frozenset() if name in NO_NEEDS else frozenset({"camera" if name == "camera.json" else "control"})


def present(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


@pytest.fixture(autouse=True)
def bounded():
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < SECONDS


@pytest.mark.parametrize("name", FILES)
def test_file(bad_inputs, name):
    path = present(bad_inputs / "files" / name)
    answer = FILES[name]
    kind = "video" if path.suffix in (".mp4", ".webm") else "image"
    if isinstance(answer, str):
        with pytest.raises(MediaError, match=answer):
            measure(path, kind)
        return
    found = measure(path, kind)
    assert (found.kind, found.frames, found.height, found.width) == answer[:4]
    assert answer[4] is None if not found.notes else answer[4] in found.notes[0]
    _, height, width = shape = Shape(found.frames, found.height, found.width)
    frames = read_frames(path, range(found.frames), Crop(height, width, 0, 0), shape)
    assert frames.shape == (found.frames, 3, height, width)
    assert frames.std() > 5  # a picture, not one flat colour


@pytest.mark.parametrize("name", LISTS)
def test_list(bad_inputs, name, measured_here):
    meta, answer = present(bad_inputs / "metadata" / name), LISTS[name]
    settings = {"needs": needs_of(name), "workers": 1}

    def scanned(max_bad_share):
        return scan(meta, bad_inputs / "files", max_bad_share=max_bad_share, **settings)

    if isinstance(answer, str):
        with pytest.raises(UserError) as caught:
            scanned(1.0)
        assert caught.value.where == str(meta)
        assert answer in caught.value.problems[0]
    elif not answer.kept:  # nothing is left: refused at any share, and every row is told
        with pytest.raises(UserError) as caught:
            scanned(1.0)
        told = caught.value.problems[1:]
        assert len(told) == len(answer.refused)
        for line, (entry, words) in zip(told, answer.refused.items(), strict=True):
            assert line.startswith(f"entry {entry}")
            assert words in line
    else:
        found = scanned(1.0)
        assert found.records.entry.tolist() == answer.kept
        assert {left.entry for left in found.left_out} == set(answer.refused)
        for left in found.left_out:
            assert answer.refused[left.entry] in left.reason
            assert left.remedy
        for words in answer.notices:
            assert sum(words in notice for notice in found.notices) == 1
        if answer.refused:  # more than a twentieth is bad, so the usual share stops the run and lists them all
            with pytest.raises(UserError) as caught:
                scan(meta, bad_inputs / "files", **settings)
            assert len(caught.value.problems) == 1 + len(answer.refused)


def test_values_that_have_their_own_rule(bad_inputs, tmp_path):
    """Rows beyond the lists: each answer follows from the row alone."""
    good = {"file_path": "good.mp4", "control_file_path": "control_40f.mp4", "text": "x", "type": "video"}
    rows = {
        "is null, not an object": None,
        "is a list, not an object": [good],
        "file_path is empty": good | {"file_path": " "},
        "cannot be a file's name": good | {"file_path": "a\0b.mp4"},
        "file_path '\\ud800.mp4' cannot be": good | {"file_path": "\ud800.mp4"},
        "half of a character": good | {"text": "\udc00"},
        "is a folder": good | {"file_path": "."} | {"file_path": "../files/../files/sub"},
        "type is 7": good | {"type": 7},
        "README does not tell it": {k: v for k, v in good.items() if k != "type"} | {"file_path": "README"},
        "control_file_path is a list": good | {"control_file_path": ["control_40f.mp4"]},
        "this mode needs a control clip or picture": good | {"control_file_path": "camera_nan.txt"},
        "object_file_path is a number": good | {"object_file_path": [3]},
        "width is True": good | {"width": True},
        "width is nan": good | {"width": float("nan")},
        "height is 96.5": good | {"height": "96.5"},
        "File name too long": good | {"file_path": "n" * 300 + ".mp4"},
    }
    files = tmp_path / "files"
    (files / "sub").mkdir(parents=True)
    for name in ("good.mp4", "control_40f.mp4"):
        (files / name).write_bytes(present(bad_inputs / "files" / name).read_bytes())
    meta = tmp_path / "rows.json"
    meta.write_text(json.dumps([*rows.values(), good]))
    found = scan(meta, files, needs=frozenset({"control"}), max_bad_share=1.0, workers=1)
    assert found.records.entry.tolist() == [len(rows)]
    for left, words in zip(found.left_out, rows, strict=True):
        assert words in left.reason
        assert str(left).isprintable()
