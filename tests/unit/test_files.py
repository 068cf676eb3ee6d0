"""Files are whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from reeltune.core.errors import UserError
from reeltune.core.files import CannotWriteError, refusal, whole_file, whole_folder, writing


def test_a_file_is_whole_before_it_is_seen(tmp_path):
    path = tmp_path / "new" / "page.txt"
    with whole_file(path) as file:
        file.write("é\n")
        assert not path.exists()
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert [file.name for file in path.parent.iterdir()] == ["page.txt"]


@pytest.mark.parametrize(("mode", "half"), [("w", "half"), ("wb", b"half")])
def test_a_failed_write_leaves_the_old_file(mode, half, tmp_path):
    path = tmp_path / "index"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"), whole_file(path, mode) as file:
        file.write(half)
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["index"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0; file write failed"),
        ValueError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_what_the_disk_refuses_names_the_path_the_room_and_what_is_good(error, tmp_path):
    with pytest.raises(CannotWriteError) as raised, whole_file(tmp_path / "new" / "list.json"):
        raise error
    assert raised.value.where == str(tmp_path / "new" / "list.json")
    assert " GB free); what was there before stays as it was; make room" in raised.value.problems[0]
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(CannotWriteError, match="all 3 are whole"), writing(tmp_path, "all 3 are whole"):
        raise error


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CannotWriteError, match="taken/page"), whole_file(tmp_path / "taken" / "page"):
        pass


def test_what_is_in_the_place_of_a_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, told in (("file", "file is a file"), ("link", "link is a link that leads nowhere")):
        with pytest.raises(CannotWriteError, match=rf"cannot be written \(.*/{told}; "), writing(tmp_path / name):
            (tmp_path / name).mkdir(exist_ok=True)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(CannotWriteError, match=r"page\.html"), whole_file(tmp_path / "page.html"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_file_without_a_name_of_its_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CannotWriteError, match="Is a directory"), whole_file(Path(name)):
        pass
    assert not list(tmp_path.iterdir())


def test_what_the_system_refuses_in_words():
    told = refusal(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000))
    assert told.where == "x" * 300 + "…" and told.problems[0].startswith(
        "is refused by the system (File name too long)"
    )
    assert refusal(OSError(errno.EACCES, "Permission denied", b"a\xff")).where == "a\\udcff"
    printed = refusal(OSError(errno.ENOSPC, "No space left on device"))
    assert str(printed).endswith("what it prints cannot be written (No space left on device); make room there")


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "page"):
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_whole_before_it_is_seen_or_nothing_is_left(fails, tmp_path):
    out, left = tmp_path / "a/out", tmp_path / "a/.out.partial/left by a kill"
    out.mkdir(parents=True)
    left.mkdir(parents=True)

    def write():
        with whole_folder(out) as beside:
            (beside / "one").write_text("1")
            assert not list(out.iterdir()) and not left.exists()
            if fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails:
        with pytest.raises(CannotWriteError, match=r"out: .*(.|\n)*No space left.*; nothing is left of it"):
            write()
    else:
        write()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ([] if fails else ["one"])


def test_two_processes_do_not_write_one_folder(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out) as beside:
        (beside / "one").write_text("1")
        told = r"out: 1 problem\n.*is being written by another process; wait"
        with pytest.raises(UserError, match=told), whole_folder(out):
            pass
        assert (beside / "one").read_text() == "1", "what the first has written stays"
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "one").read_text() == "1"
