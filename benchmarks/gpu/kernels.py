"""Where a step's time goes on the device: attention, matrix products, all else, and waiting for the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.report import Row
from benchmarks.gpu.timing import wait

LONGEST = 30  # kernels that are listed
T = TypeVar("T")
KINDS = {  # parts of the names that kernels and CPU operations have; the first kind that fits
    "attention": ("flash", "fmha", "sdpa", "scaled_dot_product", "cudnn::fusion"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "addmm", "::mm", "::bmm"),
    "compiled": ("triton_",),
    "copies": ("memcpy", "memset"),
}


def shares(work: Callable[[], T], device: torch.device, took_s: float) -> tuple[T, Row]:
    """What `work` gives, and of that call each kind's share of `took_s`, its seconds without the profiler, and the
    longest kernels.

    `idle` is what no kernel fills: the device waits for the host.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        given = work()
        wait(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    seconds: Counter[str] = Counter()
    calls_s: dict[str, list[float]] = {}  # by kernel
    for event in profiler.events() or ():
        if event.device_type != wanted:
            continue
        taken_s = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        seconds[_kind(event.name)] += taken_s
        calls_s.setdefault(event.name, []).append(taken_s)
    kernels = [
        {"kernel": name[:120], "seconds": sum(calls), "calls": len(calls), "longest_s": max(calls)}
        for name, calls in calls_s.items()
    ]
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    found: Row = {f"{kind}_share": seconds[kind] / took_s for kind in (*KINDS, "others")}
    idle = max(0.0, 1 - seconds.total() / took_s)
    return given, {**found, "idle_share": idle, "kernels": kernels[:LONGEST]}


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), "others")
