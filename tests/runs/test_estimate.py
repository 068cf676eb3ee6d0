"""What `reeltune plan` foretells, against what then happens."""

import gc
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from reeltune.config.recipe import Recipe
from reeltune.core.types import Crop, Draw, Encoded, Shape
from reeltune.distributed.engine import Engine
from reeltune.estimate import estimator as estimator_module
from reeltune.estimate import memory_tracker
from reeltune.estimate.estimator import Estimator
from reeltune.estimate.fake_batch import empty_batch
from reeltune.estimate.result import StepEstimate
from reeltune.memory.size import size_bytes
from reeltune.run.model import choose_family, encode_options, load_parts
from reeltune.run.precision import encoder_dtype
from reeltune.sampling.sample import Setup
from reeltune.training.learner import learner_of
from reeltune.training.loss import training_loss
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import recipe

CAPTIONS = ["a red kite", "a dog on a beach"]
NEAR = 0.05  # the count and the allocator's
CPU = torch.device("cpu")


def draws(shape: Shape) -> list[Draw]:
    crop = Crop(shape.height, shape.width, 0, 0)
    return [Draw(0, shape, crop, tuple(range(shape.frames)), 0, seed) for seed in range(2)]


@dataclass
class Tiny:
    """A checkpoint, and what recipes for it say. Its steps are estimated by one Estimator for all tests, which computes
    anew only what a recipe changes; that this comes to the same is a test of its own."""

    folder: Path
    settings: dict[str, Any]
    estimators: dict[int, Estimator] = field(default_factory=dict)  # one for each context_parallel
    encodings: dict[Any, tuple[Encoded, dict[str, Tensor]]] = field(default_factory=dict)  # real ones

    def recipe(self, **more) -> Recipe:
        return recipe(self.folder, self.folder, self.folder / "out", **{**self.settings, **more})

    def estimate(self, shape: Shape, **more) -> StepEstimate:
        run = self.recipe(**more)
        count = run.parallel.context_parallel
        if count not in self.estimators:
            self.estimators[count] = Estimator(run, on_cpu=True)
        return self.estimators[count].step(run, draws(shape), CAPTIONS, preview=False)

    def encoded(self, run: Recipe, shape: Shape) -> tuple[Encoded, dict[str, Tensor]]:
        """What its frozen networks make of a batch, and the blank values beside."""
        key = shape, encoder_dtype(run)
        if key not in self.encodings:
            family, mode, objective = choose_family(run)
            parts = load_parts(run, family, CPU, network=False)
            setup = Setup(family, mode, parts, objective, options=encode_options(run))
            batch = empty_batch(family, mode, draws(shape), CAPTIONS, torch.no_grad())
            self.encodings[key] = setup.encode(batch), parts.null
        return self.encodings[key]


@pytest.fixture(scope="module", autouse=True)
def known():
    """What is there already is no garbage, which is looked for in each real step."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def any_tiny(any_checkpoint, tmp_path_factory):
    return Tiny(any_checkpoint.lay_out(tmp_path_factory.mktemp("any")), any_checkpoint.asked)


def control(tmp_path_factory, settings, **sizes):
    return Tiny(tiny_checkpoint(tmp_path_factory.mktemp("control"), "control_v1.1", **sizes), settings)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return control(tmp_path_factory, {"mixed_precision": "bf16"})


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return control(tmp_path_factory, {"mixed_precision": "bf16"}, width=96, heads=4)


@pytest.fixture(scope="module")
def lean(tmp_path_factory):
    settings = {"mixed_precision": "bf16", "trainable_modules": ["patch_embedding"]}
    return control(tmp_path_factory, settings, width=192, heads=4, layers=6)


class Allocated:
    """Bytes that the CPU's allocator gave within, less those it took back."""

    def __enter__(self):
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        events = self.profile.profiler.kineto_results.events()
        self.bytes = sum(event.nbytes() for event in events if event.name() == "[memory]")


def real_step(tiny: Tiny, run: Recipe, shape: Shape) -> dict[str, int]:
    """Bytes by part of a step with real weights, by the allocator's count."""
    encoded, null = tiny.encoded(run, shape)
    family, mode, objective = choose_family(run)
    engine = Engine(run.training.mixed_precision)
    parts = replace(load_parts(run, family, engine.device, encoders=False), null=null)
    setup = Setup(family, mode, parts, objective, engine.autocast, encode_options(run))
    checkpointing = run.training.gradient_checkpointing
    learner = learner_of(run, family, parts, engine, batch=2, accumulate=1)
    forward_pass = partial(training_loss, setup, learner.net, encoded, draws(shape), run.loss)
    forward_pass()  # what is made once and kept, such as tables
    gc.collect()
    with Allocated() as forward:
        loss = forward_pass()
    with Allocated() as backward:
        learner.backward(loss.value, last=True)
        del loss
    gradients = backward.bytes + forward.bytes  # all that the forward pass kept is gone
    with Allocated() as step:
        learner.step(0, 1e-3)
    recomputed = bool(checkpointing) * sum(type(module).__name__ in family.blocks for module in parts.net.modules())
    return {
        "weights": size_bytes([*parts.net.parameters(), *parts.net.buffers()]),
        "gradients": gradients,
        "state": step.bytes + gradients,
        "kept": forward.bytes - recomputed * torch.get_rng_state().nbytes,  # the host's, on a GPU too
    }


