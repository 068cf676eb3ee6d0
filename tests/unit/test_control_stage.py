"""`reeltune control`: what it writes beside clips of every kind, what it does a second time, and what it refuses."""

import csv
import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reeltune.cli import main
from reeltune.control import kind, run, stage
from reeltune.control.canny import open_canny
from reeltune.control.kind import pictures
from reeltune.control.records import Records, claims, made_by
from reeltune.control.source import source_of
from reeltune.core.types import Crop, Shape
from reeltune.data.clips import index_of
from reeltune.data.media import measure, read_frames
from tests.unit.test_control_canny import scene
from tests.unit.test_media import encode

BAD = Path(__file__).parents[1] / "bad_inputs" / "files"
CASES = {  # file -> height, width as displayed
    "even.mp4": (90, 120),
    "uneven.mp4": (90, 120),
    "odd.mp4": (89, 121),
    "late.mkv": (90, 120),
    "rotated_90.mp4": None,
    "sar_2_1.mp4": None,
    "vfr.mp4": None,
    "single_frame.mp4": None,
    "picture.png": (90, 120),
}


def is_picture(name: str) -> bool:
    return name.endswith((".png", ".jpg"))


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    """A data folder with every case, and its controls."""
    folder = tmp_path_factory.mktemp("data")
    clip = scene(7)
    encode(folder / "even.mp4", clip, bf=2)
    encode(folder / "uneven.mp4", clip, pts=[0, 1, 2, 7, 9, 20, 21], ticks=600)
    encode(folder / "odd.mp4", scene(4, 89, 121), pix_fmt="yuv444p")
    encode(folder / "late.mkv", clip, pts=[40 + 3 * n for n in range(7)], ticks=1000)
    Image.fromarray(clip[0]).save(folder / "picture.png")
    for name in CASES:
        if not (folder / name).exists():
            shutil.copy(BAD / name, folder)
    write_list(folder / "list.json", list(CASES))
    assert control(folder) == 0
    return folder


@pytest.fixture
def data(made_once, tmp_path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "data"))


def write_list(path: Path, names: list[str]) -> None:
    rows = [{"file_path": name, "text": name, "type": "image" if is_picture(name) else "video"} for name in names]
    path.write_text(json.dumps(rows))


def control(folder: Path, *more: str, kinds=("canny",), meta="list.json", out="new.json") -> int:
    named = ["--out", str(folder / out)] if out else []
    return main(["control", *more, str(folder / meta), "--kind", *kinds, *named])


def control_of(folder: Path, name: str) -> Path:
    ending = ".png" if is_picture(name) else ".mp4"
    return folder / "control/canny" / (name if name.endswith(ending) else name + ending)


def ledger(folder: Path) -> list[dict[str, str]]:
    with (folder / "new_ledger.csv").open() as file:
        return list(csv.DictReader(file))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "control/canny").iterdir()}


@pytest.mark.parametrize("name", CASES)
def test_frames_times_and_size_are_the_clips(made_once, name):
    clip, made = made_once / name, control_of(made_once, name)
    media = "image" if is_picture(name) else "video"
    own, other = measure(clip, media), measure(made, media)
    assert (own.height, own.width, own.frames) == (other.height, other.width, other.frames)
    assert CASES[name] in (None, (own.height, own.width))
    if media == "video":
        np.testing.assert_allclose(index_of(str(made)).times_s, index_of(str(clip)).times_s, atol=1e-9)
    found = made_by(made)
    assert found is not None and (found.kind, found.clip, found.frames) == ("canny", name, own.frames)
    assert made_by(clip) is None


def test_lines_lie_where_the_clips_edges_are(made_once):
    """Read as training reads them: a turned clip has a turned control."""
    for name in ("even.mp4", "rotated_90.mp4", "odd.mp4"):
        own = measure(made_once / name, "video")
        whole = Crop(own.height, own.width, 0, 0), Shape(1, own.height, own.width)
        frame, lines = (
            read_frames(path, [2], *whole)[0].astype(float).mean(0)
            for path in (made_once / name, control_of(made_once, name))
        )
        steep = np.hypot(*np.gradient(frame))
        assert lines.max() > 150
        assert steep[lines > 128].mean() > 4 * steep[lines < 64].mean()


def test_lines_are_found_again_in_the_file(made_once):
    """What the file holds against what was drawn: beyond H.264's loss, each pixel is a line or none."""
    drawn = pictures(open_canny(kind.Settings()), source_of(made_once / "even.mp4", "video"))[..., 1] > 127
    held = np.concatenate(list(source_of(control_of(made_once, "even.mp4"), "video").chunks()))[..., 1] > 127
    assert drawn.sum() > 1000
    assert (drawn & held).sum() > 0.99 * drawn.sum() and (held & ~drawn).sum() < 0.01 * drawn.sum()


