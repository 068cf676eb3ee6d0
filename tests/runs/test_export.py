"""Exports of a tiny checkpoint: both forms, shards, dtypes, and what is refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from reeltune.config.parse import dump
from reeltune.config.recipe import Model, Recipe
from reeltune.core.errors import UserError
from reeltune.distributed.engine import DTYPES
from reeltune.export import streamed
from reeltune.export.main import Cast, export, taken
from reeltune.families import configs, tensor_files, weights
from tests.families.tiny_wan import tiny_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with a checkpoint-3 whose weights are in fp32."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_checkpoint(folder / "model", "control_v1.1")
    saved = folder / "checkpoint-3" / "transformer"
    saved.mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copyfile(model / name, saved / name)
    (folder / "checkpoint-3" / "progress.json").write_text('{"step": 3}')
    (folder / "recipe.yaml").write_text(dump(Recipe(model=Model(pretrained_model_name_or_path=str(model)))))
    return folder


def test_released_names_in_bf16(run, tmp_path):
    source = weights.read(run / "checkpoint-3" / "transformer")
    *files, proof, tried = export(run / "checkpoint-3", tmp_path / "out")
    written = weights.read(tmp_path / "out")
    assert tried == "a forward pass of wan_fun/control_v1.1 on a clip of 5x64x64: finite"
    assert len(files) == 1 and proof.startswith(f"{len(source)} tensors, bf16")
    assert written.keys() == source.keys() and "blocks.0.self_attn.q.weight" in written
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in source.items())
    assert (tmp_path / "out/config.json").read_text() == (run / "checkpoint-3/transformer/config.json").read_text()


def test_shards_hold_each_tensor_once(run, tmp_path):
    source = weights.read(run / "checkpoint-3" / "transformer")
    list(export(run / "checkpoint-3", tmp_path / "out", dtype="as_stored", max_shard_size="200KB"))
    shards = tensor_files.files_of(tmp_path / "out")
    assert len(shards) > 2
    assert sum(len(weights.read(file)) for file in shards) == len(source)
    written = weights.read(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize("max_shard_size", ["80GB", "200KB"])
def test_diffusers_loads_its_form(run, tmp_path, max_shard_size):
    from diffusers import WanTransformer3DModel

    list(export(run / "checkpoint-3", tmp_path / "out", dtype="fp32", diffusers=True, max_shard_size=max_shard_size))
    assert json.loads((tmp_path / "out/config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    net, report = WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    source = weights.read(run / "checkpoint-3" / "transformer")
    mine, theirs = source["blocks.1.cross_attn.k.weight"], net.state_dict()["blocks.1.attn2.to_k.weight"]
    assert torch.equal(mine, theirs)


def test_a_written_tensor_that_differs_is_told(run, tmp_path, monkeypatch):
    def spoil(folder, outline, tensor, max_shard_bytes, real=streamed.write):
        return real(folder, outline, lambda name: tensor(name) + (name == "head.head.bias"), max_shard_bytes)

    monkeypatch.setattr("reeltune.export.streamed.write", spoil)
    with pytest.raises(RuntimeError, match=r"does not hold what was written: head\.head\.bias$"):
        list(export(run / "checkpoint-3", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_refused(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError) as told:
        list(export(run, tmp_path / "full"))
    assert len(told.value.problems) == 2 and "checkpoint-3" in told.value.problems[0]
    with pytest.raises(UserError, match="use_ema"):
        list(export(run / "checkpoint-3", tmp_path / "out", ema=True))
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_into_a_checkpoint_but_into_a_folder_of_such_a_name(run, tmp_path):
    inside = run / "checkpoint-3/transformer/out"
    with pytest.raises(UserError, match=r"out is within .*checkpoint-3, which goes once the run has"):
        list(export(run / "checkpoint-3", inside))
    assert not inside.exists()
    with pytest.raises(UserError, match=r"checkpoint-9 would stand among the checkpoints of a run"):
        list(export(run / "checkpoint-3", run / "checkpoint-9"))
    link, empty = tmp_path / "link", tmp_path / "empty"
    link.symlink_to(run / "checkpoint-3")
    assert "within" in next(taken(link / "out"))
    for target in (empty, tmp_path / "nowhere"):  # a link is told before anything is written, and stays
        empty.mkdir(exist_ok=True)
        link.unlink()
        link.symlink_to(target)
        assert [line.partition(", ")[0] for line in taken(link)] == [f"{link} is a link"]
    for out in (tmp_path / "checkpoint-9", tmp_path / "checkpoint-8/out"):  # of no run
        assert list(taken(out)) == []
        list(export(run / "checkpoint-3", out))
        assert weights.has_weights(out)


def spoiled(run, folder, value):
    """A copy of the run's checkpoint with `value` in one of its numbers."""
    checkpoint = folder / "checkpoint-3"
    shutil.copytree(run / "checkpoint-3", checkpoint)
    (checkpoint / "digests.json").unlink(missing_ok=True)
    state = weights.read(checkpoint / "transformer")
    state["head.head.bias"][1] = value
    weights.write_component(checkpoint / "transformer", state, configs.read_config(checkpoint / "transformer"))
    return checkpoint


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (7e4, r"head\.head\.bias has 70000, more than fp16 holds; give --dtype bf16"),
        (float("nan"), r"head\.head\.bias has 1 numbers that are not finite"),
        (float("inf"), r"head\.head\.bias has 1 numbers that are not finite"),
    ],
)
def test_finite_stays_finite_or_is_refused(value, words, run, tmp_path):
    checkpoint = spoiled(run, tmp_path, value)
    with pytest.raises(UserError, match=words):
        list(export(checkpoint, tmp_path / "out", dtype="fp16"))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]  # nothing partial is left
    if value == 7e4:
        list(export(checkpoint, tmp_path / "out", dtype="bf16"))
        assert weights.read(tmp_path / "out")["head.head.bias"][1] == torch.tensor(7e4).bfloat16()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_whole_numbers_stay_what_they_are(dtype):
    """In bf16 1001 is 1000."""
    counts, truths = torch.tensor([1001, 2**40 + 1]), torch.tensor([True, False])
    cast = Cast({"counts": counts, "truths": truths, "weight": torch.tensor([1.5])}, dtype)
    assert torch.equal(cast("counts"), counts) and cast("counts").dtype == torch.int64
    assert torch.equal(cast("truths"), truths) and cast("truths").dtype == torch.bool
    assert cast("weight").dtype == DTYPES[dtype] and not cast.problems


def test_another_tools_checkpoint(run, tmp_path):
    theirs = tmp_path / "checkpoint-50"
    shutil.copytree(run / "checkpoint-3" / "transformer", theirs / "transformer")
    (theirs / "scheduler.bin").write_bytes(b"theirs")
    list(export(theirs, tmp_path / "out", dtype="as_stored"))
    written, source = weights.read(tmp_path / "out"), weights.read(theirs / "transformer")
    assert written.keys() == source.keys() and all(torch.equal(written[name], source[name]) for name in source)


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("reeltune.export.streamed.write", full)
    with pytest.raises(UserError, match=r"out.*\n.*No space left.*GB free.*nothing is left of it"):
        list(export(run / "checkpoint-3", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
