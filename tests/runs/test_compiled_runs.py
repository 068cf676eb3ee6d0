"""Runs whose blocks are compiled: what they compile, and where they end.

But for one that is slow, torch's own operators stand in for the compiler's code (`aot_eager`): all of the way there is
the same, and takes seconds.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from reeltune.core.errors import UserError
from reeltune.estimate.check import check
from reeltune.memory import compiled
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.same_run import assert_same_end, rows
from tests.runs.small_run import recipe

BLOCKS = {"compile": "blocks", "max_train_steps": 4, "checkpointing_steps": 3}  # of which a run is gone on with
OF_SIZES = {"random_hw_adapt": True, "training_with_video_token_length": True, "image_sample_size": 160}
ADAPTER = {"rank": 2, "lora_dropout": 0.2, "gradient_checkpointing": True, "blocks_to_swap": 1}
ADAPTER |= {"target_name": ["q", "ffn.0"]}  # layers alike beside them would only be compiled for longer


@pytest.fixture
def operators(monkeypatch):
    """In place of the compiler's code; returns the graphs that it was asked for."""
    from torch._dynamo import lookup_backend

    asked, made = [], lookup_backend("aot_eager")

    def inductor(graph, inputs):
        asked.append(graph)
        return made(graph, inputs)

    monkeypatch.setattr(compiled, "inductor", inductor)
    torch.set_num_threads(1)
    return asked


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "wan", "control_v1.1")


def gone_on_with(unbroken, out, *where, **settings):
    """The run in `unbroken`, from its checkpoint of step 3 on, as if it had ended there; which spares a run, and its
    compilations."""
    last = f"checkpoint-{settings['max_train_steps']}"
    shutil.copytree(unbroken, out, ignore=shutil.ignore_patterns(last, "ledger.json", "ledger.csv"))
    assert train(recipe(*where, out, **settings, resume_from_checkpoint="latest")) == 0
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == ["checkpoint-3", last]


def notices(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    told = [line["text"] for line in lines if line["kind"] == "notice"]
    return [text for text in told if "blocks are compiled" in text or "was compiled anew" in text]


@pytest.mark.slow
def test_a_compiled_run_is_the_run_and_its_checkpoint_has_the_same_names(operators, wan, data, tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    assert train(recipe(wan, data, plain, max_train_steps=4)) == 0
    assert not operators
    assert train(recipe(wan, data, ours, **BLOCKS)) == 0
    assert len(operators) == 1  # of all blocks
    assert [row.keys() for row in rows(ours)] == [row.keys() for row in rows(plain)]
    for a, b in zip(rows(ours, ("step", "validation")), rows(plain, ("step", "validation")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    a, b = (load_file(next((out / "checkpoint-4/transformer").glob("*.safetensors"))) for out in (ours, plain))
    assert a.keys() == b.keys()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (line,) = notices(ours)
    assert line.startswith(
        "the network's blocks are compiled: 1 compilation for 2 numbers of tokens, warmed up with 5x"
    )


@pytest.mark.slow
def test_sizes_share_a_compilation_and_a_resume_ends_in_the_same_bits(operators, wan, data, tmp_path):
    settings = {**BLOCKS, **OF_SIZES, **ADAPTER, "max_train_steps": 6}
    unbroken, ours = tmp_path / "unbroken", tmp_path / "ours"
    assert train(recipe(wan, data, unbroken, **settings)) == 0
    count = len(operators)
    (line,) = notices(unbroken)  # and none of what was compiled in a step
    assert f"{count} compilations for" in line
    assert len({tuple(row["shape"]) for row in rows(unbroken, ("step",))}) > 1
    gone_on_with(unbroken, ours, wan, data, **settings)
    assert len(operators) == 2 * count
    assert_same_end(ours, unbroken)


@pytest.mark.slow
def test_two_experts_share_a_compilation_and_a_resume_ends_in_the_same_bits(operators, data, tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "2.2_a14b_t2v")
    settings = {"fix_sample_size": (32, 48), "video_sample_n_frames": 1, "max_train_steps": 4}  # of one size
    both = {"expert": "both", "train_mode": "normal", "checkpointing_steps": 3, **settings}
    plain, unbroken, ours = (tmp_path / name for name in ("plain", "unbroken", "ours"))
    assert train(recipe(model, data, plain, **both)) == 0
    assert train(recipe(model, data, unbroken, compile="blocks", **both)) == 0
    count = len(operators)
    (line,) = notices(unbroken)
    assert line.startswith(f"both networks' blocks are compiled: {count} compilation") and count <= 2
    lines = map(json.loads, (unbroken / "metrics.jsonl").read_text().splitlines())
    assert {line["expert"] for line in lines if line["kind"] == "step"} == {"high", "low"}
    for a, b in zip(*(rows(out, ("step", "validation")) for out in (unbroken, plain)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    gone_on_with(unbroken, ours, model, data, compile="blocks", **both)
    assert_same_end(ours, unbroken, 4)


@pytest.mark.slow
def test_what_cannot_be_compiled_is_told_in_words(wan, data, tmp_path, monkeypatch):
    def broken(graph, inputs):
        raise ValueError("no such machine")

    monkeypatch.setattr(compiled, "inductor", broken)
    with pytest.raises(UserError, match=r"cannot compile WanTransformerBlock(.|\n)*set compile to none"):
        train(recipe(wan, data, tmp_path / "out", **BLOCKS))


def test_a_machine_without_a_compiler_is_told_before_networks_are_loaded(toy, data, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler, which CXX names, is not found; install"):
        train(recipe(toy, data, tmp_path / "out", **BLOCKS))
    assert not (tmp_path / "out/run.json").exists()
    with pytest.raises(UserError, match="no-such-compiler, which CXX names, is not found; install"):
        list(check(recipe(toy, data, tmp_path / "out", **BLOCKS)))


@pytest.mark.slow
def test_by_the_compiler_itself_a_run_ends_where_it_would_and_a_resume_in_the_same_bits(wan, data, tmp_path):
    torch.set_num_threads(1)
    plain, unbroken, ours = (tmp_path / name for name in ("plain", "unbroken", "ours"))
    settings = {**OF_SIZES, "max_train_steps": 6, "checkpointing_steps": 3}
    assert train(recipe(wan, data, plain, **settings)) == 0
    assert train(recipe(wan, data, unbroken, compile="blocks", **settings)) == 0
    gone_on_with(unbroken, ours, wan, data, compile="blocks", **settings)
    assert_same_end(ours, unbroken)
    for a, b in zip(rows(ours, ("step",)), rows(plain, ("step",)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
