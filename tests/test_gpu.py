"""What must hold on a GPU. The code that this calls is rehearsed on the CPU in tests/runs/test_gpu_benchmark.py."""

import os
from contextlib import contextmanager

import pytest
import torch

from benchmarks import parity_wan
from benchmarks.gpu import exact, forecast, networks, processes
from benchmarks.gpu.goldens import GOLDENS, rows_of
from benchmarks.gpu.sizes import FULL, TINY, Network
from benchmarks.gpu.step import Step, draw_of, recipe_of
from benchmarks.gpu.timing import give_back
from reeltune.core.types import Batch, Shape
from reeltune.demo.checkpoint import write_checkpoint
from reeltune.demo.clips import write_data_set
from reeltune.estimate.estimator import Estimator
from reeltune.memory import attention, flash_4
from reeltune.memory.attention_trial import Call, soonest, tried
from reeltune.memory.quantized import QuantizedLinear
from reeltune.run.model import choose_family, load_parts
from tests.families.tiny_wan import tiny_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
CUDA = torch.device("cuda", 0)
SMALL = Network(heads=4, ffn=256, layers=6, head_width=64)
ADAPTER = {"rank": 4, "base_weights": "int8"}
COMPILED = {"compile": "blocks"}
FLASH_4 = {"attention": "flash_4"}
WITH_FLASH_4 = pytest.mark.skipif(flash_4.installed() is None, reason="flash-attn-4 is not installed")
KEPT, PRODUCTS = ({"gradient_checkpointing": kept} for kept in ("attention_kept", "products_kept"))


@pytest.fixture(scope="module", autouse=True)
def workspace():
    """Matrix products that give the same bits each time, where a recipe asks for them: said before the first one."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
    os.environ.update({} if before is None else {"CUBLAS_WORKSPACE_CONFIG": before})


@pytest.fixture(autouse=True)
def any_kernels():
    """A recipe with `deterministic` is no matter of the next test."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return networks.checkpoint(tmp_path_factory.mktemp("hollow"), SMALL, TINY.encoders)


def a_step(checkpoint, **changes):
    return Step(recipe_of(checkpoint, **changes), SMALL, TINY)


@contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        KEPT,
        PRODUCTS,
        {"gradient_checkpointing": False, "trained_weights": "fp32"},
        {"attention": "flash"},
        {"attention": "efficient"},
        ADAPTER,
        {**ADAPTER, "blocks_to_swap": 3},
        {**PRODUCTS, **COMPILED},
        {**ADAPTER, **COMPILED},
        {"offload_activations": True},
    ],
    ids=str,
)
def test_the_host_does_not_wait_within_a_step(checkpoint, changes):
    steps = a_step(checkpoint, **changes)
    steps()  # makes what is made once
    with no_waiting():
        loss = steps()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("kernel", attention.TORCHS)
def test_torch_has_every_kernel_of_attention(kernel):
    attention.refuse_missing(kernel, CUDA, torch.bfloat16)


def test_a_trial_of_kernels_takes_one_that_is_there():
    made = torch.Generator(CUDA).manual_seed(0)
    given = [torch.randn(1, 12, 4096, 128, generator=made, device=CUDA, dtype=torch.bfloat16) for _ in range(3)]
    found = tried([Call((given[0], given[1], given[2]), {}, 1)], attention.candidates("cuda"))
    assert "flash" in found.passes_s and {*found.passes_s, *found.left_out} == {*attention.candidates("cuda")}
    assert soonest(found.passes_s) in found.passes_s and all(found.left_out.values())
    assert all(0 < seconds < 0.5 for passes in found.passes_s.values() for seconds in passes)


def weights_and_losses(checkpoint, **changes):
    steps = a_step(checkpoint, **changes)
    losses = torch.stack([steps() for _ in range(3)])
    return {name: weight.detach().clone() for name, weight in steps.learner.weights().items()}, losses


