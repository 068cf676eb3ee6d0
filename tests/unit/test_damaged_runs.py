"""A run's own files, damaged: the file is named, and the last good checkpoint before it."""

import csv
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reeltune.checkpoint import folder as checkpoint
from reeltune.core.errors import UserError
from reeltune.core.types import Progress, Record
from reeltune.data.records import Records
from reeltune.distributed import sharded_io
from reeltune.families.toy.family import FAMILY
from reeltune.reporting import report
from reeltune.reporting.ledger import Ledger
from reeltune.reporting.log import _cut_after
from reeltune.reporting.metrics import read_metrics
from reeltune.run.folder import refuse_other_model
from reeltune.sampling.validate import HeldOut
from tests.unit.metrics_rows import METRICS

GOOD = {"step": 4, "epoch": 1, "cursor": 2, "group": 8}
PROGRESS = {
    "texts": ({**GOOD, "step": "4", "cursor": "x"}, "step is '4'; expected a whole number"),
    "negative": ({**GOOD, "step": -4}, "step is -4"),
    "fraction": ({**GOOD, "step": 4.5}, "step is 4.5"),
    "true": ({**GOOD, "epoch": True}, "epoch is True"),
    "another step": ({**GOOD, "step": 3}, "says step 3 in a folder named checkpoint-4"),
    "far": ({**GOOD, "step": 404}, "says step 404 in a folder named checkpoint-4"),
    "group": ({**GOOD, "group": -7}, "group is -7"),
    "huge": ({**GOOD, "cursor": 10**30}, "cursor is 1000000000000000000000000000000"),
    "newer": ({**GOOD, "plan_version": 2}, "plan_version is 2, and this version knows 0 to 1"),
    "nulls": (dict.fromkeys(GOOD), "step is None"),
    "no cursor": ({"step": 4, "epoch": 0}, "has no cursor"),
    "more": ({**GOOD, "extra": 1}, "has 'extra', which"),
    "list": ([1], "is no table of settings"),
}


@pytest.fixture
def run(tmp_path):
    for step in (1, 2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "progress.json").write_text(json.dumps({**GOOD, "step": step}))
        torch.save({"state": {0: torch.ones(3)}}, folder / "optimizer.pt")
    return tmp_path


@pytest.mark.parametrize("name", PROGRESS)
def test_progress_is_not_believed(name, run):
    table, words = PROGRESS[name]
    file = run / "checkpoint-4/progress.json"
    assert checkpoint.progress_of(file.parent) == Progress(**GOOD, plan_version=0)
    file.write_text(json.dumps(table))
    with pytest.raises(UserError) as told:
        checkpoint.progress_of(file.parent)
    assert told.value.where == str(file) and words in str(told.value)
    assert all("resume_from_checkpoint checkpoint-2" in line for line in told.value.problems)


def test_the_last_sound_checkpoint_is_named(run):
    """One that is damaged too is passed over; where none is left, that is said."""
    for folder in run.glob("checkpoint-*"):
        if folder.name != "checkpoint-1":
            (folder / "progress.json").write_text("{")
    with pytest.raises(UserError, match="resume_from_checkpoint checkpoint-1"):
        checkpoint.progress_of(run / "checkpoint-4")
    (run / "checkpoint-1/progress.json").write_text("")
    with pytest.raises(UserError, match="there is no sound checkpoint before it"):
        checkpoint.progress_of(run / "checkpoint-4")