def compare(tiny: Tiny, monkeypatch, **settings) -> None:
    monkeypatch.setattr(memory_tracker, "ROUND_BYTES", 1)  # of this allocator
    shape = Shape(9, 32, 64)
    found, real = tiny.estimate(shape, **settings), real_step(tiny, tiny.recipe(**settings), shape)
    weights = found.peaks["step"]["weights"] + found.peaks["step"].get("still", 0)
    assert weights + found.swapped_bytes == pytest.approx(real["weights"], rel=NEAR)
    assert found.gradient_bytes == pytest.approx(real["gradients"], rel=NEAR)
    assert found.state_bytes == pytest.approx(real["state"], rel=NEAR)
    assert found.saved_bytes == pytest.approx(real["kept"], rel=NEAR)


@pytest.mark.quick_by_family("toy", "wan_fun")
@pytest.mark.first_by_network
@pytest.mark.parametrize(
    ("precision", "checkpointing"),
    [
        pytest.param("no", False, marks=pytest.mark.slow),
        ("bf16", True),
        pytest.param("bf16", "attention_kept", marks=pytest.mark.slow),
    ],
)
def test_an_estimate_counts_what_the_allocator_gives(any_tiny, precision, checkpointing, monkeypatch):
    settings = {"mixed_precision": precision, "gradient_checkpointing": checkpointing, "preview_count": 0}
    compare(any_tiny, monkeypatch, **settings, encoder_weights="bf16")  # the same in all three: encoded once


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {"base_weights": "fp8", "gradient_checkpointing": True},
                {"base_weights": "int8"},
                {"base_weights": "nf4"},
                {"blocks_to_swap": 2, "train_whole": ["patch_embedding"]},
                {"lora_init": "pissa"},
            )
        ),
        {"lora_init": "pissa", "base_weights": "int8", "blocks_to_swap": 2},
    ],
)
def test_adapters_take_what_the_allocator_gives(wide, settings, monkeypatch):
    compare(wide, monkeypatch, rank=8, **settings)


@pytest.mark.quick_by_family("toy", "hunyuan_video")
@pytest.mark.first_by_family
def test_fp16_takes_what_bf16_does_and_needs_no_gpu_to_be_counted(any_tiny):
    """Beneath adapters, whose base is kept in it."""
    in_fp16, in_bf16 = (
        any_tiny.estimate(Shape(5, 32, 32), mixed_precision=precision, rank=1) for precision in ("fp16", "bf16")
    )
    assert in_fp16 == in_bf16 and in_fp16.number_bytes == 2


@pytest.mark.slow
def test_what_recipes_have_in_common_is_computed_once(small, tmp_path):
    """And comes to what each of them takes by itself. A row changes one setting of each thing that is computed."""
    model = small.folder
    settings = {"mixed_precision": "bf16", "use_ema": True, "gradient_checkpointing": True}
    shape = Shape(5, 32, 32)
    base = recipe(model, tmp_path, tmp_path / "out", **settings)
    estimator = Estimator(base)
    estimator.step(base, draws(shape), CAPTIONS)
    changes = [
        {"gradient_checkpointing": False, "vae_mini_batch": 2},
        {"gradient_accumulation_steps": 2, "trained_weights": "bf16_stochastic", "vae_tiling": True, "low_vram": True},
        {"use_ema": False, "cache_folder": str(tmp_path / "cache"), "cache_variants": 1},
    ]
    for change in changes:
        run = recipe(model, tmp_path, tmp_path / "out", **{**settings, **change})
        alone, among_others = (one.step(run, draws(shape), CAPTIONS) for one in (Estimator(run), estimator))
        assert among_others == alone, change


@pytest.mark.slow
def test_a_batch_is_encoded_once_for_recipes_that_train_otherwise(small, tmp_path, monkeypatch):
    model, called = small.folder, []
    for name in ("encode", "decode", "training_step"):
        made = getattr(estimator_module, name)
        monkeypatch.setattr(estimator_module, name, lambda *a, n=name, f=made, **k: (called.append(n), f(*a, **k))[1])
    plain, other, visiting, recomputed = (
        recipe(model, tmp_path, tmp_path / "out", **more)
        for more in ({}, {"use_ema": True}, {"low_vram": True}, {"gradient_checkpointing": True})
    )
    estimator = Estimator(plain)
    for run in (plain, other, visiting, recomputed):
        estimator.step(run, draws(Shape(5, 32, 32)), CAPTIONS)
    step = "training_step"
    assert called == ["encode", step, "decode", step, "encode", "decode", step]
    called.clear()
    apart, together = (
        estimator.step(run, draws(Shape(5, 32, 32)), CAPTIONS)
        for run in (plain, recipe(model, tmp_path, tmp_path / "out", vae_mini_batch=2))
    )
    assert called == ["encode"]
    at_work = [found.peaks["encode"]["encode"] for found in (apart, together)]
    assert 1.7 < at_work[1] / at_work[0] < 2.3 and apart.peaks["forward"] == together.peaks["forward"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["use_came", "use_adafactor"])
