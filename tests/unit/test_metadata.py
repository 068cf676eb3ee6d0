"""Lists and rows: what is read, left out, refused and told."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from reeltune.core.errors import UserError
from reeltune.data.media import write_clip
from reeltune.data.scan import scan
from tests.unit.listed import CONTROL, PLAIN, lay_out, write_list

pytestmark = pytest.mark.usefixtures("measured_here")


@pytest.fixture
def folder(tmp_path) -> Path:
    return lay_out(tmp_path)


# Lists


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_three_forms_say_the_same(folder, ending):
    found = scan(folder / f"list.{ending}", folder, needs=PLAIN)
    assert [os.path.basename(row.path) for row in found.records] == [f"{n}.png" for n in range(4)] + ["0.mp4", "1.mp4"]
    assert [row.text for row in found.records] == [f'picture, "{n}"' for n in range(4)] + ["clip\n0", "clip\n1"]
    assert found.records.frames.tolist() == [1, 1, 1, 1, 9, 10]
    assert found.records.width.tolist() == [64, 80, 96, 112, 64, 64]
    assert found.records.height.tolist() == [48] * 6
    assert found.records.fps.tolist() == [0, 0, 0, 0, 8, 8]
    assert (found.left_out, found.notices, found.entries) == ([], [], 6)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '[{"a": 1} {"b": 2}]', "line 1, column 11: not JSON: expected a comma or ]"),
        ("a.json", '[{"a": 1}]\n[2]', "line 2, column 1: not JSON: more text after the list"),
        ("a.json", '[{"a": 1},', "cut short"),
        ("a.json", '[{"a": 1}\n', "the list is not closed"),
        ("a.json", '[{"a": 1},\n {"b": }]', "line 2, column 8: not JSON: Expecting value"),
        ("a.json", "[" * 100_000, "not usable JSON: it is nested too deeply"),
        ("a.json", "[1" + "0" * 4300 + "]", "not usable JSON: a number has more than 4,300 digits"),
        ("a.json", '"x"', "expected a list of objects, found a string"),
        ("a.json", " \n", "the file is empty"),
        ("a.jsonl", '{"a": 1}\n{"b": 2', "line 2"),
        ("a.jsonl", '{"a": 1} {"b": 2}', "line 1, column 9: JSON lines hold one object a line"),
        ("a.jsonl", '[{"a": 1}]', "a list belongs in a .json file"),
        ("a.csv", "file_path,text,text\na,b,c", "names text more than once"),
        ("a.csv", 'file_path,text\na,"b\n', "line 2: not CSV"),
        ("a.csv", "file_path,text\n", "the list is empty"),
        ("a.json", "[\0]", "byte 0x00 at offset 1"),
        ("a.json", "<html>", "is a saved web page; download the file itself"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
        ("a.json", '{"a": 1, "a": 2}', "expected a list of objects, found an object"),
    ],
)
def test_unreadable_lists(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        scan(tmp_path / name, tmp_path, needs=PLAIN)
    assert caught.value.where == str(tmp_path / name)
    assert words in caught.value.problems[0]


def test_absent_list(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        scan(tmp_path / "none.json", tmp_path, needs=PLAIN)


# Rows


def test_share_of_bad_rows(folder):
    good = {"file_path": "0.png", "text": "x", "type": "image"}
    meta = write_list(folder, [good] * 19 + [{"text": "no file"}])
    found = scan(meta, folder, needs=PLAIN, max_bad_share=0.05)
    assert (len(found.records), [left.entry for left in found.left_out]) == (19, [19])
    with pytest.raises(UserError) as caught:
        scan(meta, folder, needs=PLAIN, max_bad_share=0.049)
    head, line = caught.value.problems
    assert head == "1 of 20 entries (5.00%) cannot be used; max_bad_share allows 4.90%; mend them, or raise " + (
        "max_bad_share to train without them"
    )
    assert line == "entry 19: has no file_path. Name its clip or picture"


@pytest.mark.parametrize("named", ["rows.json", "0.png"])
def test_a_file_in_the_place_of_the_data_folder(named, folder):
    meta = write_list(folder, [{"file_path": "0.png", "text": "x"}])
    with pytest.raises(UserError) as told:
        scan(meta, folder / named, needs=PLAIN)
    what = "is that list" if named == "rows.json" else "is a file"
    remedy = f"give the folder in which the list's paths begin, as {folder} may be"
    assert told.value.where == "train_data_dir"
    assert told.value.problems == [f"{str(folder / named)!r} {what}; {remedy}"]


def test_all_paths_are_within_the_root(folder):
    meta = write_list(folder, [{"file_path": str(folder / "0.png"), "text": "x"}])
    assert [row.path for row in scan(meta, Path("/"), needs=PLAIN).records] == [str(folder / "0.png")]


def test_outside_paths_when_allowed(folder):
    inner = folder / "inner"
    inner.mkdir()
    meta = write_list(
        inner, [{"file_path": "../0.png", "text": "x"}, {"file_path": str(folder / "1.png"), "text": "y"}]
    )
    with pytest.raises(UserError, match="leaves the data folder"):
        scan(meta, inner, needs=PLAIN)
    found = scan(meta, inner, needs=PLAIN, allow_outside_paths=True)
    assert [row.path for row in found.records] == [str(folder / "0.png"), str(folder / "1.png")]
    beside = folder / "inner-too"
    beside.mkdir()
    (folder / "3.png").rename(beside / "3.png")
    with pytest.raises(UserError, match="leaves the data folder"):
        scan(write_list(inner, [{"file_path": "../inner-too/3.png", "text": "x"}]), inner, needs=PLAIN)
    (folder / "linked").symlink_to(inner)
    (inner / "2.png").symlink_to(folder / "2.png")
    absolute = write_list(inner, [{"file_path": str(inner / "2.png"), "text": "inside by its real name"}])
    assert len(scan(absolute, folder / "linked", needs=PLAIN).records) == 1


def test_controls(folder):
    """Kept where the mode needs them, measured beside their clip; unread where not."""
    Image.new("RGB", (65, 49)).save(folder / "near.png")  # the size of a picture rounded otherwise
    entries = [
        {"file_path": "0.png", "control_file_path": "near.png", "text": "x", "type": "image"},
        {"file_path": "0.mp4", "control_file_path": "0.mp4", "text": "x", "type": "video"},
        {"file_path": "0.mp4", "control_file_path": "1.mp4", "text": "x", "type": "video"},
        {"file_path": "0.mp4", "control_file_path": "none.mp4", "text": "x", "type": "video"},
    ]
    meta = write_list(folder, entries)
    found = scan(meta, folder, needs=CONTROL, max_bad_share=0.5)
    assert [row.control_path for row in found.records] == [str(folder / "near.png"), str(folder / "0.mp4")]
    assert "has 10 frames, its clip 9" in found.left_out[0].reason
    assert "No such file" in found.left_out[1].reason
    unread = scan(meta, folder, needs=PLAIN)
    assert [row.control_path for row in unread.records] == [None] * 4


def test_a_control_that_is_the_clip_itself_is_told(folder):
    (folder / "copy.mp4").write_bytes((folder / "0.mp4").read_bytes())
    entries = [{"file_path": "0.mp4", "control_file_path": name, "text": "x"} for name in ("0.mp4", "copy.mp4")]
    notices = scan(write_list(folder, entries), folder, needs=CONTROL).notices
    words = (
        "2 entries (0, 1): its control is the clip itself or a copy of it, and teaches the model to copy its control"
    )
    assert words in notices


def test_paths_that_other_programs_understand(folder):
    entries = [{"file_path": path, "text": "x", "type": "image"} for path in ("https://a.b/0.png", f"/{folder}/0.png")]
    found = scan(write_list(folder, entries), folder, needs=PLAIN, max_bad_share=0.5)
    assert [row.path for row in found.records] == [str(folder / "0.png")]
    assert found.left_out[0].reason == "file_path https://a.b/0.png is an address, not a path"


def test_a_rate_that_can_hardly_be_meant_is_told(folder):
    rates = (0.5, 1, 1000, 100_000)
    for fps in rates:
        with av.open(str(folder / f"{fps}.mkv"), "w") as clip:
            stream = clip.add_stream("ffv1", rate=Fraction(fps), width=64, height=48, pix_fmt="yuv420p")
            for _ in range(9):
                clip.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
            clip.mux(stream.encode())
    entries = [{"file_path": f"{fps}.mkv", "text": "x", "type": "video"} for fps in rates]
    (notice,) = scan(write_list(folder, entries), folder, needs=PLAIN).notices
    assert notice.startswith("2 entries (0, 3): by its own times it has less than 1 frame or more than 1,000 a second")


def test_a_control_of_another_rate_is_told(folder):
    for name, fps in (("8", 8.1), ("12", 12)):
        write_clip(folder / f"{name}.mp4", np.zeros((9, 48, 64, 3), np.uint8), fps)
    entries = [{"file_path": "0.mp4", "control_file_path": f"{fps}.mp4", "text": "x"} for fps in (8, 12)]
    notices = scan(write_list(folder, entries), folder, needs=CONTROL).notices
    words = "1 entry (1): its control has another rate; frame by frame they are read together, whatever their times"
    assert [notice for notice in notices if "rate" in notice] == [words]


def test_stated_sizes(folder):
    base = {"file_path": "0.png", "text": "x", "type": "image"}
    sizes = [(64, 48), (48, 64), (640, 480), ("64", "48.0")]
    entries = [base | {"text": str(n), "width": w, "height": h} for n, (w, h) in enumerate(sizes)]
    found = scan(write_list(folder, entries), folder, needs=PLAIN)
    assert found.records.width.tolist() == [64] * 4
    told = [notice for notice in found.notices if "width and height" in notice]
    assert told == [
        "1 entry (1): width and height are exchanged; the file's own size is used",
        "1 entry (2): width and height are not the file's; the file's own size is used",
    ]


def test_notices_name_some_entries_and_count_all(folder):
    found = scan(write_list(folder, [{"file_path": "0.png", "text": ""}] * 30), folder, needs=PLAIN)
    empty = [notice for notice in found.notices if "caption" in notice]
    assert empty == [
        "30 entries (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...): the caption is empty, and the sample is trained without text"
    ]


def test_long_captions_in_csv(folder):
    text = "x" * 200_000
    (folder / "long.csv").write_text(f"file_path,text\n0.png,{text}\n")
    assert scan(folder / "long.csv", folder, needs=PLAIN).records[0].text == text


def test_empty_cells_are_absent_fields_but_for_captions(folder):
    (folder / "cells.csv").write_text("file_path,text,type,width,control_file_path\n0.png,,,,\n")
    found = scan(folder / "cells.csv", folder, needs=PLAIN)
    assert (found.records[0].text, found.records[0].kind, found.records[0].control_path) == ("", "image", None)
    assert len(found.notices) == 2  # the caption is empty, the ending tells the type


# Odd places and near misses


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_a_list_that_may_never_end_is_not_read(tmp_path, ending):
    os.mkfifo(tmp_path / f"pipe.{ending}")
    with pytest.raises(UserError, match="is no regular file; name a metadata file"):
        scan(tmp_path / f"pipe.{ending}", tmp_path, needs=PLAIN)
    (tmp_path / f"zero.{ending}").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is no regular file"):
        scan(tmp_path / f"zero.{ending}", tmp_path, needs=PLAIN)
    with open(tmp_path / f"large.{ending}", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"is 1,024\.0 GiB large, and a list may have 2\.0 GiB"):
        scan(tmp_path / f"large.{ending}", tmp_path, needs=PLAIN)
    with pytest.raises(UserError, match="is a folder"):
        scan(tmp_path, tmp_path, needs=PLAIN)


def near(folder: Path, named: str) -> str:
    """The reason given for a path."""
    entry = {"file_path": named, "text": "x", "type": "video"}
    with pytest.raises(UserError) as caught:
        scan(write_list(folder, [entry]), folder, needs=PLAIN)
    return caught.value.problems[1]


@pytest.mark.parametrize(
    ("there", "named", "words"),
    [
        ("train/c1.mp4", "train\\c1.mp4", "; there is train/c1.mp4 (with / and not \\). Correct the path"),
        ("train/c1.mp4", "Train/C1.MP4", "; there is train/c1.mp4 (in other letter case). Correct the path"),
        ("train/c1.mp4", "train/c1.mp4 ", "; there is train/c1.mp4 (with other spaces at the ends). Correct"),
        ("train/c1.mp4", ".\\Train\\c1.mp4", "; there is train/c1.mp4. Correct the path"),
        ("train/c1.mp4", "Train\\c1.mp4 ", "(with / and not \\, with other spaces at the ends, in other letter case)"),
        ("train/caf\u00e9.mp4", "train/cafe\u0301.mp4", "; there is train/caf\u00e9.mp4 (in another Unicode form). "),
        ("train/cafe\u0301.mp4", "train/caf\u00e9.mp4", "(in another Unicode form). Correct the path"),
        ("train/c1.mp4", "train/c1.mov", "; there is train/c1.mp4. Correct the path"),
        ("train/c1.mp4", "{folder}/train/c1.mp4", "; there is train/c1.mp4. Correct the path"),
        ("train/c1.mp4", "train/c2.mp4", "No such file or directory. Put a clip"),
        ("train/c1.mp4", "other/c1.mp4", "No such file or directory. Put a clip"),
    ],
)
def test_a_path_that_nearly_exists_names_the_file(tmp_path, there, named, words):
    (tmp_path / "train").mkdir()
    (tmp_path / there).write_bytes(b"x")
    assert words in near(tmp_path, named.replace("{folder}", tmp_path.name))


def test_a_folder_that_is_not_there_is_told_once(folder):
    with pytest.raises(UserError) as caught:
        scan(folder / "list.json", folder / "gone", needs=PLAIN)
    assert "train_data_dir" in caught.value.problems[0] and "gone', where their paths begin" in caught.value.problems[0]


def test_a_list_that_nearly_exists_is_named(folder):
    with pytest.raises(UserError, match=r"No such file or directory; near are list\.json"):
        scan(folder / "lists.json", folder, needs=PLAIN)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"file_path": "0.png", "text": "a", "text": "b"}', "gives text more than once. Leave all but one out"),
        ('{"file_path": "0.png", "text": {"a": 1, "a": 2}}', "text is an object, not a string"),
        ('{"file_path": "0.png", "text": "a", "type": ""}', "type is ''. Give type"),
    ],
)
def test_what_a_row_says_twice_or_not_at_all(folder, row, words):
    (folder / "rows.json").write_text(f"[{row}]")
    with pytest.raises(UserError) as caught:
        scan(folder / "rows.json", folder, needs=PLAIN)
    assert words in caught.value.problems[1]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"video_path": "0.mp4", "text": "x"}, "has no file_path, but video_path. Rename video_path to file_path"),
        ({"image": "0.png", "prompt": "x"}, "has no file_path, but image; has no text, but prompt. Rename image"),
        ({"file_path": "0.mp4", "caption": "x"}, "has no text, but caption. Rename caption to text"),
        ({"File_Path": "0.mp4", "text ": "x"}, "has no file_path, but File_Path; has no text, but text . Rename File"),
        ({"clip": "0.mp4", "text": "x"}, "has no file_path; its other keys are clip. Name its clip"),
        ({"file_path": "0.mp4", "text": "x", "control_path": "1.mp4"}, "is missing, but there is control_path"),
    ],
)
def test_keys_of_other_tools_are_known(folder, entry, words):
    with pytest.raises(UserError) as caught:
        scan(write_list(folder, [entry]), folder, needs=CONTROL if "control_path" in entry else PLAIN)
    assert words in caught.value.problems[1]


def test_columns_without_a_name_are_ignored(folder):
    """As spreadsheets write them."""
    (folder / "other.csv").write_text(",file_path,text,,\n0,0.mp4,x,,\n")
    assert [row.text for row in scan(folder / "other.csv", folder, needs=PLAIN).records] == ["x"]


def test_columns_of_other_tools_are_known(folder):
    (folder / "other.csv").write_text("video,caption\n0.mp4,x\n")
    with pytest.raises(UserError, match="video seems to be file_path: rename it; caption seems to be text: rename it"):
        scan(folder / "other.csv", folder, needs=PLAIN)


def test_captions_that_are_none_are_said(folder):
    texts = ["nan", " None ", "1.txt", "captions/my clip.txt", "A file named 1.txt lies here.", "none of it", "a/b"]
    entries = [{"file_path": "0.png", "text": text, "type": "image"} for text in texts]
    told = [line for line in scan(write_list(folder, entries), folder, needs=PLAIN).notices if "the caption is" in line]
    assert [line.partition(";")[0] for line in told] == [
        "1 entry (0): the caption is the word nan, perhaps of an empty cell",
        "1 entry (1): the caption is the word none, perhaps of an empty cell",
        "2 entries (2, 3): the caption is a file's name, and the model learns that",
    ]
