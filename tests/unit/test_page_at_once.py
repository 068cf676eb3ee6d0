"""Two tabs, or two servers, on one folder; and what is deleted, moved or set back while a page shows it."""

import fcntl
import json
import os
import platform
import signal
import threading

import pytest

pytest.importorskip("starlette", reason="the page needs reeltune[page]")

from starlette.testclient import TestClient

from reeltune.core.errors import UserError
from reeltune.page import actions, captions, live, seen
from reeltune.page.alone import alone_in
from reeltune.page.app import make_app
from reeltune.page.found import Shelf
from tests.unit.test_page_run import HOST, two_runs


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """A command that waits for its signal, in place of `reeltune train`."""
    (tmp_path / "sleeper.py").write_text(
        "import sys, time\nprint('begun', *sys.argv[1:], flush=True)\ntime.sleep(300)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield ["sleeper"]
    for started in actions._started.values():
        started.process.kill()
        started.process.wait()
    actions._started.clear()


def test_what_two_tabs_ask_for_is_started_once_and_stopped_before_it_is_in_its_folder(tmp_path, sleeper):
    logs = tmp_path / "logs"
    actions.start(sleeper, logs, "x")
    pid = actions.going_on(logs, "x")
    with pytest.raises(UserError, match=f"started here before, and goes on as process {pid}; stop it first"):
        actions.start(sleeper, logs, "x")
    actions.start(sleeper, logs, "another")
    assert len(list(logs.iterdir())) == 2 and live.holder(tmp_path) is None
    actions.stop(tmp_path, logs, "x")
    assert actions._started[logs, "x"].process.wait(timeout=300) == -signal.SIGTERM
    assert actions.going_on(logs, "x") is None and actions.going_on(logs, "another") is not None
    with pytest.raises(UserError, match="ended already"):
        actions.stop(tmp_path, logs, "x")


def test_no_log_is_written_over_and_the_latest_is_shown_though_the_clock_is_set_back(tmp_path, sleeper, monkeypatch):
    logs = tmp_path / "logs"
    at = iter(["20261127-120000", "20261127-120000", "20261127-110000"])
    monkeypatch.setattr(actions.time, "strftime", lambda _: next(at))
    (logs).mkdir()
    (logs / "20261127-120000-x.log").write_text("of another server")
    log = actions.start(sleeper, logs, "x")
    assert log.name == "20261127-120000.1-x.log" == actions.latest_log(logs, "x").name
    actions._started[logs, "x"].process.kill()
    actions._started[logs, "x"].process.wait()
    actions.start(sleeper, logs, "y")
    log = actions.start(sleeper, logs, "x")
    assert log.name == "20261127-110000-x.log" == actions.latest_log(logs, "x").name
    assert (logs / "20261127-120000-x.log").read_text() == "of another server"
    actions._started.pop((logs, "x")).process.kill()
    assert actions.latest_log(logs, "x").name == "20261127-120000.1-x.log", "of a server that was started anew"


def test_a_run_whose_folder_is_gone_or_leads_elsewhere_is_told_as_such(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    two_runs(served)
    ids = {name: Shelf(served).id_of(served / name) for name in ("two", "one")}
    with TestClient(make_app(served, "token"), base_url=HOST) as client:
        assert client.get(f"/runs/{ids['one']}/head?token=token").status_code == 200
        assert client.get(f"/runs/{ids['two']}/head").status_code == 200
        (served / "one").rename(served / "renamed")
        (served / "two").rename(tmp_path / "outside")
        (served / "two").symlink_to(tmp_path / "outside")
        for id, part in ((id, part) for id in ids.values() for part in ("", "/head", "/charts", "/clips", "/events")):
            answer = client.get(f"/runs/{id}{part}")
            assert answer.status_code == 404
        assert "renamed" in client.get("/").text and "one is gone" not in client.get("/").text


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="this system does not tell which files are open")
def test_a_process_that_has_the_number_of_one_that_ended_is_not_stopped(tmp_path, monkeypatch):
    """The table of locks has it as long as children of that one live."""
    held = tmp_path / ".lock"
    held.write_text(json.dumps({"process": os.getpid(), "machine": platform.node(), "since": ""}))
    table = tmp_path / "locks"
    table.write_text(f"1: FLOCK  ADVISORY  WRITE {os.getpid()} 08:01:{held.stat().st_ino} 0 EOF\n")
    monkeypatch.setattr(live, "LOCKS", table)
    assert live.holder(tmp_path) is None
    with pytest.raises(UserError, match="ended already"):
        actions.stop(tmp_path, tmp_path / "logs", "x")
    with held.open():
        assert live.holder(tmp_path) == os.getpid()


def test_captions_are_changed_by_one_server_at_a_time(tmp_path):
    path, undo = tmp_path / "list.jsonl", tmp_path / "undo.json"
    path.write_text('{"file_path": "a.mp4", "text": "a"}\n{"file_path": "b.mp4", "text": "b"}\n')
    change = captions.Change(0, "a", "mine")
    handle = os.open(tmp_path, os.O_RDONLY)  # as another server
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        writer = threading.Thread(target=captions.edit, args=(path, change, undo))
        writer.start()
        writer.join(0.2)
        assert writer.is_alive() and not captions.edited_path(path).exists()
        theirs = path.read_text().replace('"b"', '"theirs"')
        captions.edited_path(path).write_text(theirs)
    finally:
        os.close(handle)
    writer.join(300)
    assert captions.edited_path(path).read_text() == theirs.replace('"a"', '"mine"')


def test_who_has_changed_a_folder_lets_it_go(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), alone_in(tmp_path):
            raise KeyError


def test_a_micro_step_is_shown_whole_or_not_at_all(tmp_path, monkeypatch):
    """Ctrl-C while its files are written; another server that writes the same."""
    folder = tmp_path / "seen" / "key"

    def written(batch, beside, **_):
        beside.mkdir(parents=True)
        (beside / "0_pixels.mp4").write_text("ours")

    def cut(batch, beside):
        raise KeyboardInterrupt

    def others_first(batch, beside):
        folder.mkdir()
        (folder / "0_pixels.mp4").write_text("theirs")

    monkeypatch.setattr(seen, "write_first_batch", written)
    monkeypatch.setattr(seen, "_write_more", cut)
    with pytest.raises(KeyboardInterrupt):
        seen._write(None, folder, reference=False)
    assert list((tmp_path / "seen").iterdir()) == []
    monkeypatch.setattr(seen, "_write_more", others_first)
    seen._write(None, folder, reference=False)
    assert (folder / "0_pixels.mp4").read_text() == "theirs" and list((tmp_path / "seen").iterdir()) == [folder]
