"""A run that is going on, read from its files alone."""

import asyncio
import fcntl
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("starlette", reason="the page needs reeltune[page]")

from starlette.testclient import TestClient

from reeltune.core.errors import UserError
from reeltune.page import actions, compare, live, runs
from reeltune.page.app import make_app
from reeltune.page.found import Shelf
from reeltune.page.live import Drawn, Tail
from reeltune.page.svg import without_styles
from reeltune.reporting import charts
from reeltune.reporting.metrics import read_metrics

HOST = "http://127.0.0.1:8765"


def step(n, **more):
    return {"kind": "step", "step": n, "loss": 1 / (n + 1), "samples": 4, "tokens": 100, **more}


def validation(n, loss, start):
    return {"kind": "validation", "step": n, "start_step": 0, "loss": loss, "loss_start": start, "n": 2,
            "difference": loss - start, "band95": [loss - start - 0.01, loss - start + 0.01],
            "per_band": [{"level": 0.5, "loss": loss, "loss_start": start}]}  # fmt: skip


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def append(path, text):
    with path.open("a") as file:
        file.write(text)


# ---- the tail


def test_rows_are_read_as_they_come_and_a_cut_line_once_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read().steps == {}, "the run has not begun"
    path.write_text(lines(step(0)))
    assert tail.read().steps["step"] == [0]
    half = lines(step(1))
    append(path, half[:20])
    assert tail.read().steps["step"] == [0]
    append(path, half[20:] + lines(step(2)))
    assert tail.read().steps["step"] == [0, 1, 2]
    assert vars(tail.read()) == vars(read_metrics(path))


def test_a_run_that_cannot_be_read_hides_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    two_runs(served)
    (served / "one" / "metrics.jsonl").unlink()
    (served / "one" / "metrics.jsonl").mkdir()
    id = Shelf(served).id_of(served / "one")
    with TestClient(make_app(served, "token"), base_url=HOST) as client:
        home = client.get("/?token=token")
        assert home.status_code == 200 and "It cannot be read." in home.text and "two" in home.text
        head = client.get(f"/runs/{id}/head")
        assert head.status_code == 422 and "cannot be read (Is a directory)" in head.text


def test_what_was_read_does_not_grow(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(step(0)))
    tail = Tail(path)
    before = tail.read()
    append(path, lines(step(1), validation(1, 0.5, 0.6)))
    assert len(tail.read().validations) == 1
    assert before.steps["step"] == [0] and not before.validations


def test_a_resumed_run_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*map(step, range(5))))
    tail = Tail(path)
    tail.read()
    beside = tmp_path / "beside"
    beside.write_text(lines(step(0), step(1), *(step(n, lr=1.0) for n in range(2, 9))))  # longer than what was read
    beside.replace(path)
    assert tail.read().steps["step"] == list(range(9))
    with path.open("r+") as file:  # cut in place, and longer than before again
        file.truncate(0)
        file.write(lines(*(step(n) for n in range(100, 140))))
    assert tail.read().steps["step"] == list(range(100, 140))
    path.unlink()
    assert tail.read().steps == {}


def test_a_broken_line_is_told_until_it_is_mended(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(step(0)) + "nonsense\n" + lines(step(1)))
    tail = Tail(path)
    for _ in range(2):
        with pytest.raises(UserError, match="line 2 is no row of a run"):
            tail.read()
    path.write_text(lines(step(0), step(1)))
    assert tail.read().steps["step"] == [0, 1]


def test_many_watchers_draw_once():
    drawings, now = [], ["first"]
    drawn = Drawn(lambda: drawings.append(now[0]) or now[0], lambda: now[0])
    assert [drawn.get() for _ in range(20)] == ["first"] * 20 and drawings == ["first"]
    now[0] = "second"
    assert drawn.get() == "first", "too soon after the last"
    drawn.pause_s = 0.0
    assert [drawn.get() for _ in range(20)] == ["second"] * 20 and drawings == ["first", "second"]


