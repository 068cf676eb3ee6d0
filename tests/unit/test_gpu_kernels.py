"""What a GPU's norms and AdamW make and keep, in a step that a CPU rehearses."""

from collections import Counter

import pytest
import torch
from diffusers.models.normalization import FP32LayerNorm
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from reeltune.estimate import gpu_kernels, memory_tracker
from reeltune.estimate.memory_tracker import Tracker
from reeltune.optim.optimizers import build_optimizer

ROWS, WIDTH = 32, 64
BF16, FP32 = torch.bfloat16, torch.float32
VECTORS, ROOTS = ((ROWS, WIDTH), BF16), ((ROWS, 1), FP32)
GAINS = (WIDTH,), BF16


def rms(dtype=BF16):
    return nn.RMSNorm(WIDTH, dtype=dtype)


def passed(norm, *, autocast=True):
    """(the norm's answer to bf16 numbers; shapes and types that it keeps; the gradients)."""
    gpu_kernels.compute_as_gpu(nn.Sequential(norm))
    x = torch.randn(ROWS, WIDTH, dtype=BF16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape), tensor.dtype
        return tensor

    with torch.autocast("cpu", BF16, enabled=autocast), saved_tensors_hooks(pack, lambda packed: packed):
        y = norm(x)
    grads = torch.autograd.grad(y.sum(), [x, *norm.parameters()])
    return y, Counter(kept.values()), [(tuple(grad.shape), grad.dtype) for grad in grads]


@pytest.mark.parametrize("autocast", [True, False])
def test_an_rms_norm_keeps_what_it_was_given(autocast):
    y, kept, grads = passed(rms(), autocast=autocast)
    assert y.dtype == BF16
    assert kept == Counter([VECTORS, GAINS, ROOTS])
    assert grads == [VECTORS, GAINS]


def test_a_frozen_rms_norm_has_no_gradient():
    norm = rms().requires_grad_(False)
    gpu_kernels.compute_as_gpu(norm)
    x = torch.randn(ROWS, WIDTH, dtype=BF16, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is None


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_of_weights_in_another_precision_there_is_no_fused_kernel():
    x, norm = torch.randn(ROWS, WIDTH, dtype=BF16), rms(FP32)
    expected = norm(x)
    gpu_kernels.compute_as_gpu(norm)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("learned", [True, False])
def test_a_layer_norm_is_computed_in_fp32_under_autocast(learned):
    y, kept, grads = passed(nn.LayerNorm(WIDTH, elementwise_affine=learned, dtype=BF16))
    assert y.dtype == FP32 and kept[(ROWS, WIDTH), FP32] == 1 and VECTORS not in kept
    assert grads == [VECTORS, *[GAINS] * 2 * learned]
    assert passed(nn.LayerNorm(WIDTH, dtype=BF16), autocast=False)[0].dtype == BF16


def test_a_norm_with_a_forward_pass_of_its_own_is_left_alone():
    norm = FP32LayerNorm(WIDTH, dtype=BF16)
    gpu_kernels.compute_as_gpu(norm)
    assert norm(torch.randn(ROWS, WIDTH, dtype=BF16)).dtype == BF16
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("as_gpu", [True, False])
def test_adamw_makes_nothing_beside_its_state(as_gpu, monkeypatch):
    monkeypatch.setattr(memory_tracker, "ROUND_BYTES", 1)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        weight = nn.Parameter(torch.empty(2**12, 2**10))
        weight.grad = torch.empty_like(weight)
    adam = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01}
    optimizer, tracker = build_optimizer([{"params": [weight], "rate": 1.0}], **adam), Tracker(fake)
    if as_gpu:
        gpu_kernels.step_as_gpu(optimizer)
    with tracker:
        optimizer.step()  # which makes the state
        with tracker.phase("step"):
            optimizer.step()
    beside = tracker.peaks["step"].get("step", 0)
    assert beside == 0 if as_gpu else beside >= weight.nbytes
