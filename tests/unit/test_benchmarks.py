"""The page of benchmarks: a section each, in one order, of which some may be written anew."""

import re
from importlib import import_module

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import memory
from benchmarks.__main__ import MEANING, Goal, table, write
from reeltune.demo.main import FAMILIES as DEMO_FAMILIES


def test_a_section_is_written_and_the_others_stay(tmp_path):
    page = tmp_path / "page.md"
    write(page, {"loop": "| a |", "data_read": "| b |"})
    write(page, {"idle": "| c |", "loop": "| d |"})
    told = page.read_text()
    assert "load average" in told
    assert re.findall(r"^## (\w+)", told, re.MULTILINE) == ["data_read", "loop", "idle"]
    assert re.findall(r"^\| (\w) \|$", told, re.MULTILINE) == ["b", "d", "c"]


def test_what_is_no_benchmark_stays_too(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Numbers\n\nA word.\n\n## loop\n\nold\n\n## On a GPU\n\nSo.\n", encoding="utf-8")
    for _ in range(2):
        write(page, {"idle": "| c |"})
        told = page.read_text()
        assert told.startswith("# Numbers\n\nA word.\n\n## On a GPU\n\nSo.\n\n## loop\n\nold\n\n## idle\n\n")
        assert told.count("## ") == 3


@pytest.mark.parametrize("name", benchmarks.MODULES)
def test_every_benchmark_can_be_read(name):
    assert callable(import_module(f"benchmarks.{name}").main)


def test_each_of_the_demos_networks_has_a_row():
    assert {*benchmarks.FAMILIES, *benchmarks.UNTRAINED} == {*DEMO_FAMILIES} - {"toy"}


def test_each_way_to_save_memory_has_a_row():
    compared = {way.beside for way in memory.WAYS.values()} - {"compiled", "recompute_all"}
    assert {*benchmarks.SAVINGS} == {*memory.WAYS} - compared


def test_a_missed_goal_is_said(monkeypatch):
    monkeypatch.setitem(MEANING, "thing", ("what it is", Goal(most=0.01)))
    assert table({"thing": 0.0}).endswith("| what it is | 0 | at most 0.01 |")
    assert table({"thing": 0.5}).endswith("| what it is | 0.5 | at most 0.01, missed |")
    assert set(benchmarks.MODULES) >= {"idle", "engines"}
