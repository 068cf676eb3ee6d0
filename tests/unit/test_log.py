"""metrics.jsonl has every step, waits for no device, and survives a kill; the console says what to do."""

import importlib.machinery
import io
import json
import os
import sys
import types

import pytest
import torch
from rich.console import Console

from reeltune.core.errors import UserError
from reeltune.reporting import log as module
from reeltune.reporting.log import Log, check_trackers
from reeltune.reporting.metrics import PARTS
from reeltune.reporting.time_verdict import verdict
from tests.runs.same_run import DETERMINISTIC


def row(step, **changes):
    return {
        "step": step,
        "epoch": step // 7,
        "loss": torch.tensor(1 / step, dtype=torch.float64),
        "grad_norm": torch.tensor(float(step) / 3),
        "lr": 1e-4 * step,
        "shape": [5, 64, 96],
        "samples": 6,
        "tokens": 300,
        "peak_memory_bytes": 2**30 + step,
    } | changes


def seconds(data=0.1, encode=0.2, forward_backward=0.6, optimizer=0.1):
    return lambda: dict(zip(PARTS, (data, encode, forward_backward, optimizer), strict=True))


def log(folder, **changes):
    given = {"main": True, "logging_steps": 4, "console": Console(file=io.StringIO(), width=200)}
    return Log(folder, **(given | changes))


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fixed(folder):
    """The deterministic fields of a run."""
    return [
        {name: line[name] for name in DETERMINISTIC[line["kind"]]}
        for line in read(folder)
        if line["kind"] in DETERMINISTIC
    ]


def told(log):
    return log.console.file.getvalue()


def test_every_step_is_a_line_with_rates_from_its_times(tmp_path):
    with log(tmp_path, peak_flops=1e12) as book:
        for step in range(1, 10):
            book.step(row(step, flops=4e11), seconds(data=0.1 * step))
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 10))
    third = lines[2]
    assert third["kind"] == "step" and third["loss"] == 1 / 3 and third["shape"] == [5, 64, 96]
    assert third["step_s"] == pytest.approx(1.2)
    assert third["samples_per_s"] == pytest.approx(6 / 1.2) and third["tokens_per_s"] == pytest.approx(300 / 1.2)
    assert third["mfu"] == pytest.approx(4e11 / 1.2 / 1e12) and "flops" not in third
    assert set(DETERMINISTIC["step"]) <= third.keys()


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    with log(tmp_path) as book:
        book.step(row(1, flops=4e11), seconds())
    assert read(tmp_path)[0]["mfu"] is None


def test_every_row_is_in_the_file_before_the_next_step(tmp_path, monkeypatch):
    asked = []
    with log(tmp_path) as book:
        for step in range(1, 4):
            book.step(row(step), lambda step=step: asked.append(step) or seconds()())
            assert asked == [line["step"] for line in read(tmp_path)] == list(range(1, step + 1))
        assert "step 3" not in told(book)  # the console has its interval
        with monkeypatch.context() as patch:  # as of tensors on a GPU
            event = types.SimpleNamespace(synchronize=lambda: asked.append("synchronized"))
            patch.setattr(module, "_copying", lambda row: (row, event))
            book.step(row(4), seconds())  # the interval's end
            assert asked[-1] == "synchronized" and len(read(tmp_path)) == 4
            book.step(row(5), seconds())
            book.step(row(6), seconds())
            assert len(read(tmp_path)) == 5
            book.flush()
            assert len(read(tmp_path)) == 6
        book.validation(
            {
                "loss": 0.5,
                "loss_start": 0.6,
                "start_step": 0,
                "difference": -0.1,
                "band95": [-0.2, 0],
                "per_band": [],
                "n": 8,
            }
        )
    assert [line["kind"] for line in read(tmp_path)] == ["step"] * 6 + ["validation"]
    assert read(tmp_path)[-1]["step"] == 6


def test_rows_reach_the_file_when_the_run_breaks(tmp_path):
    with pytest.raises(ZeroDivisionError), log(tmp_path, logging_steps=100) as book:
        book.step(row(1), seconds())
        raise ZeroDivisionError
    assert [line["step"] for line in read(tmp_path)] == [1]


