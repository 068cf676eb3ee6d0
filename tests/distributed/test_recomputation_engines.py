"""Recomputing all but attention or products, by every engine that can, also with clips shared: the bits of full
recomputation."""

import pytest

from reeltune.memory.kept import KEPT
from tests.distributed.each_way import rows_of, run_each

WAYS = {
    "ddp": {"engine": "ddp"},
    "adapters": {"engine": "ddp", "rank": 4, "base_weights": "int8"},
    "shared": {"engine": "ddp", "context_parallel": 2},
    "fsdp": {"engine": "fsdp"},
    "zero2": {"engine": "zero2"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_each(WAYS, "gradient_checkpointing", (True, *KEPT), tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("way", WAYS)
def test_the_run_of_full_recomputation(way, kept, folder):
    def steps(recomputed):
        return [(row["loss"], row["grad_norm"]) for row in rows_of(folder, way, recomputed, "step")]

    assert len(steps(True)) == 2
    assert steps(kept) == steps(True)
