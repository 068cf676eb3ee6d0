"""A run's own files, damaged: the file is named, and the last good checkpoint before it."""

import csv
import json

import pytest
import torch

from reeltune.checkpoint import folder as checkpoint
from reeltune.core.errors import UserError
from reeltune.core.types import Progress, Record
from reeltune.data.records import Records
from reeltune.reporting.ledger import Ledger
from reeltune.reporting.log import _cut_after
from reeltune.reporting.report import read_metrics

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
    assert checkpoint.progress_of(file.parent) == Progress(**GOOD)
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


def test_a_checkpoint_from_before_groups_is_read(run):
    (run / "checkpoint-4/progress.json").write_text('{"step": 4, "epoch": 1, "cursor": 2}')
    assert checkpoint.progress_of(run / "checkpoint-4") == Progress(4, 1, 2, 0)


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