def test_checkpoints_from_before_groups_and_before_they_ran_on_are_read(run):
    file = run / "checkpoint-4/progress.json"
    file.write_text('{"step": 4, "epoch": 1, "cursor": 2}')
    assert checkpoint.progress_of(file.parent) == Progress(4, 1, 2, 0, plan_version=0)
    file.write_text('{"step": 4, "epoch": 1, "cursor": 2, "group": 8}')
    assert checkpoint.progress_of(file.parent) == Progress(4, 1, 2, 8, plan_version=0)
    file.write_text('{"step": 4, "epoch": 1, "cursor": 2, "group": 8, "plan_version": 1}')
    assert checkpoint.progress_of(file.parent) == Progress(4, 1, 2, 8)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_cut_optimizer_file(share, run):
    file = run / "checkpoint-4/optimizer.pt"
    assert checkpoint.load(file.parent)["state"][0].tolist() == [1, 1, 1]
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(UserError, match=r"optimizer\.pt(.|\n)*is damaged(.|\n)*resume_from_checkpoint checkpoint-2"):
        checkpoint.load(file.parent)
    file.unlink()
    with pytest.raises(UserError, match=r"optimizer\.pt(.|\n)*resume_from_checkpoint checkpoint-2"):
        checkpoint.load(file.parent)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"{bad\n", b"[1]\n", b'{"kind": "step"}\n', b'{"step": null}\n', b"5\n"]
)
def test_rows_that_are_none(content, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "step", "step": 1, "loss": 1}\n' + content)
    with pytest.raises(UserError, match="line 2 is no JSON of a run"):
        _cut_after(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(content)  # the old file stays
    if content != b'{"kind": "step"}\n':
        with pytest.raises(UserError, match="line 2 is no row of a run"):
            read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("kind", "damage", "told"),
    [
        ("step", {"loss": "0.5"}, "loss is '0.5'; expected a number"),
        ("step", {"samples": -1}, "samples is -1; expected a whole number from 0"),
        ("step", {"step": 2.5, "lr": [1]}, "lr is [1]; expected a number"),
        ("step", {"step_s": -1.0}, "step_s is -1.0; expected seconds, from 0"),
        ("step", {"shape": [5, 16]}, "shape is [5, 16]; expected a list of 3 entries"),
        ("step", {"optimizer_s": None}, "optimizer_s is None; expected seconds"),
        ("step", {"loss": ...}, "has no loss; expected a number"),
        ("step", {"unknown": ...}, "has no unknown, which the first step has"),
        ("validation", {"band95": [0.1]}, "band95 is [0.1]; expected a list of 2 entries, each a number, or null"),
        ("validation", {"per_band": [{"level": 0.5, "loss": 1}]}, "has no loss_start"),
        ("validation", {"n": "two"}, "n is 'two'"),
        ("obedience", {"score": None}, "score is None; expected a number"),
        ("obedience", {"previews": [{"score": 1.0, "truth": None}]}, "has no score_start"),
        ("obedience", {"rises": 1}, "rises is 1; expected true or false"),
        ("save", {"bytes": 1e9}, "bytes is 1000000000.0; expected a whole number"),
        ("save", {"path": None}, "path is None; expected text"),
        ("notice", {"text": 5}, "text is 5; expected text"),
    ],
)
def test_a_damaged_value_is_named(kind, damage, told, tmp_path):
    """In the report and in what `plan` measures; each is beside sound rows, of which nothing is wrong."""
    sound = {row["kind"]: row for row in METRICS} | {"step": {**METRICS[0], "unknown": 1}}
    row = {name: value for name, value in (sound[kind] | damage).items() if value is not ...}
    lines = [*sound.values(), {**sound["step"], "loss": float("nan"), "grad_norm": float("inf"), "later": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found.steps["samples"] == [2, 2] and "later" not in found.steps
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(UserError) as error:
        read_metrics(tmp_path / "metrics.jsonl")
    assert error.value.where.startswith(f"{tmp_path}/metrics.jsonl: line {len(lines) + 1}")
    assert any(problem.startswith(told) for problem in error.value.problems), error.value.problems
    assert all(problem.endswith("; delete that line") for problem in error.value.problems)


def ledger_of(paths) -> Ledger:
    train = Records.of(Record(i, path, "a cat", "video", 9, 8.0, 64, 64) for i, path in enumerate(paths))
    return Ledger(len(paths), train)


def test_a_cut_ledger_and_one_of_other_data(tmp_path):
    ledger = ledger_of(["a", "b"])
    ledger.save(tmp_path / "ledger.npz")
    ledger.load(tmp_path / "ledger.npz")
    with pytest.raises(UserError, match="the data has changed"):
        ledger_of(["a", "b", "c"]).load(tmp_path / "ledger.npz")
    for content in (b"", (tmp_path / "ledger.npz").read_bytes()[:200]):
        (tmp_path / "ledger.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"is damaged(.|\n)*resume from an earlier checkpoint"):
            ledger.load(tmp_path / "ledger.npz")


def test_a_ledgers_cells_are_no_formulas(tmp_path):
    ledger = ledger_of(["=cmd|' /C calc'!A0", "clips/a.mp4"])
    ledger.failures[1] = (1, "@SUM(1)\x1b[2J")
    ledger.write(tmp_path)
    rows = list(csv.DictReader((tmp_path / "ledger.csv").open(newline="")))
    assert [row["path"] for row in rows] == ["'=cmd|' /C calc'!A0", "clips/a.mp4"]
    assert "\x1b" not in rows[1]["reason"] and "\\x1b[2J" in rows[1]["reason"]


START = {"step": 0, "clips": ["a.mp4", "b.mp4"], "levels": [0.25, 0.75], "losses": [[1.0, 2.0], [3.0, 4.0]]}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"step": "3"}, ["step is '3'; expected a whole number from 0"]),
        ({"step": -1, "clips": "a.mp4"}, ["step is -1", "clips is 'a.mp4'; expected a list of entries, each text"]),
        ({"levels": [0.25, float("nan")]}, ["levels is [0.25, nan]; expected a list of entries, each a number"]),
        ({"losses": [[1.0, 2.0]]}, ["expected a list of 2 entries, each a list of 2 entries, each a number"]),
        ({"losses": [[1.0, 2.0], [3.0, None]]}, ["losses is [[1.0, 2.0], [3.0, None]]; expected a list of 2"]),
        ({"losses": None}, ["losses is None; expected a list of 2 entries"]),
    ],
)
def test_a_damaged_start_of_the_held_out_loss_is_told_by_field(changed, words, tmp_path):
    held = HeldOut.__new__(HeldOut)
    held.output_dir, held.names, held.draws, held.held_out_levels = tmp_path, START["clips"], [None, None], 2
    held.contents, held.controls = [7, 8], [0, 0]
    file = tmp_path / "validation/start.json"
    file.parent.mkdir()
    held.setup = SimpleNamespace(objective=FAMILY.objective, other=None)
    whole = {**START, "levels": held.levels}
    file.write_text(json.dumps(whole))
    step, losses = held._start(5, np.zeros((2, 2)))
    assert step == 0 and losses.tolist() == START["losses"]
    file.write_text(json.dumps(whole | changed))
    with pytest.raises(UserError) as told:
        held._start(5, np.zeros((2, 2)))
    assert told.value.where == str(file)
    assert all(part in line for part, line in zip(words, told.value.problems, strict=True))
    file.write_text("{}")
    with pytest.raises(UserError, match="has no step; expected a whole number from 0; delete it") as told:
        held._start(5, np.zeros((2, 2)))
    assert len(told.value.problems) == 3


