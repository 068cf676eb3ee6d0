"""Lists, rows, records, and the index that measures each file once."""

import json
import os
import pickle
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reeltune.core.errors import UserError
from reeltune.core.types import Record
from reeltune.data import measuring
from reeltune.data.measuring import File, Finding, measure_files, stamps
from reeltune.data.media import write_clip
from reeltune.data.records import Records
from reeltune.data.scan import scan

PLAIN = frozenset()
CONTROL = frozenset({"control"})


def record(n: int) -> Record:
    control = f"/d/control-{n}.mp4" if n % 2 else None
    return Record(n, f"/d/ü{n}.mp4", "ein Bär 🐻" * n, "video" if n % 3 else "image", 10 + n, 24.0, 96, 128, control)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four pictures, two clips, and their list in each of the three forms."""
    entries = []
    for n in range(4):
        Image.new("RGB", (64 + 16 * n, 48), (40 * n, 90, 30)).save(tmp_path / f"{n}.png")
        entries.append({"file_path": f"{n}.png", "text": f'picture, "{n}"', "type": "image"})
    for n in range(2):
        write_clip(tmp_path / f"{n}.mp4", np.full((9 + n, 48, 64, 3), 50 * n, np.uint8), 8)
        entries.append({"file_path": f"{n}.mp4", "text": f"clip\n{n}", "type": "video"})
    (tmp_path / "list.json").write_text("\ufeff" + json.dumps(entries, indent=1), encoding="utf-8")
    (tmp_path / "list.jsonl").write_text("\n\n".join(map(json.dumps, entries)) + "\n")
    cells = ['"' + entry["text"].replace('"', '""') + '"' for entry in entries]
    rows = [f"{entry['file_path']},{cell},{entry['type']}," for entry, cell in zip(entries, cells, strict=True)]
    (tmp_path / "list.csv").write_text(
        "\n".join(["file_path,text,type,control_file_path", *rows]), encoding="utf-8-sig"
    )
    return tmp_path


# Records


def test_records_are_a_sequence():
    rows = [record(n) for n in range(9)]
    records = Records.of(iter(rows))
    assert list(records) == rows
    assert len(records) == 9
    assert records[-1] == rows[-1]
    assert list(records[2:8:3]) == rows[2:8:3]
    assert list(records.take([5, 0, 5])) == [rows[5], rows[0], rows[5]]
    assert len(records.take([])) == 0
    assert records.kind_video.tolist() == [row.kind == "video" for row in rows]
    assert records.entry.tolist() == list(range(9))
    assert pickle.loads(pickle.dumps(records)) == records  # noqa: S301 - our own bytes
    assert records != Records.of(rows[:8])
    with pytest.raises(IndexError):
        records[9]


def test_a_record_costs_its_strings_and_little_more():
    """Measured, 2026-11: 129 MB for a million of these rows."""
    rows = 20_000
    tracemalloc.start()
    records = Records.of(
        Record(n, f"/data/{n:08d}.mp4", "a caption " * 5, "video", 49, 24.0, 96, 128) for n in range(rows)
    )
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    strings = len("/data/00000000.mp4") + 50
    assert held / rows < strings + 80
    assert records[rows - 1].path == f"/data/{rows - 1:08d}.mp4"


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
        ("a.json", "[" * 100_000, "not usable JSON"),
        ("a.json", '"x"', "expected a list of objects, found a string"),
        ("a.json", " \n", "the file is empty"),
        ("a.jsonl", '{"a": 1}\n{"b": 2', "line 2"),
        ("a.jsonl", '{"a": 1} {"b": 2}', "line 1, column 9: JSON lines hold one object a line"),
        ("a.jsonl", '[{"a": 1}]', "a list belongs in a .json file"),
        ("a.csv", "file_path,text,text\na,b,c", "names text more than once"),
        ("a.csv", 'file_path,text\na,"b\n', "line 2: not CSV"),
        ("a.csv", "file_path,text\n", "the list is empty"),
        ("a.json", "[\0]", "byte 0x00 at offset 1"),
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


def write_list(folder: Path, entries: list) -> Path:
    meta = folder / "rows.json"
    meta.write_text(json.dumps(entries))
    return meta


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


# The index


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Names of the files that went to the processes."""
    names: list[str] = []
    run = measuring._run

    def spying(files, numbers, *rest):
        names.extend(os.path.basename(files[number].path) for number in numbers)
        return run(files, numbers, *rest)

    monkeypatch.setattr(measuring, "_run", spying)
    return names


