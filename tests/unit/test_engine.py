"""What an engine says of its device, and what it tells torch of it."""

import os
from types import SimpleNamespace

import pytest
import torch

from reeltune.core.errors import UserError
from reeltune.core.types import Shape
from reeltune.distributed.engine import Engine, choose_kernels, peak_flops
from reeltune.training import duties


@pytest.mark.parametrize(
    ("told", "device"), [("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")], ids=["one", "of several", "cpu"]
)
def test_a_gpu_has_its_number(told, device, monkeypatch):
    """accelerate gives the only GPU none; torch.cuda.set_device, which the writer of checkpoints calls, wants one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    engine = Engine.__new__(Engine)
    engine.accelerator = SimpleNamespace(device=torch.device(told))
    assert engine.device == torch.device(device)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("allowed", [False, True])
def test_tf32_is_of_products_and_convolutions_alike(allowed, kernels):
    torch.backends.cudnn.allow_tf32 = not allowed
    choose_kernels(allow_tf32=allowed)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)


def test_deterministic_kernels_are_those_of_the_run_alone(kernels):
    Engine(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    Engine()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_trains_is_refused_what_has_no_such_kernel(kernels):
    """And warned of nothing: torch's attention takes its gradients' fixed order then alone."""
    engine = Engine(deterministic=True)
    with pytest.raises(UserError, match=r"deterministic is true, and torch .*put_ does not have.*to false"):  # noqa: SIM117
        with engine.same_bits():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(RuntimeError, match="of another kind"), engine.same_bits():
        raise RuntimeError("of another kind")
    with Engine().same_bits():
        assert not torch.are_deterministic_algorithms_enabled()
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA T4", None),
    ],
)
def test_a_cards_peak_is_its_data_sheets(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak = peak_flops(torch.device("cuda", 0), torch.bfloat16)
    assert peak == (None if tflops is None else tflops * 1e12)


def test_a_loss_is_looked_at_when_it_has_come_to_the_host(monkeypatch):
    """Not on the device, where that would wait for the step under way."""
    done = []

    class Event:
        def record(self):
            done.append("sent")

        def synchronize(self):
            done.append("there")

    class OnDevice:
        is_cuda = True

        def to(self, place, *, non_blocking):
            assert (place, non_blocking) == ("cpu", True)
            return torch.tensor(1.0)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    kept = duties.Duties.__new__(duties.Duties)
    kept.unseen = None
    kept.check_finite(SimpleNamespace(mean=OnDevice()))
    assert done == ["sent"]
    kept.check_finite(None)
    assert done == ["sent", "there"] and kept.unseen is None


def test_a_compilation_is_told_of_the_clip_that_it_came_with_and_of_none_before_the_first():
    told = []
    kept = duties.Duties.__new__(duties.Duties)
    kept.log, kept.compiled, kept.compilations = SimpleNamespace(warn=told.append), [SimpleNamespace(count=3)], 2
    for kept.shape in (None, Shape(5, 32, 48), Shape(5, 64, 64)):
        kept._tell_compilations()
    assert told == ["5x32x48 was compiled anew, in its step; that makes 3 compilations"]