def test_steps_inside_the_backward_pass_hold_no_full_set_of_gradients(small, optimizer):
    settings = {"trained_weights": "bf16_stochastic", optimizer: True}
    plain, inside = (small.estimate(Shape(5, 32, 32), step_in_backward=on, **settings) for on in (False, True))
    assert inside.state_bytes == plain.state_bytes
    assert inside.gradient_bytes == 0 < plain.gradient_bytes
    assert "gradients" not in inside.peaks["step"]
    assert plain.peaks["step"]["gradients"] == plain.gradient_bytes


@pytest.mark.slow
def test_blocks_that_are_swapped_are_on_the_host_and_two_at_a_time_here(lean, monkeypatch):
    monkeypatch.setattr(memory_tracker, "ROUND_BYTES", 1)
    shape = Shape(5, 32, 32)
    plain, swapped = (lean.estimate(shape, blocks_to_swap=n, gradient_checkpointing=True) for n in (0, 6))
    assert plain.still_blocks == 6
    assert (plain.swapped_bytes, swapped.swapped_bytes) == (0, 6 * 4 * plain.block_parameters)
    for phase in plain.peaks:
        gone = plain.peaks[phase]["still"] - swapped.peaks[phase]["still"]
        assert gone == swapped.swapped_bytes, phase
    both = swapped.peaks["forward"]["forward"] - plain.peaks["forward"]["forward"]
    assert both == pytest.approx(2 * 4 * plain.block_parameters, rel=0.1)  # a block at work, and the next


@pytest.mark.slow
def test_what_is_kept_is_counted_in_bytes_and_arithmetic(lean, monkeypatch):
    monkeypatch.setattr(memory_tracker, "ROUND_BYTES", 1)
    tokens, width, heads, layers, batch = 3 * 32 * 32 // 4, 192, 4, 6, 2  # more tokens than text and picture have
    ffn, others = 2 * width, 512 + 257  # tokens of caption and picture
    ways = (False, "products_kept", "attention_kept", True)
    none, products, kept, full = (lean.estimate(Shape(9, 256, 256), gradient_checkpointing=way) for way in ways)
    given = batch * tokens * width * 2  # in bf16
    sums = batch * heads * tokens * 4  # logarithms of sums of exponentials, in fp32
    assert kept.saved_bytes - full.saved_bytes == layers * (given + sums)
    made = batch * 2 * (tokens * (7 * width + ffn) + others * 2 * width)  # of others keys and values
    assert products.saved_bytes - kept.saved_bytes == layers * made
    assert products.saved_bytes < none.saved_bytes
    assert len({found.flops["forward"] for found in (none, products, kept, full)}) == 1
    more = [found.flops["backward"] - none.flops["backward"] for found in (products, kept, full)]
    assert more[2] - more[1] == layers * 4 * batch * tokens**2 * width
    once = 2 * batch * width * (tokens * (6 * width + 2 * ffn) + others * 2 * width)
    assert more[1] - more[0] == layers * once
    assert more[0] == layers * 4 * batch * tokens * others * width  # attention to text and picture


@pytest.mark.slow
def test_kernels_of_other_devices_are_counted_as_the_fused_one_here_and_math_as_itself(lean, monkeypatch):
    monkeypatch.setattr(memory_tracker, "ROUND_BYTES", 1)
    shape, found = Shape(9, 64, 96), {}
    for kernel in ("auto", "cudnn", "math"):
        found[kernel] = lean.estimate(shape, attention=kernel).saved_bytes
    assert found["cudnn"] == found["auto"] < found["math"]


def test_offloaded_activations_are_on_the_host_and_come_back(lean, monkeypatch):
    monkeypatch.setattr(memory_tracker, "ROUND_BYTES", 1)
    monkeypatch.setattr("reeltune.memory.blocks.LEAST_BYTES", 2**10)
    plain, away = (lean.estimate(Shape(9, 64, 96), offload_activations=on) for on in (False, True))
    assert plain.offloaded_bytes == 0
    assert away.saved_bytes < 0.2 * plain.saved_bytes
    assert away.offloaded_bytes > 0.8 * plain.saved_bytes
    assert away.peaks["backward"]["backward"] > 0  # they are on the device while they are needed


@pytest.mark.slow
def test_devices_that_share_a_clip_have_their_part_of_the_activations(lean, monkeypatch):
    monkeypatch.setattr(memory_tracker, "ROUND_BYTES", 1)
    alone, two, four = (lean.estimate(Shape(9, 128, 128), context_parallel=n) for n in (1, 2, 4))
    assert not torch.distributed.is_initialized()
    work = [found.flops["forward"] for found in (alone, two, four)]
    room = [found.peaks["forward"]["forward"] for found in (alone, two, four)]
    for one, half, quarter in (work, room):  # of what is divided; each has text whole
        assert (half - quarter) / (one - half) == pytest.approx(0.5, abs=0.1)
        assert half < 0.7 * one
    assert two.flops["encode"] == alone.flops["encode"]
