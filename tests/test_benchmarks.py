"""The page of benchmarks: a section each, in one order, of which some may be written anew."""

import re

from benchmarks import __main__ as benchmarks
from benchmarks.__main__ import MEANING, Goal, table, write


def test_a_section_is_written_and_the_others_stay(tmp_path):
    page = tmp_path / "page.md"
    write(page, {"loop": "| a |", "data_read": "| b |"})
    write(page, {"idle": "| c |", "loop": "| d |"})
    told = page.read_text()
    assert "load average" in told
    assert re.findall(r"^## (\w+)", told, re.MULTILINE) == ["data_read", "loop", "idle"]
    assert re.findall(r"^\| (\w) \|$", told, re.MULTILINE) == ["b", "d", "c"]


def test_a_missed_goal_is_said(monkeypatch):
    monkeypatch.setitem(MEANING, "thing", ("what it is", Goal(most=0.01)))
    assert table({"thing": 0.0}).endswith("| what it is | 0 | at most 0.01 |")
    assert table({"thing": 0.5}).endswith("| what it is | 0.5 | at most 0.01, missed |")
    assert set(benchmarks.MODULES) >= {"idle", "engines"}
