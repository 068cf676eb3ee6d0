"""The loop as a whole, on the toy family and on tiny Wan checkpoints."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reeltune.training.loop as module
from reeltune.checkpoint.folder import complete
from reeltune.config.recipe import Loss
from reeltune.core.errors import UserError
from reeltune.core.interrupt import Interrupt
from reeltune.diffusion.objective import Ddpm, Flow
from reeltune.distributed.engine import Stopwatch
from reeltune.run.model import with_levels
from reeltune.sampling.sample import Setup
from reeltune.training import loss as training_loss
from reeltune.training.learner import Learner
from reeltune.training.loop import train
from tests.distributed import processes
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set, recipe


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "wan", "control_t2v")


def steps(out):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "step"]


def weights(out, step):
    return load_file(next((out / f"checkpoint-{step}" / "transformer").glob("*.safetensors")))


def test_torch_may_warn_of_no_kernel_while_it_trains(wan, data, tmp_path, monkeypatch):
    """With `deterministic`: where it may, attention on a GPU has its gradients in no fixed order."""
    seen = {}

    def watched(name, of):
        def called(*given, **named):
            seen[name] = (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            return of(*given, **named)

        return called

    monkeypatch.setattr(module, "training_loss", watched("forward", module.training_loss))
    monkeypatch.setattr(Learner, "backward", watched("backward", Learner.backward))
    monkeypatch.setattr(Learner, "step", watched("step", Learner.step))
    monkeypatch.setattr(Setup, "encode", watched("encode", Setup.encode))
    try:
        train(recipe(wan, data, tmp_path / "run", train_mode="control", max_train_steps=1, deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == {**dict.fromkeys(("forward", "backward", "step"), (True, False)), "encode": (True, True)}


def test_a_run_leaves_what_it_promises(wan, data, reports, tmp_path):
    out = tmp_path / "run"
    with reports():
        assert train(recipe(wan, data, out, train_mode="control", preview_count=1, preview_steps=2)) == 0
    assert {path.name for path in out.iterdir()} >= {
        "recipe.yaml", "run.json", "metrics.jsonl", "ledger.json", "ledger.csv", "report.html", "first_batch",
        "previews", "validation", "checkpoint-2", "checkpoint-4", "checkpoint-6",
    }  # fmt: skip
    assert {path.name for path in (out / "first_batch").iterdir()} == {
        f"{i}_{part}" for i in range(2) for part in ("pixels.mp4", "control.mp4", "text.txt")
    }
    rows = steps(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        frames, height, width = row["shape"]
        assert row["samples"] == 2
        assert row["tokens"] == 2 * ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)
        parts = sum(row[name] for name in ("data_s", "encode_s", "forward_backward_s", "optimizer_s"))
        assert parts == pytest.approx(row["step_s"])
    released = load_file(wan / "diffusion_pytorch_model.safetensors")
    trained = weights(out, 6)
    assert {name: w.shape for name, w in trained.items()} == {name: w.shape for name, w in released.items()}
    assert any(not torch.equal(trained[name], released[name].float()) for name in released)
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["entries"] == ledger["used"] + ledger["held_out"] + ledger["not_reached"] + ledger["left_out"] == 9
    assert ledger["samples"] == 12


def test_batch_times_accumulation_is_the_bigger_batch(toy, data, tmp_path):
    """Two micro-steps of two are one of four: same samples, noise and drops, where the plan makes the same groups."""
    one_size = {"enable_bucket": False, "video_repeat": 0, "max_train_steps": 1, "held_out_share": 0.0}
    big, small = tmp_path / "big", tmp_path / "small"
    norms = []
    for out, batch, accumulate in ((big, 4, 1), (small, 2, 2)):
        settings = {"train_batch_size": batch, "gradient_accumulation_steps": accumulate, **one_size}
        plan_of_four = tmp_path / "four.json"
        rows = json.loads((data / "metadata_control.json").read_text())[:4]
        plan_of_four.write_text(json.dumps(rows))
        made = recipe(toy, data, out, train_data_meta=str(plan_of_four), num_train_epochs=1, **settings)
        with fixed_noise():
            assert train(made) == 0
        norms.append(steps(out)[0])
    assert norms[0]["loss"] == pytest.approx(norms[1]["loss"], rel=1e-6)
    assert norms[0]["grad_norm"] == pytest.approx(norms[1]["grad_norm"], rel=1e-5)


class fixed_noise:
    """Noise and drops by record instead of by place in the plan, which another batch size changes."""

    def __enter__(self):
        from dataclasses import replace

        from reeltune.data.loader import Reader

        self.reader, self.real = Reader, Reader.open

        def by_record(reader, draw, failures=()):
            return self.real(reader, replace(draw, seed=draw.record, frames=tuple(range(len(draw.frames)))), failures)

        Reader.open = by_record

    def __exit__(self, *_):
        self.reader.open = self.real


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(toy, data, tmp_path):
    """Same global batch: sizes, noise and drops do not depend on how many processes share it.
    tests/distributed/test_guides_parallel.py starts several by accelerate's own launcher."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert train(recipe(toy, data, alone, train_batch_size=4, held_out_share=0.0)) == 0
    processes.train([recipe(toy, data, together, train_batch_size=2, held_out_share=0.0)], 2, tmp_path / "told")
    for one, two in zip(steps(alone), steps(together), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert two["samples"] == one["samples"]
    assert (together / "ledger.json").read_text() == (alone / "ledger.json").read_text()


def test_only_what_the_pattern_names_moves(wan, data, tmp_path):
    out = tmp_path / "run"
    made = recipe(wan, data, out, train_mode="control", trainable_modules=["blocks.0.self_attn"], max_train_steps=2)
    train(made)
    released = load_file(wan / "diffusion_pytorch_model.safetensors")
    moved = {name for name, w in weights(out, 2).items() if not torch.equal(w, released[name].float())}
    assert moved
    assert all("blocks.0.self_attn" in name for name in moved)


@pytest.mark.slow
def test_gradient_checkpointing_changes_memory_not_numbers(wan, data, tmp_path):
    losses = []
    for on in (False, True, "attention_kept", "products_kept"):
        out = tmp_path / str(on)
        train(recipe(wan, data, out, train_mode="control", gradient_checkpointing=on, max_train_steps=2))
        losses.append([(row["loss"], row["grad_norm"]) for row in steps(out)])
    assert losses[0] == losses[1] == losses[2] == losses[3]


@pytest.mark.slow
def test_a_chosen_attention_kernel_is_told_and_kept_by_a_resume(wan, data, tmp_path, capsys):
    settings = {"train_mode": "control", "checkpointing_steps": 1, "attention": "math", "gradient_checkpointing": True}
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    train(recipe(wan, data, plain, **{**settings, "attention": "auto"}, max_train_steps=2))
    train(recipe(wan, data, whole, **settings, max_train_steps=2))
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("attention is computed by torch's kernel math, and no other") == 1  # of the second run
    assert [json.loads((out / "run.json").read_text())["attention"] for out in (plain, whole)] == ["auto", "math"]
    train(recipe(wan, data, parts, **settings, max_train_steps=1))
    train(recipe(wan, data, parts, **settings, max_train_steps=2, resume_from_checkpoint="latest"))
    assert steps(parts)[1]["loss"] == steps(whole)[1]["loss"]
    ours, theirs = (weights(out, 2) for out in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for one, other in zip(steps(whole), steps(plain), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    with pytest.raises(UserError, match=r"attention is efficient, a kernel that torch .* does not have on cpu"):
        train(recipe(wan, data, tmp_path / "no", **{**settings, "attention": "efficient"}))


def test_came_trains_in_adamws_place(toy, data, tmp_path, capsys):
    losses = []
    for on in (False, True):
        train(recipe(toy, data, tmp_path / str(on), use_came=on, max_train_steps=2, guidance_scale=75))
        losses.append([row["loss"] for row in steps(tmp_path / str(on))])
        told = " ".join(capsys.readouterr().out.split())
        assert told.count("token_sample_size is 32 and ") == told.count("guidance_scale is 75; the models' own") == 1
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def test_a_loss_that_is_not_finite_stops_the_run_with_a_record(toy, data, tmp_path, monkeypatch):
    real = training_loss.diffusion_loss

    def broken_at_3(*args, **kwargs):
        loss = real(*args, **kwargs)
        calls.append(1)
        return type(loss)(loss.value * (math.nan if len(calls) == 3 else 1), loss.level_B, loss.per_sample_B)

    calls = []
    monkeypatch.setattr(training_loss, "diffusion_loss", broken_at_3)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"the loss of step 2 is not finite.*checkpoint-2"):
        train(recipe(toy, data, out))
    record = json.loads((out / "non-finite-step-2.json").read_text())
    assert len(record["samples"]) == 2
    assert all(Path(sample["path"]).is_file() and 0 <= sample["level"] <= 1 for sample in record["samples"])
    assert [path.name for path in complete(out)] == ["checkpoint-2"]
    assert (out / "ledger.json").is_file()


def test_weights_that_were_not_finite_before_anything_was_learnt(toy, data, tmp_path):
    train(recipe(toy, data, tmp_path / "run", max_train_steps=1, held_out_share=0.0))
    (file,) = (tmp_path / "run/checkpoint-1/transformer").glob("*.safetensors")
    broken = {name: tensor * math.nan for name, tensor in load_file(file).items()}
    save_file(broken, tmp_path / "broken.safetensors")
    settings = {"transformer_path": str(tmp_path / "broken.safetensors"), "held_out_share": 0.0}
    with pytest.raises(UserError, match=r"step 0 is not finite.*nothing was learnt before it: see whether the weights"):
        train(recipe(toy, data, tmp_path / "next", **settings))


def test_a_file_that_breaks_later_is_stood_in_for_and_told(toy, tmp_path):
    data = data_set(tmp_path / "data")
    out = tmp_path / "run"
    train(recipe(toy, data, out, max_train_steps=1, max_bad_share=0.5, held_out_share=0.0))
    broken = data / "train" / "3.mp4"
    stamp = broken.stat()
    broken.write_bytes(b"\0" * stamp.st_size)
    os.utime(broken, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # so that the scan does not look again
    settings = {"max_bad_share": 0.5, "held_out_share": 0.0, "num_train_epochs": 2, "max_train_steps": None}
    (tmp_path / "again").mkdir()
    (out / "index").rename(tmp_path / "again" / "index")
    train(recipe(toy, data, tmp_path / "again", **settings))
    ledger = json.loads((tmp_path / "again" / "ledger.json").read_text())
    assert [(row["entry"], "could not be read" in row["reason"]) for row in ledger["problems"]] == [(3, True)]
    assert ledger["used"] + ledger["left_out"] + ledger["not_reached"] == 9
    assert ledger["failed_reads"] == 2

    (tmp_path / "strict").mkdir()
    (tmp_path / "again" / "index").rename(tmp_path / "strict" / "index")
    with pytest.raises(UserError, match="max_bad_share"):
        train(recipe(toy, data, tmp_path / "strict", **{**settings, "max_bad_share": 0.05}))


def test_a_full_disk_leaves_the_last_good_checkpoint(toy, data, tmp_path, monkeypatch):
    import errno

    from reeltune.families.toy import family

    real = family.FAMILY.save

    def full(folder, state, config, **kwargs):
        if "checkpoint-4" in str(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(folder, state, config, **kwargs)

    def found(*args, **kwargs):
        from dataclasses import replace

        chosen, mode, objective = choose(*args, **kwargs)
        return replace(chosen, save=full), mode, objective

    choose = module.choose_family
    monkeypatch.setattr(module, "choose_family", found)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"checkpoint-4 could not be written.*free space.*checkpoint-2"):
        train(recipe(toy, data, out))
    assert [path.name for path in complete(out)] == ["checkpoint-2"]
    assert not list(out.glob(".checkpoint*"))


def test_a_loss_type_that_the_checkpoint_was_not_trained_with_is_refused(toy, data, tmp_path):
    with pytest.raises(UserError, match="trained with flow"):
        train(recipe(toy, data, tmp_path / "run", loss_type="ddpm"))


def test_noise_levels_that_are_for_flow_alone_are_refused_elsewhere():
    asked = Loss(uniform_sampling=True, weighting_scheme="logit_normal", logit_mean=1.0)
    with pytest.raises(
        UserError, match=r"weighting_scheme is 'logit_normal', which is for flow(.|\n)*logit_mean is 1.0"
    ):
        with_levels(Ddpm(), asked)
    assert with_levels(Ddpm(), Loss(uniform_sampling=True)) == Ddpm(uniform_sampling=True)
    assert with_levels(Flow(shift=2.0), asked) == Flow(
        shift=2.0, uniform_sampling=True, weighting_scheme="logit_normal", logit_mean=1.0
    )


def test_a_mode_that_the_checkpoint_cannot_do_is_refused(wan, data, tmp_path):
    with pytest.raises(UserError, match=r"cannot do.*control"):
        train(recipe(wan, data, tmp_path / "run", train_mode="inpaint"))


def test_clips_that_would_be_cut_to_one_frame_are_refused(toy, data, tmp_path):
    with pytest.raises(UserError, match=r"n_frames is 4, of which toy could use 1; set it to 5 or more, or to 1"):
        train(recipe(toy, data, tmp_path / "run", video_sample_n_frames=4))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_remembered(number, code):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), number)
        assert interrupt.code == code
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_leaves_at_once():
    program = (
        "import os, signal, time\n"
        "from reeltune.core.interrupt import Interrupt\n"
        "with Interrupt():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("first\n", 130)


def test_a_stopwatch_splits_all_of_the_time(monkeypatch):
    clock = iter([100.0, 101.0, 103.0, 107.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stopwatch = Stopwatch(torch.device("cpu"))
    for name in ("a", "b", "a"):
        stopwatch.mark(name)
    assert stopwatch.seconds(["a", "b", "c"]) == {"a": 5.0, "b": 2.0, "c": 0.0}