def test_the_new_list_is_the_old_one_with_controls(made_once):
    old, new = (json.loads((made_once / name).read_text()) for name in ("list.json", "new.json"))
    assert [{**row, "control_file_path": f"control/canny/{control_of(made_once, row['file_path']).name}"}
            for row in old] == new  # fmt: skip
    rows = ledger(made_once)
    assert [row["file_path"] for row in rows] == list(CASES) and {row["status"] for row in rows} == {"made"}
    assert all(0 < float(row["lines_share"]) < 0.5 for row in rows)
    page = (made_once / "new.html").read_text()
    clips = [name for name in CASES if not is_picture(name)]
    assert page.count("<span>steady share") == len(clips) < len(CASES)  # of a picture it tells nothing
    assert page.count("data:image/jpeg") == 3 * len(CASES) and "http:" not in page and "https:" not in page


def test_a_second_time_nothing_is_made(data, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (data / "control").rglob("*") if path.is_file()}
    monkeypatch.setattr(stage, "make_control", None)
    assert control(data) == 0
    after = {path: path.stat().st_mtime_ns for path in (data / "control").rglob("*") if path.is_file()}
    assert before == after


def test_another_clip_or_detector_is_made_anew_and_nothing_else(data):
    before = bytes_of(data)
    encode(data / "even.mp4", scene(5, noise=10))
    (control_of(data, "odd.mp4")).write_bytes(b"cut short")
    assert control(data) == 0
    after = bytes_of(data)
    assert {name for name in before if before[name] != after[name]} == {"even.mp4"}
    assert control(data, "--canny_thresholds", "30", "90") == 0
    assert before["uneven.mp4"] != bytes_of(data)["uneven.mp4"]
    assert ledger(data)[0]["high"] == "90"


def test_bits_do_not_depend_on_the_processes(made_once, data):
    shutil.rmtree(data / "control")
    assert control(data, "--workers", "2") == 0
    assert bytes_of(data) == bytes_of(made_once)
    assert (data / "new_ledger.csv").read_bytes() == (made_once / "new_ledger.csv").read_bytes()


def test_what_another_process_has_claimed_is_left_to_it(data):
    order = stage.Order(data / "list.json", data, ("canny",), {}, kind.Settings())
    place = "control/canny/even.mp4"
    with claims(data) as ours, ours.claimed(place) as got:
        assert got
        child = os.fork()
        if child == 0:
            with claims(data) as theirs, theirs.claimed(place) as other, theirs.claimed("control/canny/b.mp4") as free:
                os._exit(10 * other + free)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert stage.jobs_of(order)[0].control == place


def test_what_another_command_has_made_otherwise_meanwhile_is_not_taken_for_ours(data, monkeypatch):
    """It had other thresholds, and came between the making and the list."""

    def make_all(order, maker, workers, real=stage.make_all):
        code = real(order, maker, workers)
        made = maker.records.get("canny", "control/canny/even.mp4")
        maker.records.put(dataclasses.replace(made, key="of other thresholds"))
        return code

    monkeypatch.setattr(run, "make_all", make_all)
    assert control(data) == 0
    assert "with other settings since" in ledger(data)[0]["reason"]
    assert len(json.loads((data / "new.json").read_text())) == len(CASES) - 1


def test_every_entry_is_accounted_for(data, capsys):
    """Damaged files, a missing one, a black clip, a control in place of a clip, and a row that is none."""
    encode(data / "black.mp4", np.zeros((4, 64, 64, 3), np.uint8))
    for name in ("bitrot_mdat.mp4", "truncated_faststart.mp4", "text_as_video.mp4"):
        shutil.copy(BAD / name, data)
    names = ["even.mp4", "bitrot_mdat.mp4", "truncated_faststart.mp4", "text_as_video.mp4", "gone.mp4", "black.mp4",
             "control/canny/even.mp4"]  # fmt: skip
    write_list(data / "list.json", names)
    rows = [*json.loads((data / "list.json").read_text()), {"file_path": "odd.mp4"}, 7]
    (data / "list.json").write_text(json.dumps(rows))
    assert control(data) == 0
    assert [row["file_path"] for row in json.loads((data / "new.json").read_text())] == ["even.mp4"]
    reasons = [row["reason"] for row in ledger(data)]
    expected = ["", "does not decode", "cut short", "cannot be opened as a clip", "cannot be opened: No such file",
                "score of 0, and 0.02", "where controls are", "has no text", "not an object"]  # fmt: skip
    assert len(reasons) == len(expected)
    for found, words in zip(reasons, expected, strict=True):
        assert words in found and bool(found) == bool(words or found)
    told = capsys.readouterr().err
    assert "left out: gone.mp4" in told
    assert not control_of(data, "bitrot_mdat.mp4").exists() and control_of(data, "black.mp4").exists()
    assert not list((data / "control").rglob("*.partial"))
    assert control(data, "--least_score", "0") == 0
    assert len(json.loads((data / "new.json").read_text())) == 2


