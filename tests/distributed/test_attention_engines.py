"""`attention: auto` by every engine: what rank 0 finds is every process's, and one process goes on with it."""

import pytest

from reeltune.checkpoint.folder import progress_of
from reeltune.training import attention_choice, loop
from tests.distributed.each_way import SETTINGS, rows_of, run_each
from tests.runs.small_run import recipe

WAYS = {"ddp": {"engine": "ddp"}, "fsdp": {"engine": "fsdp"}, "zero2": {"engine": "zero2"}}


def two_kernels(rank):
    """Of which each process would find another sooner."""
    from reeltune.memory import attention, attention_trial

    sooner = ("math", "flash")[rank]
    attention.CANDIDATES["cpu"] = ("flash", "math")
    attention_trial._pass_s = lambda calls, kernels: 1.0 if kernels[0] == sooner else 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_each(WAYS, "attention", ("auto", "math"), tmp_path_factory, before=two_kernels)


def told(rows):
    return [row["text"] for row in rows if row["kind"] == "notice" and row["text"].startswith("attention is auto")]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_run_of_the_kernel_that_rank_0_finds(way, folder):
    auto, math = (
        [(row["loss"], row["grad_norm"]) for row in rows_of(folder, way, kernel, "step")] for kernel in ("auto", "math")
    )
    assert len(auto) == 2 and auto == math
    (line,) = told(rows_of(folder, way, "auto", "notice"))
    assert line.startswith("attention is auto: math computes it; ")


@pytest.mark.slow
def test_one_process_goes_on_with_it(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("kernels were tried")

    before = folder / "fsdp-auto" / "checkpoint-2"
    settings = {**SETTINGS, "max_train_steps": 3, "resume_from_checkpoint": str(before)}
    monkeypatch.setattr(attention_choice, "_trial", refuse)
    data = next(path for path in folder.parent.glob("data*") if (path / "metadata_control.json").is_file())
    assert loop.train(recipe(folder / "model", data, tmp_path, **settings)) == 0
    assert progress_of(tmp_path / "checkpoint-3").attention == "math"
