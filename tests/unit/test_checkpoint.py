import errno
import json
import re
import shutil

import pytest
import torch

from reeltune.checkpoint import digests
from reeltune.checkpoint import folder as checkpoint
from reeltune.core.errors import UserError
from reeltune.core.types import Progress
from tests.runs.faults import flip


def save(out, step, keep=None, weights=None):
    def write_networks(folder):
        checkpoint.write_state(folder, {"state": torch.full((3,), step)})
        (folder / "weights.bin").write_bytes(bytes([step]) * 100)
        if weights is not None:
            weights(folder)

    return checkpoint.save(
        out,
        Progress(step, 1, 2),
        write_networks=write_networks,
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


def test_of_a_checkpoint_that_lies_elsewhere_the_link_alone_is_deleted(tmp_path):
    """Someone has moved it to another disk, and put a link in its place."""
    out, elsewhere = tmp_path / "run", tmp_path / "disk"
    for step in (1, 2):
        save(out, step)
    (out / "checkpoint-1").rename(elsewhere)
    for name in ("checkpoint-1", ".checkpoint-1.deleted.partial", ".checkpoint-7.partial"):  # and after a kill
        (out / name).symlink_to(elsewhere)
    save(out, 3, keep=2)
    checkpoint.sweep(out)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert checkpoint.progress_of(elsewhere) == Progress(1, 1, 2)


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


# ---- bits


@pytest.mark.parametrize("name", ["weights.bin", "optimizer.pt", "ledger.npz", "progress.json"])
def test_one_flipped_bit_is_noticed_and_the_last_good_one_named(name, tmp_path):
    for step in (1, 2, 3):
        path, _ = save(tmp_path, step)
    checkpoint.verify(path)
    flip(path / name)
    flip(tmp_path / "checkpoint-2" / "weights.bin")
    with pytest.raises(UserError, match="resume_from_checkpoint checkpoint-1") as error:
        checkpoint.verify(path)
    size_bytes = (path / name).stat().st_size
    assert error.value.problems == [f"{name} has other bytes than were written, of the same number"]
    (path / name).write_bytes((path / name).read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name} has {size_bytes - 1:,} bytes, and was written with {size_bytes:,}"):
        checkpoint.verify(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is gone"):
        checkpoint.verify(path)


OTHERS = {  # text in digests.json of a checkpoint -> what it has become
    "a digit of a hash": (r'"([0-9a-f])[0-9a-f]{63}"', lambda found: f'"{int(found[1], 16) ^ 1:x}{found[0][2:]}'),
    "a size": (r"\b([0-9]+),", lambda found: f"{int(found[1]) ^ 1},"),
    "a name": (r"optimizer", "optimizes"),
    "an entry": (r'"weights[^]]*],', ""),
}


@pytest.mark.parametrize("what", OTHERS)
def test_damaged_digests_are_told_as_what_they_are(what, tmp_path):
    path, _ = save(tmp_path, 1)
    file = path / "digests.json"
    file.write_text(re.sub(*OTHERS[what], file.read_text(), count=1))
    with pytest.raises(UserError) as error:
        checkpoint.verify(path)
    assert error.value.where == str(file)
    (line,) = error.value.problems
    assert line.startswith("is not as it was written") and "delete this file" in line
    file.unlink()
    checkpoint.verify(path)


@pytest.mark.parametrize("entry", ['[5, "abc"]', "[-5, %s]", '["5", %s]', "[5.5, %s]", "[true, %s]", "%s", "[5]"])
def test_digests_of_earlier_versions_have_none_of_their_own(entry, tmp_path):
    path, _ = save(tmp_path, 1)
    file = path / "digests.json"
    table = json.loads(file.read_text())
    del table["digests.json"]
    file.write_text(json.dumps(table))
    checkpoint.verify(path)
    flip(path / "weights.bin")
    with pytest.raises(UserError, match=r"weights\.bin has other bytes"):
        checkpoint.verify(path)
    del table["weights.bin"]
    file.write_text(json.dumps(table)[:-1] + ', "weights.bin": ' + entry.replace("%s", f'"{"0" * 64}"') + "}")
    with pytest.raises(UserError, match=r"cannot be read .* or delete this file") as error:
        checkpoint.verify(path)
    assert error.value.where == str(file)


def test_processes_share_the_reading(tmp_path):
    path, _ = save(tmp_path, 1)
    names = sorted(digests.read(path))
    assert names == ["ledger.npz", "optimizer.pt", "progress.json", "weights.bin"]
    for name in names:
        flip(path / name)
    found = [digests.damages(path, part=part, parts=3) for part in range(3)]
    assert [len(lines) for lines in found] == [2, 1, 1]
    assert sorted(line.partition(" ")[0] for lines in found for line in lines) == names


def test_a_checkpoint_without_digests_is_taken_as_it_is(tmp_path):
    path, _ = save(tmp_path, 1)
    (path / "digests.json").unlink()
    checkpoint.verify(path)
    (path / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"optimizer\.pt.*\n.*is damaged"):
        checkpoint.load(path)


def test_weights_are_known_by_the_checkpoint_that_they_lie_in(tmp_path):
    path, _ = save(tmp_path, 1)
    inner = path / "transformer"
    inner.mkdir()
    (inner / "model.safetensors").write_bytes(b"1")
    assert checkpoint.holder_of(path) == (path, checkpoint.WEIGHTS)
    assert checkpoint.holder_of(inner) == (path, ("transformer/",))
    assert checkpoint.holder_of(inner / "model.safetensors") == (path, ("transformer/model.safetensors",))
    assert checkpoint.holder_of(tmp_path) is None and checkpoint.holder_of(tmp_path / "nowhere") is None
    flip(path / "weights.bin")
    checkpoint.verify_weights(inner)  # of which it is not
    checkpoint.verify_weights(None)
    with pytest.raises(UserError, match=r"weights\.bin has other bytes"):
        checkpoint.verify_weights(path / "weights.bin")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("[1]", "is no table"),
        ("[" * 100_000, "nested too deeply"),
        ('{"step": 3}', "has no epoch"),
        ('{"step": 3, "epoch": 0, "cursor": 0, "more": 1}', "has 'more', which this version does not know"),
        ('{"step": "3", "epoch": 0, "cursor": 0}', "step is '3'; expected a whole number from 0"),
        ('{"step": 3, "epoch": -4, "cursor": 0}', "epoch is -4"),
        ('{"step": 3, "epoch": 0, "cursor": 0.5}', "cursor is 0.5"),
        ('{"step": 3, "epoch": true, "cursor": 0}', "epoch is True"),
        ('{"step": 4, "epoch": 0, "cursor": 0}', "says step 4 in a folder named checkpoint-3"),
    ],
)
def test_progress_that_no_run_has_written(text, words, tmp_path):
    for step in (2, 3):
        path, _ = save(tmp_path, step)
    (path / "progress.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        checkpoint.progress_of(path)
    assert all("resume_from_checkpoint checkpoint-2" in problem for problem in error.value.problems)


def test_files_have_the_mode_that_the_user_makes_files_with(tmp_path):
    def owners_alone(folder):
        (folder / "weights.bin").chmod(0o600)

    path, _ = save(tmp_path, 1, weights=owners_alone)
    (tmp_path / "mine").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "mine").stat().st_mode}


