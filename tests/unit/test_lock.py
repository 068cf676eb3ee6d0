"""A second run in the same output_dir is refused, and the first is named."""

import errno
import fcntl
import multiprocessing
import os

import pytest

from reeltune.core.errors import UserError
from reeltune.run.lock import locked


def hold(folder, pipe):
    with locked(folder):
        pipe.send(os.getpid())
        pipe.recv()


def test_the_other_process_is_named_and_its_end_frees_the_folder(tmp_path):
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    pid = here.recv()
    with pytest.raises(UserError, match=f"being written by another run, process {pid} on "), locked(tmp_path / "run"):
        pass
    process.kill()
    process.join()
    with locked(tmp_path / "run") as notice:
        assert notice is None
    with locked(tmp_path / "run"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without)
    with locked(tmp_path) as notice:
        assert "has no locks (No locks available)" in notice


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    with pytest.raises(UserError), locked(tmp_path / "run"):
        raise UserError("recipe", "refused")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError), locked(tmp_path / "run"):
        (tmp_path / "run" / "index").mkdir()
        raise UserError("recipe", "refused")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "index"]