def test_events_tell_what_changed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "LOOKS_S", 0.001)
    path, beside = tmp_path / "metrics.jsonl", tmp_path / "beside"

    async def watch():
        events = live.changes(tmp_path, lambda: 0.0)
        seen = [await anext(events) for _ in range(3)]
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "nothing has changed"
        beside.write_text(lines(step(0)))
        beside.rename(path)  # at once: an empty file would be news of its own
        seen.append(await waiting)
        (tmp_path / "previews/step-0").mkdir(parents=True)
        seen.append(await anext(events))
        return seen

    seen = asyncio.run(asyncio.wait_for(watch(), 10))
    assert seen[0].startswith(b"retry")
    assert [event.split(b"\n")[0] for event in seen[1:]] == [
        b"event: drawn",
        b"event: clips",
        b"event: drawn",
        b"event: clips",
    ]


# ---- who writes


def hold(folder):
    """A process that holds the folder as a run does, and ends at SIGTERM."""
    code = "import signal, sys; from pathlib import Path; from reeltune.run.lock import locked\n"
    code += "with locked(Path(sys.argv[1])):\n print('held', flush=True); signal.sigwait([signal.SIGTERM])\n"
    code = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n" + code
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.skipif(not os.path.exists("/proc/locks"), reason="this system has no table of locks")
def test_a_run_that_goes_on_is_known_and_stopped_by_its_signal(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert live.holder(tmp_path) is None
    process = hold(tmp_path)
    try:
        assert live.holder(tmp_path) == process.pid
        with pytest.raises(UserError, match="going on"):
            actions.resume(tmp_path, tmp_path / "logs", "x")
        actions.stop(tmp_path, tmp_path / "logs", "x")
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
    assert live.holder(tmp_path) is None
    with pytest.raises(UserError, match="ended already"):
        actions.stop(tmp_path, tmp_path / "logs", "x")


def test_a_lock_that_nobody_holds_names_no_process(tmp_path):
    told = {"process": os.getpid(), "machine": platform.node(), "since": ""}
    (tmp_path / ".lock").write_text(json.dumps(told))
    assert live.holder(tmp_path) is None, "this very process must not be signalled"
    with (tmp_path / "other").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert live.holder(tmp_path) is None


def test_a_lock_that_another_process_holds_names_not_this_one(tmp_path):
    process = hold(tmp_path)
    try:
        told = json.loads((tmp_path / ".lock").read_text())
        (tmp_path / ".lock").write_text(json.dumps(told | {"process": os.getpid()}))
        assert live.holder(tmp_path) is None
        (tmp_path / ".lock").write_text(json.dumps(told | {"machine": "another"}))
        assert live.holder(tmp_path) is None
    finally:
        process.kill()
        process.wait()


def test_to_look_takes_no_lock(tmp_path):
    from reeltune.run.lock import locked

    with locked(tmp_path):
        pass
    live.holder(tmp_path)
    with locked(tmp_path):
        live.holder(tmp_path)


def test_a_run_of_several_processes_is_not_resumed_as_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "run.json").write_text(json.dumps({"processes": 4, "trainable": 1, "parameters": 1}))
    with pytest.raises(UserError, match="torchrun --nproc_per_node 4 -m reeltune train"):
        actions.resume(tmp_path, tmp_path / "logs", "x")


def test_what_is_started_outlives_the_page_and_its_words_are_kept(tmp_path):
    log = actions.start(["reeltune", "report", str(tmp_path / "none")], tmp_path / "logs", "../evil name")
    assert log.parent == tmp_path / "logs" and "/" not in log.name
    deadline = time.monotonic() + 300
    while "is no folder" not in actions.end_of(log) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert actions.end_of(log).startswith("$ reeltune report ") and "is no folder" in actions.end_of(log)


def test_stop_is_the_signal_that_a_run_answers():
    from reeltune.core.interrupt import Interrupt

    assert signal.SIGTERM in Interrupt.SIGNALS


