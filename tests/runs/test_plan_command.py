"""`reeltune plan` whole: what it prints and draws, that what it offers fits, and what is said when memory runs out."""

import math
import re
import shutil
import time
from copy import copy
from pathlib import Path

import pytest
import torch

from reeltune import cli
from reeltune.config.parse import build, flat, read
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.demo.main import FAMILIES as SHOWN
from reeltune.estimate import main as plan_main
from reeltune.estimate.machines import Machines
from reeltune.estimate.main import Forecast, forecast
from reeltune.estimate.page import rounded, size, write_page
from reeltune.estimate.remedies import Change, Offer
from reeltune.families import weights
from reeltune.run.data import gather
from reeltune.run.model import choose_family
from reeltune.training import loop as train
from reeltune.training import loss
from reeltune.training.learner import Learner
from tests.families.full_size import released, wan_checkpoint
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import data_set, recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint(folder / "model", "control_v1.1")
    data_set(folder / "data")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return SHOWN["toy"].write(tmp_path_factory.mktemp("toy"))


TOY = {"video_sample_n_frames": 9, "token_sample_size": 128, "video_sample_size": 128, "image_sample_size": 128}


@pytest.fixture(scope="module")
def whole(place, toy, tmp_path_factory) -> tuple[Recipe, Forecast]:
    """A run of the toy, and its forecast on a device that has room for it."""
    run = run_of(place, tmp_path_factory.mktemp("whole"), **{**TOY, "pretrained_model_name_or_path": str(toy)})
    return run, forecast(run, Machines(device="1GB"))


def run_of(place: Path, out: Path, **changes):
    return recipe(place / "model", place / "data", out, **{"mixed_precision": "bf16", "use_ema": True, **changes})


def unread(monkeypatch) -> None:
    """Whoever reads a weight fails."""
    read = weights._read

    def read_on_meta(path, device):
        assert device == "meta", f"{path} is read"
        return read(path, device)

    monkeypatch.setattr(weights, "_read", read_on_meta)