# ---- going back, and others


def test_later_ones_are_set_aside_and_pruning_never_takes_what_was_just_written(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert checkpoint.set_later_aside(tmp_path, 6) == []
    moved = checkpoint.set_later_aside(tmp_path, 2)
    assert [path.relative_to(tmp_path).as_posix() for path in moved] == [
        "set_aside/checkpoint-4",
        "set_aside/checkpoint-6",
    ]
    save(tmp_path, 4)
    assert [path.name for path in checkpoint.set_later_aside(tmp_path, 2)] == ["checkpoint-4.2"]
    assert checkpoint.load(moved[0])["state"].tolist() == [4, 4, 4]
    shutil.rmtree(moved[0])
    save(tmp_path, 4)
    save(tmp_path, 6)
    assert [path.name for path in checkpoint.set_later_aside(tmp_path, 2)] == ["checkpoint-4", "checkpoint-6.2"]
    save(tmp_path, 9)
    save(tmp_path, 3, keep=1)  # though a later one is there
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["checkpoint-3"]


def test_folders_of_other_tools_are_never_written_over(tmp_path):
    theirs = tmp_path / "checkpoint-50" / "transformer"
    theirs.mkdir(parents=True)
    (theirs / "diffusion_pytorch_model.safetensors").write_bytes(b"theirs")
    save(tmp_path, 1)
    assert checkpoint.of_other_tools(tmp_path) == [tmp_path / "checkpoint-50"]
    assert checkpoint.their_weights(tmp_path / "checkpoint-50") == theirs
    with pytest.raises(UserError, match=r"checkpoint-50 was made by another tool"):
        save(tmp_path, 50)
    assert (theirs / "diffusion_pytorch_model.safetensors").read_bytes() == b"theirs"
    (tmp_path / "checkpoint-60").write_bytes(b"theirs")
    assert checkpoint.of_other_tools(tmp_path) == [tmp_path / "checkpoint-50", tmp_path / "checkpoint-60"]
    with pytest.raises(UserError, match=r"checkpoint-60 was made by another tool"):
        save(tmp_path, 60)
    assert (tmp_path / "checkpoint-60").read_bytes() == b"theirs"


def test_a_deletion_that_is_cut_short_leaves_nothing_that_seems_to_be_a_checkpoint(tmp_path, monkeypatch):
    path, _ = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # killed before it has begun
        checkpoint._delete(path)
    assert checkpoint.complete(tmp_path) == checkpoint.of_other_tools(tmp_path) == []
    checkpoint.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
