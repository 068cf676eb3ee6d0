"""Hashes of a checkpoint's files: read once, and again when they change; a memory that is damaged is no obstacle."""

import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from reeltune.cache import fingerprints as hashing
from reeltune.cache import progress
from reeltune.cache.fingerprints import FOLDER, fingerprints
from reeltune.cache.progress import progress_line
from reeltune.core.user_folder import user_cache_folder


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user/reeltune"


@pytest.fixture
def model(tmp_path) -> dict[str, Path]:
    folder = tmp_path / "model"
    for name, size_bytes in (("vae.pth", 3000), ("text/a.safetensors", 5000), ("text/sub/b.json", 0)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(i % 251 for i in range(size_bytes)))
    return {"vae": folder / "vae.pth", "text": folder / "text"}


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files hashed, in order."""
    names = []

    def hashed(file, on_read, real=hashing.hashed):
        names.append(file.name)
        return real(file, on_read)

    monkeypatch.setattr(hashing, "hashed", hashed)
    return names


ALL = ["vae.pth", "a.safetensors", "b.json"]


def test_files_are_read_once_for_all_caches(model, reads, tmp_path, user):
    first = fingerprints(model, tmp_path / "one")
    assert reads == ALL and first.keys() == model.keys()
    assert fingerprints(model, tmp_path / "one") == first == fingerprints(model, tmp_path / "other")
    assert reads == ALL
    shutil.rmtree(user)  # another machine, where the cache is
    assert fingerprints(model, tmp_path / "one") == first and reads == ALL


def test_the_hash_is_of_all_bytes_and_names(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "PIECE_BYTES", 7)
    told = []
    plain = hashlib.blake2b(model["vae"].read_bytes(), digest_size=16).hexdigest()
    assert hashing.hashed(model["vae"], told.append) == plain and sum(told) == 3000 and max(told) == 7
    first = fingerprints(model, tmp_path / "one")
    (model["text"] / "a.safetensors").rename(model["text"] / "c.safetensors")
    assert fingerprints(model, tmp_path / "one")["text"] != first["text"]


@pytest.mark.parametrize("change", ["time", "size", "inode"])
def test_a_file_that_may_have_changed_is_hashed_anew(change, model, reads, tmp_path):
    first, vae = fingerprints(model, tmp_path / "cache"), model["vae"]
    status, data = vae.stat(), vae.read_bytes()
    if change == "time":
        os.utime(vae, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change == "size":
        vae.write_bytes(data + b"x")
    else:
        vae.with_name("copy").write_bytes(b"x" + data[1:])
        vae.with_name("copy").replace(vae)
    if change != "time":
        os.utime(vae, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = fingerprints(model, tmp_path / "cache")
    assert reads == [*ALL, "vae.pth"]
    assert (second["vae"] == first["vae"]) is (change == "time") and second["text"] == first["text"]


def memories(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / FOLDER).iterdir()}


@pytest.mark.parametrize("damage", ["empty", "cut", "list", "table", "text", "bytes", "deep", "other"])
def test_a_damaged_memory_is_made_anew(damage, model, reads, tmp_path, user, capfd):
    def damaged(data: bytes) -> bytes:
        other = json.dumps([*json.loads(data)[:-1], 7]).encode()
        kinds = {"empty": b"", "cut": data[:-9], "list": b"[]", "table": b"{}", "text": b'"x"', "bytes": b"\xff\xfe"}
        return {**kinds, "deep": b"[" * 100_000, "other": other}[damage]

    first = fingerprints(model, tmp_path / "cache")
    whole = memories(user)
    assert len(whole) == 3 and memories(tmp_path / "cache") == whole
    for folder in (user, tmp_path / "cache"):
        for name, data in whole.items():
            (folder / FOLDER / name).write_bytes(damaged(data))
    assert fingerprints(model, tmp_path / "cache") == first
    assert reads == 2 * ALL and memories(user) == whole
    assert capfd.readouterr().err == ""


def test_memories_that_cannot_be_kept_are_no_obstacle(model, reads, tmp_path, user, monkeypatch):
    user.parent.mkdir()
    user.write_text("a file in the folder's place")
    first = fingerprints(model, tmp_path / "cache")
    assert fingerprints(model, tmp_path / "cache") == first and reads == ALL  # the other one has it
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home at all
    assert user_cache_folder() is None
    assert fingerprints(model, tmp_path / "cache") == first and reads == 2 * ALL


def test_the_folder_is_where_the_standard_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for said, folder in (("", tmp_path / ".cache"), ("relative", tmp_path / ".cache"), ("/x", Path("/x"))):
        monkeypatch.setenv("XDG_CACHE_HOME", said)
        assert user_cache_folder() == folder / "reeltune"


def test_a_stop_loses_one_file(model, reads, tmp_path, monkeypatch):
    def stopped(file, on_read, real=hashing.hashed):
        if file.name == "b.json":
            raise KeyboardInterrupt
        return real(file, on_read)

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(hashing, "hashed", stopped)
        fingerprints(model, tmp_path / "cache")
    assert reads == ALL[:2]
    fingerprints(model, tmp_path / "cache")
    assert reads == ALL


def hash_all(model, folder, barrier):
    barrier.wait()
    fingerprints(model, folder)


def test_two_processes_lose_nothing(model, tmp_path, user):
    """Both hash the same files and some of their own, and remember them in the same places."""
    forks = multiprocessing.get_context("fork")
    barrier = forks.Barrier(2)
    models = [model, {**model, "more": tmp_path / "more"}]
    (tmp_path / "more").mkdir()
    for i in range(20):
        (tmp_path / "more" / f"{i}").write_bytes(os.urandom(9))
    processes = [forks.Process(target=hash_all, args=(files, tmp_path / "cache", barrier)) for files in models]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(memories(user)) == len(memories(tmp_path / "cache")) == 23


def test_progress_is_told(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hashing, "MEGABYTE", 1)
    monkeypatch.setattr(progress, "EVERY_SECONDS", -1.0)
    fingerprints(model, tmp_path / "one", show_progress=False)
    assert capfd.readouterr().err == ""
    fingerprints(model, tmp_path / "two")
    assert capfd.readouterr().err == ""  # all known
    model["vae"].touch()
    fingerprints(model, tmp_path / "two")
    assert "hash the checkpoint: 3,000 of 3,000 MB, " in capfd.readouterr().err


def test_a_line_of_progress():
    assert progress_line(120, 1000, 30.0) == "120 of 1,000, 4/s, 3 min 40 s to go"
    assert progress_line(2500.4, 16600, 10.0, " MB") == "2,500 of 16,600 MB, 250 MB/s, 56 s to go"
