"""Compiled blocks by every engine that can: the run of uncompiled ones, with torch's operators in place of compiled
code."""

import pytest

from tests.distributed.each_way import rows_of, run_each

WAYS = {
    "ddp": {"engine": "ddp"},
    "adapters": {
        **{"engine": "ddp", "rank": 4, "target_name": ["q", "ffn.0"], "base_weights": "int8"},
        "gradient_checkpointing": "products_kept",
    },
    "fsdp": {"engine": "fsdp", "gradient_checkpointing": "attention_kept", "use_ema": True},
    "zero2": {"engine": "zero2", "gradient_checkpointing": True},
}


def operators(rank):
    """In place of the compiler's code."""
    from torch._dynamo import lookup_backend

    from reeltune.memory import compiled

    compiled.inductor = lookup_backend("aot_eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All of one size: several, which runs/test_compiled_runs.py has, take three times as long."""
    return run_each(WAYS, "compile", ("none", "blocks"), tmp_path_factory, before=operators, of_one_size=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_run_of_uncompiled_blocks(way, folder):
    steps = {how: rows_of(folder, way, how, "step") for how in ("none", "blocks")}
    for ours, plain in zip(steps["blocks"], steps["none"], strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)
    notices = [row["text"] for row in rows_of(folder, way, "blocks", "notice")]
    (told,) = [text for text in notices if "blocks are compiled" in text or "was compiled anew" in text]
    # Of adapters the first block is given what needs no gradient, and the others what does.
    count = "2 compilations" if way == "adapters" else "1 compilation"
    assert told.startswith(f"the network's blocks are compiled: {count} for 1 number of tokens")