# ---- what is shown


def test_styles_become_attributes():
    svg = charts.exact([0, 1, 2], [1.0, 2.0, 3.0], "a & b")
    assert "style=" in svg, "or this test shows nothing"
    plain = without_styles(svg)
    assert "style" not in plain and 'stroke="var(--now)"' in plain and 'font-size="10' in plain
    assert plain.count("<path") == svg.count("<path")


def two_runs(tmp_path, clips=("a.mp4", "b.mp4"), per_clip=True):
    for name, losses in (("one", [0.4, 0.6]), ("two", [0.3, 0.5 + 1e-3])):
        run = tmp_path / name
        (run / "validation").mkdir(parents=True)
        first, last = validation(0, 0.6, 0.6), validation(2, sum(losses) / 2, 0.6)
        kept = [{"per_clip": [0.5, 0.7]}, {"per_clip": losses}] if per_clip else [{}, {}]
        (run / "metrics.jsonl").write_text(lines(first | kept[0], step(1), step(2), last | kept[1]))
        told = {"step": 0, "clips": list(clips), "levels": [0.5], "losses": [[0.6], [0.6]]}
        (run / "validation/start.json").write_text(json.dumps(told))
        (run / "recipe.yaml").write_text(f"learning_rate: {losses[0]}\nseed: 42\n")
        (run / "run.json").write_text("{}")
    return [runs.Run(name, name, tmp_path / name, lambda _: True) for name in ("one", "two")]


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_two_runs_are_paired_clip_by_clip(tmp_path):
    told = compare.compared(*two_runs(tmp_path))
    first, last = told["rows"]
    assert told["shared"] == 2 and (first.step, first.of_a, first.of_b, first.band95) == (0, 0.6, 0.6, [0, 0])
    assert (last.step, last.of_a, last.of_b) == (2, 0.5, pytest.approx(0.4005))
    half = 12.706 * 5e-4  # of two clips, whose differences are -0.1 and -0.099
    assert last.band95 == pytest.approx([-0.0995 - half, -0.0995 + half], rel=1e-3)
    assert "the loss of b is 0.0995 lower" in told["answer"] and "b is better" in told["answer"]
    assert told["recipe"] == [("learning_rate", "0.4", "0.3")]


def test_runs_that_kept_no_losses_of_single_clips_are_paired_without_a_band(tmp_path):
    told = compare.compared(*two_runs(tmp_path, per_clip=False))
    assert [(row.step, row.of_a, row.of_b, row.band95) for row in told["rows"]] == [
        (0, 0.6, 0.6, None),
        (2, 0.5, pytest.approx(0.4005), None),
    ]
    assert "kept no losses of single clips" in told["answer"]


def test_of_other_held_out_sets_runs_without_losses_of_single_clips_are_not_paired(tmp_path):
    one, two = two_runs(tmp_path, per_clip=False)
    change(two.folder / "validation/start.json", clips=["a.mp4", "c.mp4"])
    told = compare.compared(one, two)
    assert told["shared"] == 1 and told["rows"] == [] and "kept no losses of single clips" in told["answer"]


def test_a_run_is_no_better_than_itself(tmp_path):
    one, _ = two_runs(tmp_path)
    assert compare.compared(one, one)["answer"] == "At step 2 both have the same loss."


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_wins_nothing(tmp_path, lost):
    one, two = two_runs(tmp_path)
    row = {**validation(3, lost, 0.6), "per_clip": [lost, 0.5]}
    append(one.folder / "metrics.jsonl", lines(row))
    append(two.folder / "metrics.jsonl", lines({**validation(3, 0.5, 0.6), "per_clip": [0.5, 0.5]}))
    told = compare.compared(one, two)
    assert told["rows"][-1].band95 is None and "loss of a is not finite" in told["answer"]