def test_files_of_others_are_never_written_over(data):
    shutil.rmtree(data / "control")
    control_of(data, "even.mp4").parent.mkdir(parents=True)
    control_of(data, "even.mp4").write_bytes(b"drawn by hand")
    assert control(data) == 0
    assert control_of(data, "even.mp4").read_bytes() == b"drawn by hand"
    assert "was not made by reeltune control" in ledger(data)[0]["reason"]
    (data / "hand.json").write_text('[{"file_path": "even.mp4", "control_file_path": "mine/even.mp4"}]')
    assert control(data, out="hand.json") == 2
    assert "mine/even.mp4" in (data / "hand.json").read_text()
    (data / "mine.html").write_text("my page")
    assert control(data, out="mine.json") == 2 and (data / "mine.html").read_text() == "my page"


def test_the_list_is_not_written_over_as_a_ledger(data):
    rows = "file_path,text\neven.mp4,x\n"
    (data / "new_ledger.csv").write_text(rows)
    (data / "new.json").unlink()
    assert control(data, meta="new_ledger.csv") == 2
    assert (data / "new_ledger.csv").read_text() == rows and not (data / "new.json").exists()


def test_a_control_that_somebody_has_changed_is_kept(data, caplog):
    """Beside the one that is made anew, at the same size too; and when it is no longer asked for."""
    for name in ("even.mp4", "odd.mp4"):
        control_of(data, name).write_bytes(b"by hand".ljust(control_of(data, name).stat().st_size))
    encode(data / "even.mp4", scene(6))
    assert control(data) == 0
    kept = control_of(data, "even.mp4").with_name("even.mp4.damaged")
    assert kept.read_bytes().startswith(b"by hand") and f"kept as {kept.name}, and is made again" in caplog.text
    assert not ledger(data)[0]["reason"] and measure(control_of(data, "even.mp4"), "video").frames == 6
    write_list(data / "list.json", ["even.mp4"])
    assert control(data, "prune", out=None) == 0
    assert control_of(data, "odd.mp4").read_bytes().startswith(b"by hand") and not control_of(data, "vfr.mp4").exists()


def test_a_control_damaged_at_its_size_does_not_break_the_sheet(data):
    damaged = control_of(data, "even.mp4")
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert control(data) == 0 and "even.mp4" in (data / "new.html").read_text()


def test_names_of_any_length_and_fields_of_any_text(data):
    """A control's name may have 255 bytes, as a clip's; half of a surrogate pair is kept as JSON writes it."""
    longest, too_long = f"{'x' * 251}.mp4", f"{'y' * 248}.mov"
    for name in (longest, too_long):
        shutil.copy(data / "even.mp4", data / name)
    write_list(data / "list.json", [longest, too_long])
    rows = [{**row, "note": "\ud800"} for row in json.loads((data / "list.json").read_text())]
    (data / "list.json").write_text(json.dumps(rows))
    assert control(data) == 0
    (row,) = json.loads((data / "new.json").read_text())
    assert (row["file_path"], row["note"]) == (longest, "\ud800") and (data / row["control_file_path"]).is_file()
    assert "256 bytes, and 255 are allowed" in ledger(data)[1]["reason"]


def test_a_clip_named_by_the_folders_real_path_is_known_as_a_control(data, tmp_path):
    (tmp_path / "link").symlink_to(data)
    write_list(data / "list.json", [str(data / "control/canny/even.mp4"), str(data / "odd.mp4")])
    assert control(tmp_path / "link") == 0
    assert [row["file_path"] for row in json.loads((data / "new.json").read_text())] == [str(data / "odd.mp4")]


def test_a_list_that_is_not_there_is_told_by_its_name(data, capsys):
    assert control(data, meta="gone.json") == 2
    assert control(data, "--train_data_dir", str(data / "nowhere")) == 2
    told = capsys.readouterr().err
    assert "gone.json: 1 problem" in told and "nowhere' is no folder" in told and not (data / "nowhere").exists()


