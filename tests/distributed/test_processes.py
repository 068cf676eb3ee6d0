"""The helper of runs in several processes: it bounds silence, never the whole of a run."""

import os
import sys
import threading
import time

import pytest

from tests.distributed.processes import Run, changes, end, ends, start, wait

SILENCE_SECONDS = 1.0
LINES, PAUSE_SECONDS = 8, 0.25  # together twice the silence that is allowed


def test_a_command_that_goes_on_printing_may_take_long():
    code, printed = end(
        start(["bash", "-c", f"for i in {{1..{LINES}}}; do echo $i; sleep {PAUSE_SECONDS}; done; exit 3"]),
        SILENCE_SECONDS,
    )
    assert code == 3 and printed.split() == [str(i + 1) for i in range(LINES)]


def test_a_silent_command_is_ended_with_all_that_it_started(tmp_path):
    command = f"echo first; sleep 600 & echo $! > {tmp_path}/child; wait"
    with pytest.raises(AssertionError, match=r"silent for 0\.5 s after:\nfirst"):
        ends([start(["bash", "-c", command]), start([sys.executable, "-c", ""])], 0.5)
    child = int((tmp_path / "child").read_text())
    assert wait(lambda: ended(child), lambda: 0, 30)


def ended(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Rank:
    """In the place of a process: writes a line, or a file beside, and then a pause, again and again."""

    def __init__(self, path, count):
        self.exitcode, self.path, self.count = None, path, count
        self.killed, self.thread = threading.Event(), threading.Thread(target=self.run)
        self.thread.start()

    def run(self):
        for i in range(self.count):
            if self.killed.wait(PAUSE_SECONDS):
                break
            (self.path.with_name(f"{i}") if i % 2 else self.path).write_text(f"{i}\n")
        self.exitcode = -9 if self.killed.wait(0 if self.count else 60) else 0

    def is_alive(self):
        return self.thread.is_alive()

    def kill(self):
        self.killed.set()

    def join(self):
        self.thread.join()


def ranks(tmp_path, *counts) -> Run:
    paths = [tmp_path / f"rank-{rank}/out.txt" for rank in range(len(counts))]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.write_text("")
    return Run([Rank(path, count) for path, count in zip(paths, counts, strict=True)], paths)


def test_a_run_that_writes_lines_or_files_may_take_long(tmp_path):
    assert ranks(tmp_path, LINES, 1).end(SILENCE_SECONDS) == [0, 0]


def test_a_rank_that_is_silent_is_named_and_all_are_ended(tmp_path):
    run = ranks(tmp_path, 1, 0)
    with pytest.raises(AssertionError, match=r"ranks \[1\] were silent for 1\.0 s\n---- rank 0\n0"):
        run.end(1.0)
    assert [rank.exitcode for rank in run.forks] == [0, -9]


def test_what_is_waited_for(tmp_path):
    run = ranks(tmp_path, 4)
    run.until((tmp_path / "rank-0/1").exists, SILENCE_SECONDS)
    assert run.forks[0].is_alive()
    with pytest.raises(AssertionError, match="---- rank 0\n2"):  # it has ended before
        run.until(lambda: False, SILENCE_SECONDS)
    silent = ranks(tmp_path / "silent", 0)
    with pytest.raises(AssertionError, match="---- rank 0"):
        silent.until(lambda: False, 0.5)
    silent.forks[0].join()
    assert silent.forks[0].exitcode == -9


def test_a_line_is_another_pulse_and_time_is_none(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/lines").write_text("1\n")
    first = changes(tmp_path)
    time.sleep(0.01)
    assert changes(tmp_path) == first
    with (tmp_path / "a/lines").open("a") as file:
        file.write("2\n")
    second = changes(tmp_path)
    assert second != first
    os.rename(tmp_path / "a", tmp_path / "b")
    assert changes(tmp_path) != second
