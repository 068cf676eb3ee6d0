import errno
import json

import pytest
import torch

from reeltune.checkpoint import folder as checkpoint
from reeltune.core.errors import UserError
from reeltune.core.types import Progress


def save(out, step, keep=None, weights=None):
    def write_weights(folder):
        (folder / "weights.bin").write_bytes(bytes([step]) * 100)
        if weights is not None:
            weights(folder)

    return checkpoint.save(
        out,
        Progress(step, 1, 2),
        write_weights=write_weights,
        optimizer_state={"state": torch.full((3,), step)},
        write_more=lambda folder: (folder / "ledger.npz").write_bytes(b"ledger"),
        keep=keep,
    )


def test_a_saved_checkpoint_is_found_and_read(tmp_path):
    path, size_bytes = save(tmp_path, 7)
    assert (path.name, size_bytes > 100) == ("checkpoint-7", True)
    assert checkpoint.progress_of(path) == Progress(7, 1, 2)
    assert checkpoint.load(path)["state"].tolist() == [7, 7, 7]
    for wanted in ("latest", str(path), "checkpoint-7"):
        assert checkpoint.find(tmp_path, wanted) == path


def test_latest_is_by_number_and_ignores_all_that_is_no_checkpoint(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-300-outputs").mkdir()
    (tmp_path / "checkpoint-300-outputs" / "progress.json").write_text("{}")
    (tmp_path / "checkpoint-200").mkdir()  # killed before its progress.json
    assert checkpoint.find(tmp_path, "latest") == tmp_path / "checkpoint-100"
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def test_nothing_yet(tmp_path):
    assert checkpoint.find(tmp_path, "latest") is None
    assert checkpoint.find(tmp_path, None) is None
    save(tmp_path, 3)
    with pytest.raises(UserError, match="checkpoint-3"):
        checkpoint.find(tmp_path, "checkpoint-4")


def test_old_ones_are_pruned_after_a_good_save_only(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    (tmp_path / "checkpoint-3-outputs").mkdir()
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["checkpoint-2", "checkpoint-3"]

    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"free space.*checkpoint-3"):
        save(tmp_path, 4, keep=2, weights=full)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert not list(tmp_path.glob(".checkpoint*"))


def test_our_own_bugs_are_not_taken_for_a_full_disk(tmp_path):
    def bug(folder):
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        save(tmp_path, 4, weights=bug)


def test_a_killed_save_leaves_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    partial = tmp_path / ".checkpoint-2.partial"
    partial.mkdir()
    (partial / "progress.json").write_text(json.dumps({"step": 2, "epoch": 0, "cursor": 0}))
    assert checkpoint.find(tmp_path, "latest").name == "checkpoint-1"
    checkpoint.sweep(tmp_path)
    assert not partial.exists()
    assert checkpoint.find(tmp_path, "latest").name == "checkpoint-1"
