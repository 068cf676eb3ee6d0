"""The page of benchmarks: a section each, in one order, of which some may be written anew."""

import re
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import gpu
from benchmarks.__main__ import MEANING, Goal, table, write
from reeltune.core.types import Shape
from tests.families.full_size import released


def test_a_section_is_written_and_the_others_stay(tmp_path):
    page = tmp_path / "page.md"
    write(page, {"loop": "| a |", "data_read": "| b |"})
    write(page, {"idle": "| c |", "loop": "| d |"})
    told = page.read_text()
    assert "load average" in told
    assert re.findall(r"^## (\w+)", told, re.MULTILINE) == ["data_read", "loop", "idle"]
    assert re.findall(r"^\| (\w) \|$", told, re.MULTILINE) == ["b", "d", "c"]


def test_every_benchmark_can_be_read_as_it_is_run():
    read = "import importlib; from benchmarks.__main__ import MODULES; "
    read += "[importlib.import_module(f'benchmarks.{name}').main for name in MODULES]"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", read], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missed_goal_is_said(monkeypatch):
    monkeypatch.setitem(MEANING, "thing", ("what it is", Goal(most=0.01)))
    assert table({"thing": 0.0}).endswith("| what it is | 0 | at most 0.01 |")
    assert table({"thing": 0.5}).endswith("| what it is | 0.5 | at most 0.01, missed |")
    assert set(benchmarks.MODULES) >= {"idle", "engines"}


@pytest.mark.golden("released_keys/Wan2.1-Fun-V1.1-14B-Control.json.gz")
def test_the_networks_of_a_gpu_are_of_released_width(goldens):
    with torch.device("meta"):
        whole = gpu.outline(replace(gpu.SIZES["14b_cut"], layers=40))
    shapes = released(goldens, "Wan2.1-Fun-V1.1-14B-Control").values()
    assert sum(weight.numel() for weight in whole.parameters()) == sum(map(prod, shapes))


def test_a_step_on_a_gpu_is_measured(monkeypatch):
    """Here on the CPU, tiny."""
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    monkeypatch.setattr(gpu, "WARM_UP", 0)
    size, clip = gpu.Size(heads=2, ffn=64, layers=2, head_width=24), Shape(5, 32, 48)
    found = dict(gpu.measured(size, clip, gpu.RECOMPUTED, compiled=False))
    assert found["tokens_s"] * found["step_s"] == pytest.approx(2 * 2 * 3)
    kept, compiled = gpu.WAYS["_attention_kept"]
    assert dict(gpu.measured(size, clip, kept, compiled=compiled)).keys() == found.keys()
    assert not dict(gpu.measured(size, clip, gpu.WAYS["_cudnn"][0], compiled=False))
    assert all(f"gpu_1.3b{way}_{unit}" in MEANING for way in gpu.WAYS for unit in (*found, "mfu"))


def test_flops_of_a_block_are_three_times_those_by_hand():
    def flops(layers):
        math = replace(gpu.RECOMPUTED, attention="math")  # torch counts those of a GPU, and of the CPU this one
        return gpu.flops(gpu.Step(gpu.Size(2, 64, layers, head_width=24), Shape(5, 32, 48), math, compiled=False))

    N, D = 2 * 2 * 3, 48  # tokens, width
    others = gpu.TEXT + gpu.IMAGE  # tokens whose keys and values are made, and looked at
    products = 6 * N * D**2 + 2 * others * D**2 + 2 * N * (N + others) * D + 2 * N * D * 64
    assert flops(3) - flops(2) == 3 * 2 * products