@pytest.mark.parametrize(
    ("plain", "spared"),
    [
        (ADAPTER, {**ADAPTER, "blocks_to_swap": 3}),
        (ADAPTER, {**ADAPTER, "blocks_to_swap": 6}),
        ({}, {"gradient_checkpointing": False}),
        ({}, KEPT),
        ({}, PRODUCTS),
        (ADAPTER, {**ADAPTER, **PRODUCTS}),
        pytest.param(FLASH_4, {**FLASH_4, **KEPT}, marks=WITH_FLASH_4),
        ({}, {"offload_activations": True}),
    ],
    ids=str,
)
def test_sparing_memory_changes_no_bit(checkpoint, plain, spared):
    (ours, our_losses), (theirs, their_losses) = (
        weights_and_losses(checkpoint, deterministic=True, **changes) for changes in (plain, spared)
    )
    assert torch.equal(our_losses, their_losses)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("plain", "changed"),
    [
        ({}, {"attention": "flash"}),
        ({}, {"attention": "efficient"}),
        ({}, {"attention": "math"}),
        pytest.param({}, FLASH_4, marks=WITH_FLASH_4),
        pytest.param(PRODUCTS, {**PRODUCTS, **COMPILED, **FLASH_4}, marks=WITH_FLASH_4),
        (PRODUCTS, {**PRODUCTS, **COMPILED}),
        (ADAPTER, {**ADAPTER, **COMPILED}),
    ],
    ids=str,
)
def test_other_code_for_a_step_rounds_alone_otherwise(checkpoint, plain, changed):
    (ours, our_losses), (theirs, their_losses) = (
        weights_and_losses(checkpoint, **changes) for changes in (plain, changed)
    )
    torch.testing.assert_close(our_losses, their_losses, rtol=2e-3, atol=0)
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("recipe", ["bf16", "bf16, compiled"])
def test_a_killed_run_ends_in_the_bits_of_others(recipe, tmp_path):
    meta, _ = write_data_set(tmp_path / "data", clips=4, stills=0, held_out=1)
    found = exact.Runs(write_checkpoint(tmp_path / "model"), meta, tmp_path, recipe, deterministic=True)
    told = found.compared(timeout_s=240)
    assert told["repeat_equal"] == told["resume_equal"] == "yes"


@pytest.mark.parametrize("file", parity_wan.golden_files(GOLDENS), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_parity_in_float32(file):
    found = rows_of(parity_wan, file, CUDA)
    assert found and [row for row in found if not row.ok] == []


def test_pixels_have_the_bits_of_a_cpu():
    """CLIP's pictures are cut to 8 bits again, where an ulp is a whole value."""
    every_u8 = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16)
    batch = Batch(draws=[], text=[], pixels_BFCHW=every_u8, ref_frame_B=torch.zeros(1, dtype=torch.int64), keep={})
    assert torch.equal(batch.to(CUDA).pixels_BFCHW.cpu(), batch.to("cpu").pixels_BFCHW)


@pytest.mark.parametrize("changes", [{}, KEPT, PRODUCTS, ADAPTER], ids=str)
def test_plan_tells_the_memory_of_a_step(changes, tmp_path):
    network, clip = Network(heads=12, ffn=8960, layers=4), Shape(17, 480, 832)
    scale = FULL.__class__(**{**vars(FULL), "networks": {"a": network}, "clip": clip})
    recipe = recipe_of(networks.checkpoint(tmp_path, network, FULL.encoders), **changes)
    told = Estimator(recipe).step(recipe, [draw_of(clip)], ["a kite"], preview=False)
    give_back(CUDA)
    steps = Step(recipe, network, scale)
    steps()
    torch.cuda.reset_peak_memory_stats(CUDA)
    steps()
    real = torch.cuda.max_memory_allocated(CUDA)
    del steps
    give_back(CUDA)
    assert max(sum(parts.values()) for parts in told.peaks.values()) == pytest.approx(real, rel=forecast.NEAR)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_base_has_the_bits_of_every_device(kind, tmp_path):
    model = tiny_checkpoint(tmp_path, "control_v1.1", width=96, heads=4)
    recipe = recipe_of(model, rank=4, base_weights=kind)
    family, _, _ = choose_family(recipe)
    loaded = [load_parts(recipe, family, place, encoders=False).net for place in (CUDA, torch.device("cpu"))]
    ours, theirs = ([layer for layer in net.modules() if isinstance(layer, QuantizedLinear)] for net in loaded)
    assert ours and all(layer.weight.is_cuda and layer.scale.is_cuda for layer in ours)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.dequantized(torch.bfloat16).cpu(), other.dequantized(torch.bfloat16))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_one_process_trains_over_nccl(wrapper):
    words = [*processes.TORCHRUN, "-m", processes.MODULE, wrapper]
    assert processes.run(words, CUDA, timeout_s=180)["backend"] == "nccl"