def test_a_full_disk_loses_nothing(data, made_once, capfd):
    """As the system tells it: files may not grow past a few bytes more than the second control has."""
    shutil.rmtree(data / "control")
    sizes = [control_of(made_once, name).stat().st_size for name in ("even.mp4", "uneven.mp4", "odd.mp4")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_list(data / "list.json", ["even.mp4", "uneven.mp4", "odd.mp4"])
    before = (data / "new.json").read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) - 100, hard))
    try:
        assert control(data) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in capfd.readouterr().err
    assert (data / "new.json").read_bytes() == before and not list((data / "control").rglob("*.mp4"))
    assert control(data) == 0
    held = bytes_of(data)
    assert held == {name: data for name, data in bytes_of(made_once).items() if name in held} and len(held) == 3


def test_a_control_whose_process_was_killed_is_made_again(data, made_once):
    """Its record says begun; what lies there, half of it or all, is not taken."""
    records = Records(data)
    made = records.get("canny", "control/canny/even.mp4")
    assert made is not None
    records.put(dataclasses.replace(made, bytes=0, blake2b="", score=0.0, facts={}))
    control_of(data, "even.mp4").write_bytes(b"half")
    assert control(data) == 0
    assert bytes_of(data) == bytes_of(made_once) and records.get("canny", made.control) == made


def test_verify_and_prune(data, capsys):
    assert control(data, "verify", out=None) == 0
    assert f"{len(CASES)} controls, all whole; 0 clips were left out" in capsys.readouterr().out
    damaged = control_of(data, "odd.mp4")
    held = bytearray(damaged.read_bytes())
    held[len(held) // 2] ^= 1
    damaged.write_bytes(held)
    control_of(data, "vfr.mp4").unlink()
    assert control(data, "verify", out=None) == 2
    told = capsys.readouterr().err
    assert "odd.mp4 is not as it was written, and is set aside" in told and "vfr.mp4 is missing" in told
    assert control(data) == 0 and control(data, "verify", out=None) == 0
    capsys.readouterr()

    (data / "control/canny/mine.mp4").write_bytes(b"of somebody else")
    write_list(data / "list.json", ["even.mp4"])
    assert control(data, "prune", out=None) == 0
    assert f"{len(CASES) - 1} controls deleted" in capsys.readouterr().out
    assert sorted(bytes_of(data)) == ["even.mp4", "mine.mp4"]
    assert len(list((data / "control/.state/canny").iterdir())) == 1


def test_verify_sets_nothing_aside_that_is_being_made_again(data, monkeypatch, capsys):
    def is_as_written(records, made):
        records.put(dataclasses.replace(made, bytes=0, blake2b=""))  # as a process does before it writes
        return False

    monkeypatch.setattr(Records, "is_as_written", is_as_written)
    assert control(data, "verify", out=None) == 2
    assert "even.mp4 is being made again by another process" in capsys.readouterr().err
    assert not list((data / "control").rglob("*.damaged"))


@pytest.mark.parametrize(
    ("more", "kinds", "out", "words"),
    [
        ((), ("cany",), "new.json", "is canny meant?"),
        ((), ("hed",), "new.json", "hed needs the file ControlNetHED.pth"),
        ((), ("canny", "camera"), "new.json", "put {kind} into its name"),
        ((), ("canny",), "list.json", "the list itself"),
        ((), ("canny",), "new.csv", "new.csv'; it must end in .json"),
        ((), ("canny",), None, "--out is missing"),
        (("--workers", "0"), ("canny",), "new.json", "--workers is 0"),
        (("--least_score", "2"), ("canny",), "new.json", "scores go from 0 to 1"),
        (("--device", "gpu"), ("canny", "camera"), "{kind}.json", "--device is gpu, and canny, camera run no network"),
        (("--canny_thresholds", "9", "3"), ("camera",), "new.json", "is 9 3, and --kind is camera; it is of canny"),
        (("--canny_thresholds", "9", "3"), ("canny",), "new.json", "lower comes first"),
        ((), ("depth",), "new.json", "depth needs a folder of Depth Anything"),
    ],
)
def test_bad_flags_are_answered_in_words(data, capsys, more, kinds, out, words):
    assert control(data, *more, kinds=kinds, out=out) == 2
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


@pytest.mark.parametrize("word", ["verify", "prune"])
def test_what_makes_no_list_takes_no_words_of_lists(data, capsys, word):
    assert control(data, word, "--workers", "2", "--least_score", "0.5") == 2
    told = capsys.readouterr().err
    assert all(f"{flag} is" in told for flag in ("--out", "--workers", "--least_score")) and f"{word} makes no" in told


def test_a_list_of_controls_alone_is_refused(data, capsys):
    write_list(data / "list.json", ["control/canny/even.mp4", "control/canny/odd.mp4"])
    (data / "new.json").unlink()
    assert control(data) == 2
    assert "name the clip that it was made from" in capsys.readouterr().err and not (data / "new.json").exists()
