"""Runs with `attention: auto`: the kernel that a trial finds, what checkpoints make of it, and what blocks ask."""

import json
from collections import Counter
from functools import partial

import pytest
import torch
from torch._dynamo import lookup_backend

from reeltune.checkpoint import digests
from reeltune.checkpoint.folder import progress_of
from reeltune.demo.main import FAMILIES
from reeltune.distributed.engine import choose_kernels
from reeltune.memory import attention, attention_trial, compiled, flash_4
from reeltune.memory.attention_trial import asked
from reeltune.training import attention_choice, loop
from reeltune.training.loop import train
from reeltune.training.warm_up import forward_pass
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.same_run import StopAfter, assert_equal, assert_same_end, assert_same_network, rows
from tests.runs.small_run import recipe

SHORT = {"max_train_steps": 2, "held_out_share": 0.0, "gradient_checkpointing": True}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "wan", "control_v1.1")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def math_is_sooner(monkeypatch):
    """The trial of a device with two kernels, of which the second takes half the time; returns the trials' calls."""
    trials = []

    def timed(calls, kernels):
        trials.append(calls)
        return {"flash": 2.0, "math": 1.0}[kernels[0]]

    monkeypatch.setitem(attention.CANDIDATES, "cpu", ("flash", "math"))
    monkeypatch.setattr(attention_trial, "_pass_s", timed)
    return trials


def told(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["text"] for line in lines if line["kind"] == "notice" and line["text"].startswith("attention is auto")]


def kernel_of(out):
    return json.loads((out / "run.json").read_text())["attention_kernel"]


def assert_other_bits(a, b, step):
    """In some of thousands of gradients' moments: a loss and a norm may be alike by chance."""
    states = (torch.load(out / f"checkpoint-{step}" / "optimizer.pt", weights_only=True) for out in (a, b))
    with pytest.raises(AssertionError):
        assert_equal(*states)


def never(*_):
    raise AssertionError("kernels were tried")


def test_a_cpu_has_nothing_to_try_and_the_bits_of_its_only_kernel(wan, data, tmp_path, monkeypatch):
    monkeypatch.setattr(attention_choice, "_trial", never)
    ours, flash, math = tmp_path / "ours", tmp_path / "flash", tmp_path / "math"
    assert train(recipe(wan, data, ours, **SHORT)) == 0
    assert told(ours) == [
        "attention is auto: flash computes it, the one kernel that torch has to try on a CPU",
    ]
    assert kernel_of(ours) == "flash" and progress_of(ours / "checkpoint-2").attention == ""
    assert train(recipe(wan, data, flash, **SHORT, attention="flash")) == 0
    assert_same_end(ours, flash, step=2)
    assert kernel_of(flash) == "flash" and told(flash) == []
    assert train(recipe(wan, data, math, **SHORT, attention="math")) == 0
    assert_other_bits(math, ours, step=2)  # or what follows would show nothing


@pytest.mark.slow
def test_what_the_trial_found_is_taken_and_a_resume_takes_it_untried(wan, data, tmp_path, math_is_sooner, monkeypatch):
    settings = {**SHORT, "max_train_steps": 4, "random_hw_adapt": True}
    plain, unbroken, ours = (tmp_path / name for name in ("plain", "unbroken", "ours"))
    assert train(recipe(wan, data, plain, **settings, attention="math")) == 0
    assert not math_is_sooner
    assert train(recipe(wan, data, unbroken, **settings)) == 0
    shapes = {tuple(row["shape"]) for row in rows(unbroken, ("step",))}
    F, H, W = max(shapes, key=lambda shape: shape[1] * shape[2])
    (line,) = told(unbroken)
    assert line == (
        "attention is auto: math computes it; forward and backward pass of it in all blocks, for "
        f"{F}x{H}x{W}: flash 2e+03 ms, math 1e+03 ms"
    )
    assert kernel_of(unbroken) == "math" and progress_of(unbroken / "checkpoint-4").attention == "math"
    assert rows(unbroken, ("step",)) == rows(plain, ("step",))
    assert_same_network(unbroken / "checkpoint-4", plain / "checkpoint-4")
    with StopAfter(2):
        assert train(recipe(wan, data, ours, **settings)) == 143
    monkeypatch.setitem(attention.CANDIDATES, "cpu", ("flash",))
    monkeypatch.setattr(attention_choice, "_trial", never)
    assert train(recipe(wan, data, ours, **settings, resume_from_checkpoint="latest")) == 0
    assert told(ours)[1:] == ["attention is auto: math computes it, as the checkpoint says"]
    assert_same_end(ours, unbroken, step=4)