@pytest.mark.parametrize("family", [3, None, ["wan_fun"], {}])
def test_a_damaged_run_json_is_told_by_field(family, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"family": family, "mode": "control"}))
    with pytest.raises(UserError, match=r"family is .*; expected text; restore it from a copy") as told:
        refuse_other_model(tmp_path / "checkpoint-4", {"family": "toy", "mode": "control"}, adapters=False)
    assert told.value.where == str(tmp_path / "run.json")
    (tmp_path / "run.json").write_text(json.dumps({"mode": "control"}))
    refuse_other_model(tmp_path / "checkpoint-4", {"family": "toy", "mode": "control"}, adapters=False)


LEDGER = {"entries": 3, "used": 3, "not_reached": 0, "held_out": 0, "left_out": 0, "samples": 9, "samples_repeated": 0}
LEDGER |= {"most_used": 3, "problems": []}


@pytest.mark.parametrize(
    ("name", "whole", "changed", "words"),
    [
        ("run.json", {"trainable": 1, "parameters": 2}, {"trainable": "1", "parameters": None}, "trainable is '1'"),
        ("run.json", {"trainable": 1, "parameters": 2}, {"parameters": float("inf")}, "parameters is inf"),
        ("ledger.json", LEDGER, {"entries": [], "most_used": 1.5}, r"entries is \[\]"),
        ("ledger.json", LEDGER, {"problems": ["x"]}, r"problems is \['x'\]; expected a list of entries, each a table"),
    ],
)
def test_what_the_report_shows_of_damaged_files_is_told_by_field(name, whole, changed, words, tmp_path):
    (tmp_path / name).write_text(json.dumps(whole))
    report.write(tmp_path)
    (tmp_path / name).write_text(json.dumps(whole | changed))
    with pytest.raises(UserError, match=words) as told:
        report.write(tmp_path)
    assert told.value.where == str(tmp_path / name) and len(told.value.problems) == len(changed)
    less = dict(list(whole.items())[1:])
    (tmp_path / name).write_text(json.dumps(less))
    with pytest.raises(UserError, match=r"has no (trainable|entries); expected a whole number"):
        report.write(tmp_path)
    (tmp_path / name).write_text(json.dumps({"other": 3}))
    report.write(tmp_path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_the_metadata_of_shares_runs_no_code_and_leaves_no_folder(tmp_path):
    """torch reads it by a plain pickle.load."""
    sharded_io.write(tmp_path / "shares", [sharded_io.whole("weights/a", torch.ones(2, 3))], None)
    metadata = sharded_io.metadata_of(tmp_path / "shares")
    assert sharded_io.sizes(metadata) == {"weights/a": (6, torch.float32)}
    file = tmp_path / "shares/.metadata"
    file.write_bytes(pickle.dumps(Touch(tmp_path / "CODE_RAN")))
    with pytest.raises(UserError, match=r"\.metadata(.|\n)*is damaged .*posix\.system is no part of a checkpoint's"):
        sharded_io.metadata_of(tmp_path / "shares")
    assert not (tmp_path / "CODE_RAN").exists()
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere"
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"'\.\./elsewhere' is no name of a file in this folder"):
        sharded_io.metadata_of(tmp_path / "shares")
