"""Work of the page beside its requests."""

import os
import threading
import time

from reeltune.core.errors import UserError
from reeltune.page.jobs import Jobs


def result_of(jobs, key):
    """Once the job has ended."""
    deadline = time.monotonic() + 300
    while jobs.result(key) == (None, None) and time.monotonic() < deadline:
        time.sleep(0.001)
    return jobs.result(key)


def test_a_job_runs_once_and_tells_what_was_wrong(capsys):
    jobs, calls, go = Jobs(), [], threading.Event()

    def act():
        calls.append(1)
        go.wait(300)
        raise UserError("list", "is empty")

    jobs.begin("a", act)
    jobs.begin("a", act)
    assert jobs.result("a") == (None, None)
    go.set()
    assert result_of(jobs, "a")[1].problems == ["is empty"] and calls == [1]


def test_what_the_system_refuses_a_job_is_told():
    jobs, name = Jobs(), "9" * 5000
    jobs.begin("a", lambda: os.stat(name))
    assert "is refused by the system (File name too long)" in result_of(jobs, "a")[1].problems[0]


def test_the_latest_results_are_kept():
    jobs = Jobs()
    for key in range(20):
        jobs.begin(key, lambda key=key: str(key))
        assert result_of(jobs, key) == (str(key), None)
    assert [key for key in range(20) if jobs.begun(key)] == list(range(12, 20))
