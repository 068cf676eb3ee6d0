"""What the card can do at best: matrix products, attention alone, copies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.report import Part, Row
from benchmarks.gpu.sizes import Scale
from benchmarks.gpu.timing import give_back, median_s
from reeltune.distributed.engine import peak_flops
from reeltune.families.wan_fun.family import CONTROL_V1_1
from reeltune.memory.attention import KERNELS, preferring

PRODUCT = "bf16 matrix product"
# GB/s of device memory: https://www.nvidia.com/en-us/data-center/h100, /h200, /a100 (SXM), and /l40s
BANDWIDTH = {"H100 80GB HBM3": 3350.0, "H200": 4800.0, "A100-SXM4-80GB": 2039.0, "L40S": 864.0}
COUNTS = {"warm_up": 3, "rounds": 10}


def measure(part: Part, scale: Scale, device: torch.device) -> None:
    with part.attempt(PRODUCT):
        part.row(PRODUCT, **_product(scale.matrix, device))
    for name, work, size_bytes in _copies(scale.copied_bytes, device):
        with part.attempt(name):
            part.row(name, gb_s=size_bytes / median_s(work, device, **COUNTS) / 1e9, bytes=size_bytes)
    with part.attempt("device memory by the data sheet"):
        part.row("device memory by the data sheet", gb_s=_bandwidth(device))
    for kernel in KERNELS:
        if kernel == "math" and not scale.is_rehearsal:
            continue  # it keeps a matrix of tokens times tokens
        for name, deterministic in ((kernel, False), (f"{kernel}, deterministic", True)):
            with part.attempt(f"attention alone, {name}"), same_bits(deterministic):
                part.row(f"attention alone, {name}", **_attention(kernel, scale, device))
            give_back(device)


@contextmanager
def same_bits(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _product(side: int, device: torch.device) -> Row:
    """Of random numbers: of zeros it is faster."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    flop_s = 2 * side**3 / median_s(lambda: a @ b, device, warm_up=5, rounds=20)
    sheet = peak_flops(device, torch.bfloat16)
    return {
        "tflops": flop_s / 1e12,
        "data_sheet_tflops": "unknown" if sheet is None else sheet / 1e12,
        "of_data_sheet": "unknown" if sheet is None else flop_s / sheet,
        "side": side,
    }


def _copies(size_bytes: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, work, bytes read and written on the device)"""
    there = torch.randint(0, 255, (size_bytes,), dtype=torch.uint8, device=device)
    yield "copy on the device, read and written", partial(torch.empty_like(there).copy_, there), 2 * size_bytes
    on_gpu = device.type == "cuda"
    locked = torch.empty(size_bytes // 4, dtype=torch.uint8, pin_memory=on_gpu)
    plain, part = torch.ones(size_bytes // 4, dtype=torch.uint8), there[: size_bytes // 4]
    yield "to the host, page-locked", partial(locked.copy_, part, non_blocking=True), len(part)
    yield "to the host, not page-locked", partial(plain.copy_, part), len(part)
    yield "from the host, page-locked", partial(part.copy_, locked, non_blocking=True), len(part)
    yield "from the host, not page-locked", partial(part.copy_, plain), len(part)


def _bandwidth(device: torch.device) -> float | str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((speed for card, speed in BANDWIDTH.items() if card in name), "unknown")


def _attention(kernel: str, scale: Scale, device: torch.device) -> Row:
    """Forward and backward pass of one layer of the first network over the clip's tokens."""
    network, tokens = next(iter(scale.networks.values())), CONTROL_V1_1.geometry.tokens(scale.clip)
    shape = 1, network.heads, tokens, network.head_width
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    products = 4 * tokens**2 * network.width  # FLOPs of two products
    try:
        with preferring([kernel]), warnings.catch_warnings(action="ignore"):  # why it is not there is told
            out = scaled_dot_product_attention(q, k, v)
            forward_s = median_s(lambda: scaled_dot_product_attention(q, k, v), device, warm_up=1, rounds=3)
            backward_s = median_s(lambda: _backward(out, [q, k, v]), device, warm_up=1, rounds=3)
            pairs = zip(*(_backward(out, [q, k, v]) for _ in range(2)), strict=True)
            repeats = all(torch.equal(one, other) for one, other in pairs)
    except RuntimeError as error:
        return {"not_there": str(error).splitlines()[0]}
    forward, backward = products / forward_s / 1e12, 2.5 * products / backward_s / 1e12
    same = "yes" if repeats else "NO"
    return {"forward_tflops": forward, "backward_tflops": backward, "backward_repeats": same, "tokens": tokens}


def _backward(out: Tensor, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients, by five products, one of them computed again (https://arxiv.org/abs/2307.08691, section 3.1)."""
    return torch.autograd.grad(out, given, out.detach(), retain_graph=True)