@pytest.mark.parametrize(
    ("file", "fields", "why"),
    [
        ("validation/start.json", {"clips": ["c.mp4", "d.mp4"]}, "other held-out clips"),
        ("validation/start.json", {"levels": [0.4]}, "other noise levels"),
        ("run.json", {"family": "toy"}, "two model families"),
    ],
)
def test_runs_that_were_measured_otherwise_are_not_paired(tmp_path, file, fields, why):
    one, two = two_runs(tmp_path)
    change(two.folder / file, **fields)
    told = compare.compared(one, two)
    assert told["shared"] == 0 and why in told["why"] and told["rows"] == []


@pytest.mark.parametrize("damaged", [{"sizes": 7}, {"sizes": [[9, 8]]}, {"contents": ["x"]}])
def test_a_damaged_start_is_named(tmp_path, damaged):
    one, two = two_runs(tmp_path)
    change(two.folder / "validation/start.json", **damaged)
    with pytest.raises(UserError, match=rf"{next(iter(damaged))} is "):
        compare.shared_clips(one.folder, two.folder)


@pytest.mark.parametrize(
    ("name", "values"), [("contents", [[7, 8], [7, 9]]), ("sizes", [[[9, 8, 8]] * 2, [[9, 8, 8], [1, 8, 8]]])]
)
def test_of_other_held_out_sets_those_clips_are_paired_that_both_have(tmp_path, name, values):
    one, two = two_runs(tmp_path)
    for run, value in zip((one, two), values, strict=True):
        change(run.folder / "validation/start.json", **{name: value})
    told = compare.compared(one, two)
    [_, last] = told["rows"]
    assert (told["shared"], last.of_a, last.of_b, last.band95) == (1, 0.4, 0.3, None)
    assert "one clip alone" in told["answer"]


def test_the_grid_has_what_is_there(tmp_path):
    (one, _) = two_runs(tmp_path)
    for step_, numbers in ((0, "01"), (10, "01"), (200, "1")):
        folder = one.folder / f"previews/step-{step_}"
        folder.mkdir(parents=True)
        for number in numbers:
            (folder / f"{number}.mp4").write_bytes(b"x")
            (folder / f"{number}.json").write_text(
                json.dumps({"prompt": f"prompt {number}", "seed": 3, "control": None})
            )
    (one.folder / "previews/control").mkdir()
    (one.folder / "previews/control/0.mp4").write_bytes(b"x")
    grid = runs.grid(one)
    assert grid.steps == [0, 10, 200] and grid.given == ["control"]
    assert [(row.prompt, row.there) for row in grid.rows] == [
        ("prompt 0", ["control", "0", "10"]),
        ("prompt 1", ["0", "10", "200"]),
    ]
    assert grid.rows[0].settings == [("seed", "3")]


def test_under_each_clip_stands_how_far_it_follows_its_control(tmp_path):
    (one, _) = two_runs(tmp_path)
    scores = [{"score": 0.25, "score_start": 0.1, "truth": 0.9}, {"score": None, "score_start": None, "truth": None}]
    row = {"kind": "obedience", "step": 10, "start_step": 0, "n": 1, "measure": "edges", "unit": "", "rises": True,
           "score": 0.25, "score_start": 0.1, "difference": 0.15, "band95": None, "truth": 0.9,
           "previews": scores}  # fmt: skip
    append(one.folder / "metrics.jsonl", lines(row))
    assert runs.obeyed(one) == {("10", 0): "edges: 0.25", ("truth", 0): "edges: 0.90"}


def test_a_run_is_found_once_it_is_there_and_shown_as_it_grows(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    with TestClient(make_app(served, "token"), base_url=HOST) as client:
        assert "There is no run" in client.get("/?token=token").text
        two_runs(served)
        id = Shelf(served).id_of(served / "one")
        assert f"/runs/{id}" in client.get("/").text
        assert "It is learning." in client.get(f"/runs/{id}/head").text
        charts_ = client.get(f"/runs/{id}/charts").text
        assert charts_.count("<svg") == 3 and "style=" not in charts_