@pytest.mark.slow
def test_compiled_blocks_have_it_too(wan, data, tmp_path, math_is_sooner, monkeypatch):
    monkeypatch.setattr(compiled, "inductor", lookup_backend("aot_eager"))
    settings = {**SHORT, "compile": "blocks", "max_train_steps": 1, "video_sample_n_frames": 1}  # of one size
    for name in ("auto", "math", "flash"):
        assert train(recipe(wan, data, tmp_path / name, **settings, attention=name)) == 0
    assert rows(tmp_path / "auto", ("step",)) == rows(tmp_path / "math", ("step",))
    assert_other_bits(tmp_path / "math", tmp_path / "flash", step=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "cudnn"}, "the checkpoint says cudnn, and a process has no such kernel on cpu; flash computes"),
        ({}, "auto: flash computes"),
    ],
    ids=["of another device", "from before"],
)
def test_a_checkpoint_without_a_kernel_that_is_there(changes, words, toy, data, tmp_path):
    with StopAfter(1):
        assert train(recipe(toy, data, tmp_path, **SHORT)) == 143
    file = tmp_path / "checkpoint-1/progress.json"
    table = json.loads(file.read_text())
    del table["attention"]
    file.write_text(json.dumps({**table, **changes}))
    (tmp_path / "checkpoint-1" / digests.NAME).unlink()
    assert train(recipe(toy, data, tmp_path, **SHORT, resume_from_checkpoint="latest")) == 0
    assert words in told(tmp_path)[1]
    assert progress_of(tmp_path / "checkpoint-2").attention == ""


def test_a_network_without_attention_is_left_alone(toy, data, tmp_path, math_is_sooner):
    assert train(recipe(toy, data, tmp_path, **SHORT)) == 0
    assert told(tmp_path)[0].endswith("ask for none that torch could compute by one kernel or another")
    assert not math_is_sooner and kernel_of(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "words", "installed"),
    [
        ({"encode_ahead": True}, "a kernel is chosen for the whole process, and encoders are at work meanwhile", False),
        ({"deterministic": True}, "deterministic is true, and timing them may find another one in another run", True),
    ],
    ids=str,
)
def test_where_none_can_be_chosen_that_is_told(changes, words, installed, toy, data, tmp_path, monkeypatch):
    monkeypatch.setitem(attention.CANDIDATES, "cpu", ("flash", "math"))
    monkeypatch.setattr(flash_4, "DEVICES", ("cpu",))
    monkeypatch.setattr(flash_4, "installed", lambda: "4.0.0" if installed else None)
    monkeypatch.setattr(attention_choice, "_trial", never)
    try:
        assert train(recipe(toy, data, tmp_path, **SHORT, **changes)) == 0
    finally:
        choose_kernels(deterministic=False)
    (line,) = told(tmp_path)
    assert line.startswith(f"attention is auto: torch chooses a kernel for each shape, and none is tried, as {words}")
    assert ("; flash_4, which is installed, " in line) is installed
    assert kernel_of(tmp_path) is None


def outline(call):
    """Strides may differ within a class: EasyAnimate's last blocks make keys of caption and clip by one layer."""
    return tuple((tuple(one.shape), one.dtype) for one in call.given), tuple(sorted(call.named)), mask_of(call)


def mask_of(call):
    mask = call.named.get("attn_mask")
    return None if mask is None else (tuple(mask.shape), mask.dtype)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    "name",
    [
        "wan_fun",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("easyanimate", "hunyuan_video", "cogvideox_fun")),
    ],
)
def test_what_one_block_of_a_kind_asks_all_of_them_ask(name, precision, wan, data, tmp_path, monkeypatch):
    found = []

    def look(run):
        turn = run.turns.now
        blocks, forward = turn.learner.network.attention.blocks, partial(forward_pass(run, 0), turn)
        own = [block.forward for block in blocks]
        at_once, one_by_one = asked(blocks, forward), [call for one in blocks for call in asked([one], forward)]
        assert own == [block.forward for block in blocks]
        found.extend((at_once, one_by_one))
        return 0

    monkeypatch.setattr(loop, "loop", look)
    (tmp_path / "model").mkdir()
    model = wan if name == "wan_fun" else FAMILIES[name].write(tmp_path / "model")
    assert train(recipe(model, data, tmp_path / "out", mixed_precision=precision, gradient_checkpointing=True)) == 0
    at_once, one_by_one = found
    assert 0 < len(at_once) < len(one_by_one) and all(call.times == 1 for call in one_by_one)
    counts = Counter()
    for call in at_once:
        counts[outline(call)] += call.times
    assert counts == Counter(map(outline, one_by_one))
    dtype = {"no": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {tensor.dtype for call in at_once for tensor in call.given} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip(at_once[0].given, one_by_one[0].given, strict=True))
