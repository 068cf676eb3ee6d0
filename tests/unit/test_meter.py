"""What a step costs and gives."""

from types import SimpleNamespace

import pytest
import torch

from reeltune.core.types import Progress, Shape
from reeltune.distributed.watchdog import Watchdog
from reeltune.training.meter import Meter

GEOMETRY = SimpleNamespace(tokens=lambda shape: shape.frames * 10)


@pytest.fixture
def meter():
    engine = SimpleNamespace(device=torch.device("cpu"), place=(0, 2), world=4, peak_memory_bytes=lambda: 7)
    return Meter(engine, Watchdog(0, 1, 60.0), GEOMETRY, samples=6, count_flops=True)


def test_a_row_is_of_all_passes_and_processes(meter):
    net, shape = torch.nn.Linear(3, 5, bias=False), Shape(4, 16, 16)
    for step in range(2):  # the second finds nothing of the first
        meter.begin(step)
        for loss in (1.0, 2.0):
            with meter.flops(shape):
                net(torch.ones(2, 3))
            meter.count(torch.tensor(loss + step), shape, samples=3)
    row = meter.row(Progress(step=2, epoch=1), torch.tensor(0.5), {"lr": 1e-3})
    assert row == {
        "step": 2,
        "epoch": 1,
        "loss": torch.tensor(2.5),
        "grad_norm": torch.tensor(0.5),
        "lr": 1e-3,
        "shape": [4, 16, 16],
        "samples": 6,
        "tokens": 2 * 40 * 3 * 2,  # of two passes, and of the two processes that have other samples
        "flops": 2 * 3 * (2 * 2 * 3 * 5) * 4,
        "peak_memory_bytes": 7,
    }


def test_a_stage_is_noted_at_its_start_and_timed_to_its_end(meter, monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 111.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter.begin(5)
    for name in ("data", "forward", "step"):
        with meter.stage(name):
            assert meter._watchdog.now == (name, 5)
    times = {"data_s": 1.0, "encode_s": 0.0, "forward_backward_s": 10.0, "optimizer_s": 100.0}
    assert meter.seconds()() == times


def test_a_stage_that_fails_stays_the_one_that_is_noted(meter):
    meter.begin(0)
    with pytest.raises(MemoryError), meter.stage("encode"):
        raise MemoryError
    assert meter._watchdog.now == ("encode", 0)