def test_second_start_measures_changed_files_alone(folder, measured):
    def scanned():
        measured.clear()
        return scan(folder / "list.json", folder, needs=PLAIN, index_dir=folder / "index", workers=2, max_bad_share=0.5)

    first = scanned()
    assert sorted(measured) == ["0.mp4", "0.png", "1.mp4", "1.png", "2.png", "3.png"]
    again = scanned()
    assert measured == []
    assert again.records == first.records
    assert (again.left_out, again.notices, again.entries) == (first.left_out, first.notices, first.entries)
    Image.new("RGB", (200, 100)).save(folder / "2.png")
    changed = scanned()
    assert measured == ["2.png"]
    assert changed.records[2].width == 200
    assert list(changed.records[3:]) == list(first.records[3:])
    (folder / "3.png").unlink()
    assert [left.entry for left in scanned().left_out] == [3]
    assert measured == []
    assert [left.entry for left in scanned().left_out] == [3]  # from the saved scan
    Image.new("RGB", (112, 48)).save(folder / "3.png")
    assert len(scanned().records) == 6
    assert measured == ["3.png"]


def test_other_processes_take_what_one_has_found_and_look_at_no_file(folder, measured, monkeypatch):
    options = {"needs": PLAIN, "index_dir": folder / "index", "max_bad_share": 0.5}
    first = scan(folder / "list.json", folder, **options)
    loads = []
    monkeypatch.setattr("reeltune.data.scan.stamps", lambda paths: pytest.fail("files were looked at"))
    monkeypatch.setattr(np, "load", lambda *given, real=np.load, **more: loads.append(given[0]) or real(*given, **more))
    other = scan(folder / "list.json", folder, just_scanned=True, **options)
    assert (other.records, other.left_out, other.notices) == (first.records, first.left_out, first.notices)
    assert len(loads) == 1 and other.records.digest() == first.records.digest()


