"""Every entry ends in one place, and the counts add up."""

import csv
import json
import tracemalloc

import numpy as np
import pytest

from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Draw, Record, Shape
from reeltune.data.metadata import LeftOut
from reeltune.data.records import Records
from reeltune.reporting.ledger import Ledger, in_words


def records(entries):
    return Records.of(Record(entry, f"/data/{entry}.mp4", "a cat", "video", 9, 8.0, 64, 64) for entry in entries)


def draw(record, *, repeat=False):
    return Draw(record, Shape(1, 16, 16), Crop(16, 16, 0, 0), (0,), 0, seed=record, repeat=repeat)


def ledger(**changes):
    """Ten entries: 0 and 5 unreadable, 9 too short for the plan, 7 held out; records 0..6 are entries 1 2 3 4 6 8 9."""
    given = {
        "held_out": records([7]),
        "left_out": [
            LeftOut(0, "/data/0.mp4", "is empty", "copy it again"),
            LeftOut(5, "/data/5, b.mp4", 'is "odd"\nand long', "copy it again"),
            LeftOut(9, "/data/9.mp4", "its length is 1 frame", "use a longer clip"),
        ],
    }
    return Ledger(10, records([1, 2, 3, 4, 6, 8, 9]), **(given | changes))


def read(folder):
    with (folder / "ledger.csv").open(newline="", encoding="utf-8") as file:
        return json.loads((folder / "ledger.json").read_text()), list(csv.DictReader(file))


def test_each_entry_has_one_status_and_the_sums_hold(tmp_path):
    book = ledger()
    book.count([draw(0), draw(0), draw(1), draw(1, repeat=True)])
    book.count([draw(2, repeat=True)], failures=[(3, "truncated"), (3, "truncated"), (1, "gone")])
    returned = book.write(tmp_path)
    summary, rows = read(tmp_path)
    assert returned == {key: value for key, value in summary.items() if key != "problems"}
    assert returned == {
        "entries": 10,
        "used": 3,
        "not_reached": 2,
        "held_out": 1,
        "left_out": 4,
        "samples": 5,
        "samples_repeated": 2,
        "most_used": 2,
        "failed_reads": 3,
    }
    assert [row["status"] for row in rows] == (
        [
            "left out",
            "used",
            "used",
            "used",
            "left out",
            "left out",
            "not reached",
            "held out",
            "not reached",
            "left out",
        ]
    )
    assert [(int(row["used"]), int(row["repeated"])) for row in rows[1:4]] == [(2, 0), (1, 1), (0, 1)]
    assert sum(int(row["used"]) + int(row["repeated"]) for row in rows) == summary["samples"]
    assert rows[9]["path"] == "/data/9.mp4" and rows[9]["reason"] == "its length is 1 frame"
    assert rows[5]["path"] == "/data/5, b.mp4" and rows[5]["reason"] == 'is "odd"\nand long'
    assert rows[4]["reason"] == "could not be read 2 times during the run: truncated"
    assert rows[2]["status"] == "used" and rows[2]["reason"].endswith("1 time during the run: gone")
    assert [problem["entry"] for problem in summary["problems"]] == [0, 2, 4, 5, 9]


def test_an_entry_without_a_reason_is_caught(tmp_path):
    book = ledger(left_out=[LeftOut(entry, "/data/e.mp4", "is empty", "copy it again") for entry in (0, 9)])
    with pytest.raises(AssertionError, match="lost without a reason"):
        book.write(tmp_path)


def test_training_on_what_was_left_out_is_caught(tmp_path):
    book = ledger()
    book.count([draw(6)])
    with pytest.raises(AssertionError, match="left out was trained on"):
        book.write(tmp_path)


def test_counts_survive_a_resume_and_are_summed_over_processes(tmp_path):
    unbroken, first, second = ledger(), ledger(), ledger()
    for book in (unbroken, first):
        book.count([draw(0), draw(1, repeat=True)], [(4, "gone")])
    other = ledger()
    other.count([draw(0), draw(5)], [(4, "gone"), (2, "späť")])
    first.save(tmp_path / "ledger.npz", [first.share(), other.share()])
    second.load(tmp_path / "ledger.npz")
    second.count([draw(3)])
    unbroken.count([draw(3)])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert second.write(tmp_path / "a") == unbroken.write(tmp_path / "b", [unbroken.share(), other.share()])
    for name in ("ledger.json", "ledger.csv"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert read(tmp_path / "a")[0]["failed_reads"] == 3


def test_resuming_on_other_data_is_refused(tmp_path):
    ledger().save(tmp_path / "ledger.npz")
    with pytest.raises(UserError, match="the data has changed") as refused:
        Ledger(2, records([1, 2])).load(tmp_path / "ledger.npz")
    assert refused.value.problems == ["gone, by their numbers then: 3, 4, 6, 8, 9"]


def test_a_checkpoint_that_does_not_know_its_records_is_held_to_their_number(tmp_path):
    ledger().save(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as held:
        old = {name: array for name, array in held.items() if not name.startswith("record_")}
    np.savez(tmp_path / "ledger.npz", **old)
    assert ledger().load(tmp_path / "ledger.npz") == []
    with pytest.raises(UserError, match="7 usable records and this one has 2"):
        Ledger(2, records([1, 2])).load(tmp_path / "ledger.npz")


def test_files_that_break_later_count_towards_max_bad_share():
    book = ledger(max_bad_share=0.4)
    book.count([], [(3, "gone"), (3, "gone")])
    assert book.too_many_bad() is None  # 3 left out and 1 broken is 4 of 10
    book.count([], [(0, "no moov atom")])
    problem = book.too_many_bad()
    assert problem.startswith("5 of 10 entries") and "/data/1.mp4: no moov atom" in problem


@pytest.mark.slow
def test_nothing_is_kept_per_row_beside_arrays(tmp_path):
    n = 50_000
    train = records(range(n))
    tracemalloc.start()
    book = Ledger(n, train)
    book.count([draw(record) for record in range(100)])
    summary = book.write(tmp_path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (summary["used"], summary["not_reached"]) == (100, n - 100)
    assert peak_bytes < 60 * n
    with (tmp_path / "ledger.csv").open() as file:
        assert sum(1 for _ in file) == n + 1


def test_the_counts_in_words_say_which_list_is_held_out(tmp_path):
    summary = ledger().write(tmp_path)
    assert in_words(summary, None) == "10 entries: 0 used, 1 held out, 6 not reached, 3 left out (ledger.csv)"
    assert in_words(summary | {"held_out": 0, "not_reached": 10, "left_out": 0}, "val.json") == (
        "10 entries: 0 used, 10 not reached, none left out (ledger.csv); "
        "held-out clips are those of validation_data_meta, val.json"
    )
