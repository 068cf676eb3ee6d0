"""Damaged checkpoints, runs and caches, as the cases' own script makes them: one UserError each, before a step."""

import runpy
import shutil
import time
from dataclasses import replace

import pytest
import torch

from reeltune import families
from reeltune.cache import fill
from reeltune.core.errors import UserError
from reeltune.training.loop import train
from tests.runs.small_run import recipe

LONGEST_SECONDS = 60  # of processor time for a case


@pytest.fixture(scope="module")
def make(cases):
    if not (cases / "make.py").is_file():
        pytest.skip(f"no make.py at {cases}")
    return runpy.run_path(str(cases / "make.py"))


@pytest.fixture(scope="module")
def run(toy, data, tmp_path_factory):
    """The folder of a run of six steps with three checkpoints, and its recipe."""
    out = tmp_path_factory.mktemp("sound") / "run"
    given = recipe(toy, data, out)
    assert train(given) == 0
    return out, given


def answer(act) -> str:
    """What became of it: refused, or what else."""
    began = time.process_time()
    try:
        act()
        outcome = "went on"
    except UserError as error:
        outcome = "refused" if error.problems else "refused without a word"
    assert time.process_time() - began < LONGEST_SECONDS
    return outcome


def test_runs(make, run, tmp_path):
    sound, given = run
    (tmp_path / "cases").mkdir()
    make["runs"](sound, tmp_path / "cases")
    outcomes = {}
    for folder in sorted((tmp_path / "cases").iterdir()):
        output = replace(given.output, output_dir=str(folder), resume_from_checkpoint="latest")
        more = replace(given, output=output, training=replace(given.training, max_train_steps=7))
        outcomes[folder.name] = answer(lambda more=more: train(more))
    # A folder without progress.json is no checkpoint; the one before it is gone on with, and that is said.
    assert {name for name, outcome in outcomes.items() if outcome != "refused"} <= {"progress_gone"}
    assert len(outcomes) >= 20 and {"flip_optimizer", "flip_diffusion_pytorch_model"} <= outcomes.keys()


def test_caches(make, toy, data, tmp_path):
    given = recipe(toy, data, tmp_path / "run", cache_folder=str(tmp_path / "cache"), cache_variants=1)
    fill.fill(given)
    (tmp_path / "cases").mkdir()
    (tmp_path / "victim.txt").write_text("not ours")
    make["caches"](tmp_path / "cache", tmp_path / "cases")
    outcomes = {}
    for folder in sorted((tmp_path / "cases").iterdir()):
        out = tmp_path / "runs" / folder.name
        shutil.copytree(tmp_path / "run" / "index", out / "index")
        more = replace(
            given,
            cache=replace(given.cache, cache_folder=str(folder)),
            output=replace(given.output, output_dir=str(out)),
        )
        outcomes[folder.name] = answer(lambda more=more: train(more))
    assert set(outcomes.values()) == {"refused"}, outcomes
    assert (tmp_path / "victim.txt").read_text() == "not ours"


@pytest.mark.golden("wan_fun/checkpoints/control_v1.1")
def test_checkpoints(make, goldens, tmp_path):
    make["checkpoints"](goldens / "wan_fun/checkpoints/control_v1.1", tmp_path)

    def load(folder):
        dtype = torch.float32
        families.find(folder).load(folder, dtype=dtype, frozen_dtype=dtype, device=torch.device("cpu"))

    folders = [folder for folder in sorted(tmp_path.iterdir()) if folder.is_dir()]
    outcomes = {folder.name: answer(lambda folder=folder: load(folder)) for folder in folders}
    assert len(outcomes) >= 25
    assert {name for name, outcome in outcomes.items() if outcome != "refused"} == set()
    assert not list(tmp_path.rglob("CODE_RAN"))