@pytest.mark.slow
def test_the_command_tells_all_and_draws_a_page(place, tmp_path, monkeypatch, capsys):
    unread(monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    settings = {"preview_count": 1, "use_ema": False, "engine": "zero2"}
    run, page = run_of(place, tmp_path / "out", **settings), tmp_path / "pages/plan.html"
    flags = [word for name, value in flat(run).items() if value not in (None, (), []) for word in as_flag(name, value)]
    code = cli.main(["plan", *flags, "--gpus", "2", "--device", "H100", "--html", str(page)])
    told, errors = capsys.readouterr()
    assert code == 0, errors
    family, mode, _ = choose_family(run)
    inputs = gather(run, family, mode, group=4, show_progress=False)
    plan = inputs.plan(0)
    assert re.search(rf"samples in the first epoch +{4 * len(plan)}\b", told)
    epochs = plan.epochs_within(6)
    share = plan.repeats(epochs) / (4 * plan.micro_steps_before(epochs))
    assert re.search(rf"repeats +{share:.1%} of the run's samples", told)
    assert re.search(r"steps +6\b", told)
    assert "ZeRO-2, sharded by arithmetic" in told
    assert "It fits." in told
    for words in ("gradients being exchanged", "frozen networks", "preview", "host:", "disk:"):
        assert words in told, words
    drawn = page.read_text()
    assert drawn.count("<svg") == 2
    assert "It fits." in drawn
    assert "H100" in drawn


def test_what_is_offered_stands_line_by_line_on_the_page(whole, tmp_path):
    _, plan = whole
    found = copy(plan)
    vars(found)["offers"] = [Offer(tuple(Change({name: 1}, "") for name in "ab"), plan.verdict, ("x<", "y"))]
    drawn = write_page(found, tmp_path / "plan.html").read_text()
    changed = [re.sub(r'class="\w+"', "", line) for line in drawn.splitlines() if '<td class="mono">' in line]
    takes = f"{size(plan.verdict.need_bytes)}, {size(plan.verdict.spare_bytes)} to spare"
    assert changed == [
        f'<tr><td >a: 1</td><td  rowspan="2">{takes}</td><td>x&lt;</td></tr>',
        "<tr><td >b: 1</td><td>y</td></tr>",
    ]
    assert [rounded(number) for number in (0.0123456, 5.678, 1834.2, 5621234.0)] == [
        "0.0123",
        "5.68",
        "1,830",
        "5,620,000",
    ]


def as_flag(name, value) -> list[str]:
    return [f"--{name}", *map(str, value)] if isinstance(value, list | tuple) else [f"--{name}={value}"]


def test_what_is_offered_fits_when_it_is_done(whole):
    run, plan = whole
    assert plan.verdict.safe
    assert not plan.offers
    tight = Machines(device=f"{plan.verdict.need_bytes * 0.75 / 1e9}GB")
    found = forecast(run, tight)
    assert not found.verdict.fits
    assert len(found.offers) >= 2
    for offer in found.offers:
        settings = {name: value for change in offer.changes for name, value in change.settings.items()}
        gpus = settings.pop("gpus", 1)
        done = forecast(build({**flat(run), **settings}), Machines(gpus, tight.device))
        assert done.verdict.safe, settings
        assert done.verdict.need_bytes == pytest.approx(offer.verdict.need_bytes, rel=0.05), settings


@pytest.mark.slow
def test_room_is_used_for_what_it_says_when_that_is_done(whole):
    run = build({**flat(whole[0]), "gradient_checkpointing": True, "low_vram": True})
    roomy, tight = (forecast(run, Machines(device=device)) for device in ("1GB", "0.0001GB"))
    assert tight.faster is None
    (change,) = roomy.faster.changes  # the toy has no encoders that could stay
    assert change.settings == {"gradient_checkpointing": False}
    done = forecast(build({**flat(run), **change.settings}), roomy.machines)
    assert done.faster is None
    assert done.verdict == roomy.faster.verdict != roomy.verdict
    spared = sum(roomy.largest_step.passes.values()) / sum(done.largest_step.passes.values()) - 1
    assert roomy.faster.prices[0] == f"{spared:+.0%} arithmetic in a step, the same result"
    assert 0.05 < spared < 0.34


def test_a_change_that_training_refuses_is_not_offered(whole):
    """Adapters of rank 32, which are larger than the toy's layers, on a device that nothing fits."""
    found = forecast(whole[0], Machines(device="0.0001GB"))
    assert not found.verdict.fits and not found.offers


@pytest.mark.slow
def test_encoding_beside_training_needs_the_memory_of_both(place, toy, tmp_path):
    own = {"pretrained_model_name_or_path": str(toy), "use_ema": False}
    both, apart, waits = (
        forecast(run_of(place, tmp_path / "out", **own, **more), Machines(device="1GB"))
        for more in ({}, {"encode_ahead": False}, {"low_vram": True, "save_in_background": False})
    )
    encoding = both.peaks["encode"]["encode"]
    assert encoding > 0
    for phase in ("forward", "backward", "step"):
        assert both.peaks[phase] == {**apart.peaks[phase], "encode": encoding}
        assert "encode" not in waits.peaks[phase]
    assert both.peaks["encode"] == apart.peaks["encode"]
    copies = "copies of what is saved, kept between saves"
    assert both.host_bytes[copies] == 4 * both.largest_step.trainable + both.largest_step.state_bytes
    assert copies not in waits.host_bytes
    tight = Machines(device=f"{(both.verdict.need_bytes - encoding / 2) / 1e9}GB")
    offers = forecast(run_of(place, tmp_path / "out", **own), tight).offers
    assert {"encode_ahead": False} in [change.settings for offer in offers for change in offer.changes]


@pytest.mark.parametrize(
    ("machines", "words"),
    [(Machines(gpus=0), "gpus is 0; it must be at least 1"), (Machines(device="80 MB"), "not one of B200")],
)
def test_machines_that_there_are_not_are_refused(place, tmp_path, machines, words):
    with pytest.raises(UserError, match=words):
        forecast(run_of(place, tmp_path / "out"), machines)


@pytest.mark.slow
@pytest.mark.golden("released_keys/Wan2.1-Fun-1.3B-Control.json.gz", "released_keys/umt5-xxl-enc.json.gz")
def test_a_released_size_without_its_weights(goldens, tmp_path, monkeypatch):
    """1.3 B parameters in files of nothing but holes: what AdamW in fp32 takes, and an outline of the time."""
    unread(monkeypatch)
    name = "Wan2.1-Fun-1.3B-Control"
    (folder := tmp_path / "model").mkdir()
    wan_checkpoint(folder, goldens, name)
    data = data_set(tmp_path / "data", clips=2, stills=0)
    settings = {"mixed_precision": "bf16", "low_vram": True, "gradient_checkpointing": True, "held_out_share": 0.0}
    run = recipe(folder, data, tmp_path / "out", fix_sample_size=(32, 32), **settings)  # of one size
    began = time.process_time()
    found = forecast(run, Machines(device="A100"))
    assert time.process_time() - began < 60
    psi = sum(torch.Size(shape).numel() for shape in released(goldens, name).values())
    assert found.largest_step.trainable == psi
    step = found.peaks["step"]
    for part, size_bytes in (("weights", 4 * psi), ("gradients", 4 * psi), ("optimizer", 8 * psi)):
        assert step[part] == pytest.approx(size_bytes, rel=0.001), part
    text = sum(torch.Size(shape).numel() for shape in released(goldens, "umt5-xxl-enc").values())
    assert found.largest_step.weight_bytes["text"] == pytest.approx(2 * text, rel=0.01)
    seen = found.data.buckets[0].tokens * len(found.draws)
    tokens = seen + 512 * len(found.draws)
    forward = found.largest_step.flops["forward"]
    assert 2 * psi * seen < forward < 2 * psi * tokens  # text passes some of it
    assert found.largest_step.flops["backward"] == pytest.approx(3 * forward, rel=0.05)  # and forward once more


LARGE = "Wan2.1-Fun-V1.1-14B-Control"


def of_14_billion(goldens, folder, recipe_name):
    """That recipe at 81 frames of 832 x 480, of a checkpoint whose weights are holes."""
    (model := folder / "model").mkdir()
    data = data_set(folder / "data", clips=2, stills=0, frames=81)
    where = {
        "pretrained_model_name_or_path": str(wan_checkpoint(model, goldens, LARGE)),
        "train_data_dir": str(data),
        "train_data_meta": str(data / "metadata_control.json"),
        "output_dir": str(folder / "out"),
        "video_sample_stride": 1,
        "fix_sample_size": [480, 832],
        "held_out_share": 0.0,
    }
    return build(read(str(RECIPES / f"{recipe_name}.yaml")), where)


@pytest.mark.golden(f"released_keys/{LARGE}.json.gz")
@pytest.mark.slow
def test_all_of_14_billion_parameters_on_80_gigabytes(goldens, tmp_path, monkeypatch):
    """81 frames of 832 x 480, by the recipe made for it; by the plain one no, by far."""
    unread(monkeypatch)
    found = forecast(of_14_billion(goldens, tmp_path, "wan2.1_fun_v1.1_14b_control_80gb"), Machines(device="H100"))
    assert found.data.buckets[0].tokens == 32760
    assert found.largest_step.trainable == sum(torch.Size(s).numel() for s in released(goldens, LARGE).values())
    assert found.verdict.safe
    assert found.verdict.need_bytes < 70e9
    # Recomputed once, then two products for each of the forward pass; in attention five for its two.
    assert 3.2 < found.step_flops["backward"] / found.step_flops["forward"] < 3.4


@pytest.mark.golden(f"released_keys/{LARGE}.json.gz")
@pytest.mark.slow
def test_adapters_of_14_billion_parameters_on_24_gigabytes(goldens, tmp_path, monkeypatch):
    """81 frames of 832 x 480, over a base in int8 whose blocks wait on the host."""
    unread(monkeypatch)
    run = of_14_billion(goldens, tmp_path, "wan2.1_fun_v1.1_14b_control_lora_24gb")
    found = forecast(run, Machines(device="24GB"))
    shapes = {name: shape for name, shape in released(goldens, LARGE).items() if name.startswith("blocks.")}
    linear = [shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    assert found.largest_step.trainable == 32 * sum(map(sum, linear))
    assert found.data.buckets[0].tokens == 32760
    assert found.verdict.safe
    assert found.verdict.need_bytes < 17e9
    on_the_host = found.host_bytes["weights of swapped blocks"]
    assert on_the_host == pytest.approx(sum(math.prod(shape) for shape in linear), rel=0.01)  # a byte each


@pytest.mark.parametrize(
    ("settings", "machines", "words"),
    [
        ({}, Machines(gpus=10**6), "gpus is 1000000; it must be at least 1 and at most 16,384"),
        ({"context_parallel": 2}, Machines(gpus=3), "gpus is 3 and context_parallel is 2.*give 4"),
        ({"step_in_backward": True}, Machines(gpus=2), "step_in_backward is True and gpus is 2.*plan for one"),
        ({}, Machines(throughput_tflops=-3), "throughput is -3 TFLOP/s; it must be more than 0"),
        ({}, Machines(throughput_tflops=float("nan")), "throughput is nan"),
        ({}, Machines(throughput_tflops=3, measured=Path("x")), "leave one out"),
        ({}, Machines(device="0GB"), "not one of B200"),
        ({}, Machines(measured=Path("none")), r"has no metrics\.jsonl"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_its_remedy(place, tmp_path, monkeypatch, settings, machines, words):
    monkeypatch.setattr(plan_main, "Estimator", None)  # before anything is estimated
    with pytest.raises(UserError, match=words):
        forecast(run_of(place, tmp_path / "out", **settings), machines)


def spoilt(name, run, folder):
    """What is wrong with the run, done to copies of its files: flags."""
    model = shutil.copytree(run.model.pretrained_model_name_or_path, folder / "model")
    meta, flags = folder / "metadata.json", [f"--pretrained_model_name_or_path={model}"]
    if name == "no entries":
        meta.write_text("[]")
        flags.append(f"--train_data_meta={meta}")
    elif name == "no weights":
        (model / "diffusion_pytorch_model.safetensors").unlink()
    elif name == "config":
        (model / "config.json").write_text("{")
    elif name == "no model":
        shutil.rmtree(model)
    else:
        flags += name.split()
    return flags


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no entries", "metadata.json"),
        ("no weights", "supported family"),
        ("config", "is not JSON"),
        ("no model", "model"),
        ("--gpus abc", "--gpus is 'abc'; expected a whole number"),
        ("--gpus", "--gpus expected one argument"),
        ("--gpus 2 --engine zero9", "zero9"),
        ("--gpus 2 --engine fsdp --use_came true", "use_came is true and engine is fsdp"),
        ("--device H10", "'H10', not one of B200"),
        ("--video_sample_size 100000 --image_sample_size 100000", "GB of pixels before anything"),
    ],
)
def test_bad_inputs_are_told_without_a_traceback(place, tmp_path, capsys, name, words):
    run = run_of(place, tmp_path / "out", use_ema=False)
    flags = [word for key, value in flat(run).items() if value not in (None, (), []) for word in as_flag(key, value)]
    assert cli.main(["plan", *flags, *spoilt(name, run, tmp_path)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


# ---- when memory runs out all the same


def test_a_full_device_is_explained_at_step_0(place, toy, tmp_path, monkeypatch):
    settings = {"mixed_precision": "bf16", "low_vram": True, "token_sample_size": 64, "video_sample_size": 64}
    run = recipe(toy, place / "data", tmp_path / "out", **settings)
    family, mode, _ = choose_family(run)
    plan = gather(run, family, mode, show_progress=False).plan(0)
    largest = max((step[0].shape for step in plan), key=family.geometry.tokens)
    seen = []

    def full(*args, **kwargs):
        seen.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

    monkeypatch.setattr(loss, "diffusion_loss", full)
    with pytest.raises(UserError) as told:
        train.train(run)
    words = str(told.value)
    assert "the forward and backward pass of step 0" in words
    assert f"at {largest.frames} frames of {largest.width} x {largest.height}" in words
    assert "activations and gradients grew" in words
    assert "the cheapest first: train_batch_size: 1, gradient_accumulation_steps: 2; " in words
    assert "gradient_checkpointing: true" in words
    assert "low_vram" not in words  # it is on
    assert "encode_ahead" not in words  # so this is off
    assert len(seen) == 1
    monkeypatch.undo()
    monkeypatch.setattr(Learner, "step", full)
    with pytest.raises(UserError, match=r"in the optimizer's step of step 0.*weights 0\.0 GB, gradients 0\.0 GB"):
        seen.append(train.train(recipe(toy, place / "data", tmp_path / "other", **settings)))
    settings["low_vram"] = False
    with pytest.raises(UserError, match="first: encode_ahead: false; low_vram: true; cache_folder"):
        train.train(recipe(toy, place / "data", tmp_path / "third", **settings))