def test_what_need_not_last_is_taken_by_other_processes_alone(folder, monkeypatch):
    def hurried(files, *given, real=measure_files, **more):
        late = Finding(None, "takes more than 0 s to decode", lasting=False)
        return [
            late if file.path.endswith("3.png") else found
            for file, found in zip(files, real(files, *given, **more), strict=True)
        ]

    options = {"needs": PLAIN, "index_dir": folder / "index", "max_bad_share": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr("reeltune.data.scan.measure_files", hurried)
        first = scan(folder / "list.json", folder, **options)
    other = scan(folder / "list.json", folder, just_scanned=True, **options)
    assert other.records.digest() == first.records.digest() and len(other.records) == 5
    later = scan(folder / "list.json", folder, **options)
    assert len(later.records) == 6 and later.records.digest() != first.records.digest()


def test_options_and_list_changes_are_seen(folder, measured):
    index = folder / "index"
    meta = write_list(folder, [{"file_path": "0.png", "text": "old", "control_file_path": "1.png"}])
    assert scan(meta, folder, needs=PLAIN, index_dir=index).records[0].text == "old"
    before = meta.stat()
    write_list(folder, [{"file_path": "0.png", "text": "new", "control_file_path": "1.png"}])
    os.utime(meta, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and time: the bytes tell
    assert scan(meta, folder, needs=PLAIN, index_dir=index).records[0].text == "new"
    assert measured == ["0.png"]
    with pytest.raises(UserError, match="aspects differ"):
        scan(meta, folder, needs=CONTROL, index_dir=index)
    assert measured == ["0.png", "1.png"]


@pytest.mark.parametrize("damage", [b"", b"PK not a zip", b"[1, 2]"])
def test_a_damaged_index_is_made_anew(folder, damage):
    def scanned():
        return scan(folder / "list.json", folder, needs=PLAIN, index_dir=folder / "index")

    first = scanned()
    files = list((folder / "index").iterdir())
    assert len(files) == 2  # no part-written file is left
    for file in files:
        file.write_bytes(damage)
    assert scanned().records == first.records


def test_an_index_that_cannot_be_written_is_said(folder):
    (folder / "index").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        scan(folder / "list.json", folder, needs=PLAIN, index_dir=folder / "index")


def serve_badly(link, decode_check):
    """In the place of measuring._serve: "hang" never answers, "die" ends the process."""
    link.send(None)
    while True:
        file = link.recv()
        name = os.path.basename(file.path)
        if "hang" in name:
            time.sleep(1000)
        if "die" in name:
            os._exit(9)
        link.send(measuring._examine(file, decode_check))


def test_a_decoder_that_hangs_or_dies_costs_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_serve", serve_badly)
    files = []
    for name in ("a", "hang", "b", "die", "hang2", "c"):
        Image.new("RGB", (32, 16)).save(tmp_path / f"{name}.png")
        files.append(File(str(tmp_path / f"{name}.png"), "image"))
    done = []
    found = measure_files(
        files,
        stamps(file.path for file in files),
        decode_check="ends",
        index_dir=tmp_path / "index",
        workers=2,
        seconds_per_file=1,
        progress=lambda done_files, total: done.append((done_files, total)),
    )
    assert [finding.reason for finding in found] == [
        None,
        "takes more than 1 s to decode",
        None,
        "ends the process that decodes it",
        "takes more than 1 s to decode",
        None,
    ]
    assert done == [(n, 6) for n in range(1, 7)]
    held = json.loads(next((tmp_path / "index").iterdir()).read_text())
    assert sorted(os.path.basename(key) for key in held) == ["a.png", "b.png", "c.png"]  # the others are tried again


def test_a_pipe_does_not_wait(folder):
    os.mkfifo(folder / "pipe.mp4")
    with pytest.raises(UserError, match="is not a regular file"):
        scan(write_list(folder, [{"file_path": "pipe.mp4", "text": "x"}]), folder, needs=PLAIN)


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


def test_a_time_far_ahead(folder, measured):
    meta = write_list(folder, [{"file_path": "0.png", "text": "x", "type": "image"}])
    seen = []
    for year in (2400, 2401, 2401):
        os.utime(folder / "0.png", ns=(0, (year - 1970) * 31_556_952 * 10**9))
        assert len(scan(meta, folder, needs=PLAIN, index_dir=folder / "index").records) == 1
        seen.append(len(measured))
    assert seen == [1, 2, 2]  # a change is seen


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


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"video_path": "0.mp4", "text": "x"}, "has no file_path, but video_path. Rename video_path to file_path"),
        ({"image": "0.png", "prompt": "x"}, "has no file_path, but image; has no text, but prompt. Rename image"),
        ({"file_path": "0.mp4", "caption": "x"}, "has no text, but caption. Rename caption to text"),
        ({"clip": "0.mp4", "text": "x"}, "has no file_path; its other keys are clip. Name its clip"),
        ({"file_path": "0.mp4", "text": "x", "control_path": "1.mp4"}, "is missing, but there is control_path"),
    ],
)
def test_keys_of_other_tools_are_known(folder, entry, words):
    with pytest.raises(UserError) as caught:
        scan(write_list(folder, [entry]), folder, needs=CONTROL if "control_path" in entry else PLAIN)
    assert words in caught.value.problems[1]


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


def test_too_many_open_files_are_not_taken_for_a_full_disk(folder, monkeypatch):
    def refused(*_given, **_more):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("reeltune.data.scan.measure_files", refused)
    with pytest.raises(UserError, match="Too many open files; raise that limit"):
        scan(folder / "list.json", folder, needs=PLAIN, index_dir=folder / "index")
