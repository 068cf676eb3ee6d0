"""The index that measures each file once, and the processes that measure."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reeltune.core.errors import UserError
from reeltune.data import measuring
from reeltune.data.findings import content_of
from reeltune.data.measuring import File, Finding, measure_files, stamps
from reeltune.data.scan import scan
from tests.runs.small_run import write_poses
from tests.unit.listed import CONTROL, PLAIN, lay_out, write_list


@pytest.fixture
def folder(tmp_path) -> Path:
    return lay_out(tmp_path)


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


@pytest.mark.parametrize("need", ["control", "camera"])
def test_controls_and_camera_paths_are_known_by_their_bytes(need, folder, measured):
    control = folder / {"control": "control.mp4", "camera": "path.txt"}[need]
    if need == "control":
        control.write_bytes((folder / "0.mp4").read_bytes())
    else:
        write_poses(control, 9, drift=0.1)
    entries = [{"file_path": "0.mp4", "control_file_path": control.name, "text": "x"}]
    meta = write_list(folder, entries)

    def scanned():
        measured.clear()
        [record] = scan(meta, folder, needs=frozenset({need}), index_dir=folder / "index", workers=1).records
        return record.control_content

    first = scanned()
    assert first == content_of(str(control)) != 0 and measured == ["0.mp4", control.name]
    meta.write_text(json.dumps(entries, indent=1))  # the saved scan is of another list, and the index remembers
    assert scanned() == first and measured == []
    index = next((folder / "index").glob("files-*.json"))
    held = json.loads(index.read_text())
    for stamp_finding in held.values():
        del stamp_finding[1][4:]  # as before 2026-11-27
    index.write_text(json.dumps(held))
    meta.write_text(json.dumps(entries, indent=2))
    assert scanned() == first and measured == ([] if need == "control" else [control.name])


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
        late = Finding(None, "ends the process that decodes it", lasting=False)
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


def test_a_folder_whose_name_is_not_utf_8(tmp_path, measured):
    """Of another time, or unpacked from an archive of one."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    options = {"needs": PLAIN, "index_dir": lay_out(folder) / "index"}
    first, again = (scan(folder / "list.json", folder, **options) for _ in range(2))
    assert len(measured) == 6 and first.records == again.records
    assert [record.path for record in again.records] == again.records.column("path")
    assert all(os.path.dirname(path) == str(folder) for path in again.records.column("path"))


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


def test_a_time_far_ahead(folder, measured):
    meta = write_list(folder, [{"file_path": "0.png", "text": "x", "type": "image"}])
    seen = []
    for year in (2400, 2401, 2401):
        os.utime(folder / "0.png", ns=(0, (year - 1970) * 31_556_952 * 10**9))
        assert len(scan(meta, folder, needs=PLAIN, index_dir=folder / "index").records) == 1
        seen.append(len(measured))
    assert seen == [1, 2, 2]  # a change is seen


def test_an_index_that_cannot_be_written_is_said(folder):
    (folder / "index").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written"):
        scan(folder / "list.json", folder, needs=PLAIN, index_dir=folder / "index")


def test_too_many_open_files_are_not_taken_for_a_full_disk(folder, monkeypatch):
    def refused(*_given, **_more):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("reeltune.data.scan.measure_files", refused)
    with pytest.raises(UserError, match="Too many open files; raise that limit"):
        scan(folder / "list.json", folder, needs=PLAIN, index_dir=folder / "index")


# Processes that measure


def serve_badly(link, decode_check, seconds):
    """In the place of measuring._serve, by a file's name: "hang" never answers, "spin" computes for ever, "die" ends
    the process, "slow" answers after a while of which it computes a small part."""
    link.send(None)
    while True:
        file = link.recv()
        measuring.end_after(seconds)
        name = os.path.basename(file.path)
        if "hang" in name:
            time.sleep(1000)
        while "spin" in name:
            pass
        if "die" in name:
            os._exit(9)
        if "slow" in name:
            wait_computing(2.5)
        link.send(measuring._examine(file, decode_check))


def wait_computing(seconds):
    """About 20 ms in 150, which the system counts in hundredths of a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.process_time()
        while time.process_time() < begun + 0.02:
            pass
        time.sleep(0.13)


@pytest.mark.slow
def test_a_decoder_that_hangs_spins_or_dies_costs_one_file_and_a_busy_machine_none(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "_serve", serve_badly)
    monkeypatch.setattr(measuring, "STILL_SECONDS", 1.0)
    files = []
    for name in ("a", "hang", "b", "die", "spin", "slow", "c"):
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
        "stands still: nothing of it has come for 1 s",
        None,
        "ends the process that decodes it",
        "takes more than 1 s of processor time to decode",
        None,
        None,
    ]
    assert done == [(n, 7) for n in range(1, 8)]
    held = json.loads(next((tmp_path / "index").iterdir()).read_text())
    assert sorted(os.path.basename(key) for key in held) == ["a.png", "b.png", "c.png", "slow.png"]  # others: once more


def serve_once_started(link, decode_check, seconds):
    """In its place: whoever makes the mark first ends before it has begun."""
    try:
        os.close(os.open(os.environ["MARK"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        measuring._serve(link, decode_check, seconds)
    os._exit(9)


def never_begins(link, decode_check, seconds):
    os._exit(9) if os.environ["MARK"] == "dies" else time.sleep(1000)


def pictures(folder, count) -> list[File]:
    for i in range(count):
        Image.new("RGB", (32, 16)).save(folder / f"{i}.png")
    return [File(str(folder / f"{i}.png"), "image") for i in range(count)]


def measured_by_two(files):
    options = {"decode_check": "ends", "index_dir": None, "workers": 2, "seconds_per_file": 60, "progress": None}
    return measure_files(files, stamps(file.path for file in files), **options)


@pytest.mark.slow
def test_a_process_that_does_not_start_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(measuring, "_serve", serve_once_started)
    assert [finding.reason for finding in measured_by_two(pictures(tmp_path, 3))] == [None] * 3
    assert (tmp_path / "mark").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_where_no_process_starts_that_is_said(how, tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", how)
    monkeypatch.setattr(measuring, "_serve", never_begins)
    if how == "hangs":
        monkeypatch.setattr(measuring, "START_SECONDS", 0.1)
    with pytest.raises(UserError, match="none of the processes that measure files has begun"):
        measured_by_two(pictures(tmp_path, 3))


def test_a_process_that_imports_hears_no_ctrl_c():
    """It ended in a traceback of its own, beside what the command says."""
    worker = measuring._Worker("ends", 60.0)
    os.kill(worker.process.pid, signal.SIGINT)
    assert worker.receive() == (None, True)
    worker.close()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_pipe_does_not_wait(folder):
    os.mkfifo(folder / "pipe.mp4")
    with pytest.raises(UserError, match="is not a regular file"):
        scan(write_list(folder, [{"file_path": "pipe.mp4", "text": "x"}]), folder, needs=PLAIN)


def test_a_process_whose_parent_is_gone_ends_without_a_word(monkeypatch):
    """Also where what it sent was never read, at which the system resets the link."""
    monkeypatch.setattr(measuring.signal, "signal", lambda *_: None)
    ours, theirs = multiprocessing.Pipe()

    class Left:
        def recv(self):
            with pytest.raises(ConnectionResetError) as reset:
                theirs.recv()
            raise reset.value

        def send(self, what):
            theirs.send(what)
            ours.close()

    assert measuring._serve(Left(), "ends", 60) is None
