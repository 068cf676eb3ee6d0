"""What has changed of the data since a checkpoint, entry by entry."""

from dataclasses import replace

import numpy as np
import pytest

from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Draw, Record, Shape
from reeltune.data.identity import Identity, changes
from reeltune.data.records import Records
from reeltune.reporting.ledger import Ledger


@pytest.fixture
def folder(tmp_path):
    for name in "abcdef":
        (tmp_path / f"{name}.mp4").write_bytes(name.encode() * 3)
    return tmp_path


def records(folder, names, *, text="a cat", frames=9):
    return Records.of(
        Record(entry, str(folder / f"{name}.mp4"), text, "video", frames, 8.0, 64, 64)
        for entry, name in enumerate(names)
    )


def between(folder, then, now):
    return changes(Identity.of(then, folder), Identity.of(now, folder))


def test_the_same_records_are_the_same_wherever_they_lie(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in "abc":
        (elsewhere / f"{name}.mp4").write_bytes(name.encode() * 3)
    here, there = Identity.of(records(folder, "abc"), folder), Identity.of(records(elsewhere, "abc"), elsewhere)
    found = changes(here, there)
    assert not found.any and found.moved_to.tolist() == [0, 1, 2]
    stored = Identity.stored(here.arrays())
    assert all(np.array_equal(here.arrays()[name], stored.arrays()[name]) for name in here.arrays())
    assert Identity.stored({"used": np.zeros(3)}) is None


def test_a_camera_path_of_the_same_size_is_noticed(folder):
    path = folder / "a.txt"
    row = Record(0, str(folder / "a.mp4"), "a", "video", 9, 8.0, 64, 64, camera_path=str(path))
    found = []
    for text in ("0 0.5", "0 0.5", "0 0.6"):
        path.write_text(text)
        found.append(Identity.of(Records.of([row]), folder))
    assert not changes(*found[:2]).any and changes(*found[1:]).replaced == [0]
    arrays = found[1].arrays()
    del arrays["record_camera"]  # as older checkpoints are
    assert not changes(Identity.stored(arrays), found[2]).any


def test_a_control_of_the_same_size_is_noticed(folder):
    row = Record(0, str(folder / "a.mp4"), "a", "video", 9, 8.0, 64, 64, control_path=str(folder / "b.mp4"))
    then, now = (Identity.of(Records.of([replace(row, control_content=n)]), folder) for n in (7, -8))
    found = changes(then, now)
    assert found.replaced == [0] and found.breaking
    arrays = then.arrays()
    del arrays["record_control"]  # as older checkpoints are
    assert not changes(Identity.stored(arrays), now).any


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ("abcd", "abdc", {"reordered": [2, 3]}),
        ("abcd", "dabc", {"reordered": [0, 1, 2, 3]}),
        ("abcd", "abd", {"gone": [2]}),
        ("abcd", "abed", {"gone": [2], "added": [2]}),
        ("abcd", "abcde", {"added": [4]}),
        ("abcd", "eabcfd", {"added": [0, 4]}),  # the others stay in their order
        ("aab", "aba", {"reordered": [1, 2]}),  # of equal ones the first is the first
        ("aab", "aaab", {"added": [2]}),
    ],
)
def test_places(then, now, expected, folder):
    found = between(folder, records(folder, then), records(folder, now))
    kinds = ("gone", "replaced", "reordered", "added", "captions")
    assert {kind: getattr(found, kind) for kind in kinds if getattr(found, kind)} == expected
    assert found.breaking == bool({"gone", "reordered"} & expected.keys())


def test_files_and_captions(folder):
    then = Identity.of(records(folder, "abc"), folder)
    (folder / "b.mp4").write_bytes(b"another")
    now = records(folder, "abc")
    found = changes(then, Identity.of(now, folder))
    assert (found.replaced, found.breaking) == ([1], True)
    assert list(found.lines(now)) == ["other files under the same paths: entry 1 (b.mp4)"]
    found = between(folder, now, records(folder, "abc", frames=10))
    assert found.replaced == [0, 1, 2]
    found = between(folder, now, records(folder, "abc", text="a dog"))
    assert (found.captions, found.breaking, found.any) == ([0, 1, 2], False, True)


def test_many_are_counted(folder):
    now = records(folder, "abcdef" * 3)
    (line,) = between(folder, records(folder, "a"), now).lines(now)
    assert line.startswith("new: entry 1 (b.mp4), ") and line.endswith("entry 8 (c.mp4), and 9 more")


def draw(record):
    return Draw(record, Shape(1, 16, 16), Crop(16, 16, 0, 0), (0,), 0, seed=record)


def test_a_ledger_goes_on_over_both_parts(folder, tmp_path):
    before = Ledger(3, records(folder, "abc"), root=folder)
    before.count([draw(0), draw(0), draw(2)], failures=[(1, "truncated")])
    before.save(tmp_path / "ledger.npz")
    after = Ledger(4, records(folder, "aebc"), root=folder)
    with pytest.raises(UserError, match="set accept_changed_data") as refused:
        after.load(tmp_path / "ledger.npz")
    assert refused.value.problems == ["new: entry 1 (e.mp4)"]
    notices = after.load(tmp_path / "ledger.npz", accept_changes=True)
    assert len(notices) == 1 and "new: entry 1 (e.mp4) (what is left of this epoch is drawn anew" in notices[0]
    assert after.used.tolist() == [2, 0, 0, 1] and after.failures == {2: (1, "truncated")}
    with pytest.raises(UserError, match="twice or never") as refused:
        Ledger(3, records(folder, "acb"), root=folder).load(tmp_path / "ledger.npz", accept_changes=True)
    assert refused.value.problems == ["in another place of the list: entry 1 (c.mp4), entry 2 (b.mp4)"]


@pytest.mark.parametrize("damage", ["", "cut", "zip of nothing"])
def test_a_damaged_ledger_is_named(damage, folder, tmp_path):
    path = tmp_path / "ledger.npz"
    book = Ledger(3, records(folder, "abc"), root=folder)
    book.save(path)
    path.write_bytes({"": b"", "cut": path.read_bytes()[:-30], "zip of nothing": b"PK\5\6" + bytes(18)}[damage])
    with pytest.raises(UserError, match=r"ledger\.npz.*\n.*is damaged"):
        book.load(path)