def test_a_killed_and_resumed_run_leaves_the_lines_of_an_unbroken_one(tmp_path):
    def run(book, first, last):
        for step in range(first, last + 1):
            book.step(row(step), seconds(data=step))
            if step % 5 == 0:
                held_out = {
                    "start_step": 0,
                    "loss": 1 / step,
                    "loss_start": 1,
                    "difference": 1 / step - 1,
                    "band95": [0, 0],
                }
                bands = [{"level": 0.5, "loss": 1 / step, "loss_start": 1}]
                book.validation({**held_out, "per_band": bands, "per_clip": [1 / step] * 3, "n": 3})
                obeys = {"score": 0.5, "score_start": 0.1, "measure": "edges [F1]", "unit": "", "truth": 0.9}
                book.obedience({**held_out, **obeys, "previews": [], "n": 1})
                book.flush()

    unbroken = log(tmp_path / "a")
    run(unbroken, 1, 13)
    unbroken.close()
    killed = log(tmp_path / "b")
    run(killed, 1, 9)  # the checkpoint was at 5; lines to 8 are written, and then a torn one
    killed.file.write(b'{"kind": "step", "step": 9, "lo')
    killed.file.close()
    resumed = log(tmp_path / "b", resume_step=5)
    assert [line["step"] for line in read(tmp_path / "b")] == [1, 2, 3, 4, 5]
    for kind in ("validation", "obedience"):
        getattr(resumed, kind)(next(line for line in read(tmp_path / "a") if line["kind"] == kind))
    run(resumed, 6, 13)
    resumed.close()
    assert fixed(tmp_path / "b") == fixed(tmp_path / "a")
    assert len(fixed(tmp_path / "a")) == 13 + 2 + 2
    assert "follows its control 0.500 (edges [F1]), -0.900 from the start" in told(unbroken)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{oops}\n{"kind": "step", "step": 2}\n')
    with pytest.raises(UserError, match="line 2 is no JSON"):
        log(tmp_path, resume_step=2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_new_run_keeps_the_metrics_of_an_earlier_one(tmp_path):
    with log(tmp_path) as book:
        book.step(row(1), seconds())
    before = (tmp_path / "metrics.jsonl").read_text()
    with log(tmp_path) as book:
        pass
    [aside] = tmp_path.glob("metrics.until-*.jsonl")
    assert aside.read_text() == before
    assert read(tmp_path)[0]["kind"] == "notice" and aside.name in told(book)
    status = aside.stat()
    os.utime(tmp_path / "metrics.jsonl", (status.st_atime, status.st_mtime))  # of the same second, or a clock set back
    with log(tmp_path):
        pass
    assert aside.read_text() == before
    assert {path.name for path in tmp_path.glob("metrics.until-*")} == {aside.name, f"{aside.stem}.2.jsonl"}


def test_the_console_has_means_over_the_interval(tmp_path):
    book = log(tmp_path, total_steps=8)
    for step in range(1, 9):
        book.step(row(step, loss=float(step)), seconds(forward_backward=1.6))
    lines = told(book).splitlines()
    assert len(lines) == 2
    assert (
        "step 4/8" in lines[0] and "loss 2.5000" in lines[0] and "2 s/step" in lines[0] and "0:00:08 left" in lines[0]
    )
    assert "step 8/8" in lines[1] and "loss 6.5000" in lines[1] and "150 tokens/s" in lines[1]


def test_the_rate_that_prodigy_found_is_told(tmp_path):
    with log(tmp_path, logging_steps=1) as one:
        one.step(row(1, lr=1.0, d=2.5e-4), seconds())
        one.step(row(2), seconds())
    found = told(one).splitlines()
    assert "lr 1.00e+00 x d 2.50e-04  " in found[0] and " d " not in found[1]
    assert [line.get("d") for line in read(tmp_path)] == [2.5e-4, None]


def test_a_mean_is_over_the_steps_that_have_it(tmp_path):
    book = log(tmp_path, peak_flops=1e12)
    for step, flops in enumerate((0, 4e11, 8e11, 6e11), 1):  # of the first the arithmetic is not known
        book.step(row(step, flops=flops), seconds(forward_backward=0.6))
    assert "MFU 60%" in told(book)


def test_a_verdict_comes_every_few_lines(tmp_path):
    with log(tmp_path, logging_steps=1) as book:
        book.step(row(1), seconds(data=100))  # start-up; not judged
        for step in range(2, 12):
            encode = 0.5 if step <= 5 else 0.0
            book.step(row(step), seconds(data=0.05, encode=encode, forward_backward=0.85 - encode))
    verdicts = [line for line in told(book).splitlines() if "of the step" in line]
    assert len(verdicts) == 2
    assert (
        "50 % of the step is encoding, 35 % forward and backward, 10 % the optimizer; 5 % waits for data" in verdicts[0]
    )
    assert "0 % of the step is encoding, 85 % forward" in verdicts[1]  # of the steps since
    assert "smaller sizes" in verdicts[0] and "dataloader_num_workers" not in verdicts[0]


def test_a_short_run_has_a_verdict_at_its_end(tmp_path):
    with log(tmp_path, logging_steps=1) as book:
        for step in range(1, 4):
            book.step(row(step), seconds())
        assert "of the step" not in told(book)
    assert told(book).count("20 % of the step is encoding") == 1


def test_the_verdict_weighs_steps_by_their_time():
    rows = [{"step_s": 9.0} | seconds(0, 0, 9, 0)(), {"step_s": 1.0} | seconds(1, 0, 0, 0)()]
    assert "0 % of the step is encoding, 90 % forward and backward, 0 % the optimizer; 10 % waits" in verdict(rows)
    assert "dataloader_num_workers" in verdict([{"step_s": 1.0} | seconds(0.11, 0, 0.89, 0)()])
    assert "gradient_accumulation_steps" in verdict([{"step_s": 1.0} | seconds(0, 0, 0.6, 0.4)()])


def test_the_verdict_names_what_spares_memory_in_vain():
    rows = [{"step_s": 1.0, "peak_memory_bytes": size} | seconds(0, 0, 1, 0)() for size in (29 * 10**9, 31 * 10**9)]
    told = "31.0 of 80.0 GB are used, and time is taken to spare memory by low_vram and gradient_checkpointing: "
    assert told in verdict(rows, 80 * 10**9, ["low_vram", "gradient_checkpointing"])
    for quiet in (
        verdict(rows, 40 * 10**9, ["low_vram"]),
        verdict(rows, 80 * 10**9),
        verdict(rows, None, ["low_vram"]),
    ):
        assert "GB" not in quiet


def test_text_with_brackets_is_told_as_it_is(tmp_path):
    book = log(tmp_path)
    book.notice("no [bold] here")
    book.warn("nor [/] here")
    saved = {"step": 5, "path": "runs/[x]/checkpoint-5", "seconds": 1.25, "blocked_seconds": 0.5}
    book.save({**saved, "bytes": 3 * 2**20})
    assert "no [bold] here" in told(book) and "nor [/] here" in told(book)
    assert "saved runs/[x]/checkpoint-5 (3 MiB in 1.2 s, of which training waited 0.5 s)" in told(book)
    assert [line.get("warning") for line in read(tmp_path)] == [None, True, None]


def test_other_processes_write_nothing(tmp_path):
    book = log(tmp_path, main=False)
    book.step(row(4), seconds())
    book.notice("hello")
    book.flush()
    book.close()
    assert told(book) == "" and list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"(?s)report_to has wandb.*pip install wandb.*trackio") as caught:
        check_trackers(["wandb", "trackio", "none"])
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError):
        log(tmp_path, main=False, report_to=["wandb"])


def test_wandb_and_trackio_get_the_same(tmp_path, monkeypatch):
    sent = []

    class Run:
        def log(self, values, step):
            sent.append((step, values["train/loss"]))

        def finish(self):
            sent.append("finished")

    fake = types.ModuleType("trackio")
    fake.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    fake.init = lambda project, name: sent.append((project, name)) or Run()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with log(tmp_path / "run", report_to=["trackio"], project="clips") as book:
        for step in range(1, 5):
            book.step(row(step, loss=float(step)), seconds())
    assert sent == [("clips", "run"), (4, 2.5), "finished"]


def test_tensorboard_gets_the_means_and_forgets_what_is_redone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with log(tmp_path, report_to=["tensorboard"]) as book:
        for step in range(1, 9):
            book.step(row(step, loss=float(step)), seconds())
    with log(tmp_path, report_to=["tensorboard"], resume_step=4) as book:
        for step in range(5, 9):
            book.step(row(step, loss=float(-step)), seconds())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(4, 2.5), (8, -6.5)]
    assert "train/tokens_per_s" in events.Tags()["scalars"]
