"""Records: a sequence that costs little."""

import pickle
import tracemalloc

import pytest

from reeltune.core.types import Record
from reeltune.data.records import STRINGS, Records


def record(n: int) -> Record:
    control = f"/d/control-{n}.mp4" if n % 2 else None
    return Record(n, f"/d/ü{n}.mp4", "ein Bär 🐻" * n, "video" if n % 3 else "image", 10 + n, 24.0, 96, 128, control)


def test_records_are_a_sequence():
    rows = [record(n) for n in range(9)]
    records = Records.of(iter(rows))
    assert list(records) == rows
    assert len(records) == 9
    assert records[-1] == rows[-1]
    assert list(records[2:8:3]) == rows[2:8:3]
    assert list(records.take([5, 0, 5])) == [rows[5], rows[0], rows[5]]
    assert len(records.take([])) == 0
    assert records.kind_video.tolist() == [row.kind == "video" for row in rows]
    assert records.entry.tolist() == list(range(9))
    for name in STRINGS:
        assert records.column(name) == [getattr(row, name) or "" for row in rows]
        assert records[3:7].column(name) == records.column(name)[3:7]
        assert records.take([]).column(name) == []
    assert pickle.loads(pickle.dumps(records)) == records  # noqa: S301 - our own bytes
    assert records != Records.of(rows[:8])
    with pytest.raises(IndexError):
        records[9]


def test_a_record_costs_its_strings_and_little_more():
    """Measured, 2026-11: 129 MB for a million of these rows."""
    rows = 20_000
    tracemalloc.start()
    records = Records.of(
        Record(n, f"/data/{n:08d}.mp4", "a caption " * 5, "video", 49, 24.0, 96, 128) for n in range(rows)
    )
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    strings = len("/data/00000000.mp4") + 50
    assert held / rows < strings + 80
    assert records[rows - 1].path == f"/data/{rows - 1:08d}.mp4"
