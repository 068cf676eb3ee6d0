"""Which kernel computes a network's attention the soonest: tried on what its blocks ask in one pass."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from reeltune.memory.attention import in_order, preferring
from reeltune.memory.flash_4 import ARGUMENTS, autocast

SECONDS, ROUNDS = 2.0, 20  # after which a trial ends, once each kernel was timed
NEAR = 1.03  # of the least median, up to which the order of kernels decides, and not noise
TITLES = {"flash": "flash attention", "cudnn": "cudnn attention", "efficient": "memory efficient"}
"""How torch begins the line after which it says why a kernel is not taken (pytorch, aten/src/ATen/native/transformers/
cuda/sdp_utils.cpp)."""


@dataclass(frozen=True)
class Call:
    """What a block asks of attention, and how many blocks ask it."""

    given: tuple[Tensor, Tensor, Tensor]  # query, key and value, each B heads L D
    named: Mapping[str, Any]  # a mask, and the like
    times: int

    @property
    def products(self) -> int:
        """What the time grows with: numbers of the query times keys."""
        return self.given[0].numel() * self.given[1].shape[-2]

    def run(self) -> None:
        """Forward and backward pass."""
        query, key, value = leaves = [tensor.detach().requires_grad_() for tensor in self.given]
        with torch.enable_grad():
            answer = scaled_dot_product_attention(query, key, value, **self.named)
            torch.autograd.grad(answer, leaves, answer.detach())


@dataclass(frozen=True)
class Trial:
    """What a trial found. passes_s: kernel -> seconds of forward and backward passes, each of the attention of all
    blocks; none if nothing else was left to be sooner. left_out: kernel -> why it cannot be had."""

    passes_s: dict[str, list[float]]
    left_out: dict[str, str]


def median_s(passes_s: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {kernel: statistics.median(seconds) for kernel, seconds in passes_s.items() if seconds}


def soonest(passes_s: Mapping[str, Sequence[float]]) -> str | None:
    """The first kernel whose median is within NEAR of the least; the only one, if there is one; or None."""
    if len(passes_s) < 2:
        return next(iter(passes_s), None)
    medians = median_s(passes_s)
    return next(kernel for kernel, seconds in medians.items() if seconds <= NEAR * min(medians.values()))


# ---- what is asked


def asked(blocks: Sequence[nn.Module], forward: Callable[[], object]) -> list[Call]:
    """What these blocks ask in that forward pass, as their device computes it: the tensors themselves.

    Of the blocks of a class the first alone computes. For the others its answer stands in, which has their shape.
    """
    counts, own = Counter(map(type, blocks)), [block.forward for block in blocks]
    calls: list[Call] = []
    answers: dict[type, Any] = {}

    def stand_in(kind: type, plain: Callable[..., Any], *given: Any, **named: Any) -> Any:
        if kind not in answers:
            with _Listening(calls, counts[kind]):
                answers[kind] = plain(*given, **named)
        return answers[kind]

    for block, plain in zip(blocks, own, strict=True):
        block.forward = partial(stand_in, type(block), plain)
    try:
        with torch.no_grad():
            forward()
    finally:
        for block, plain in zip(blocks, own, strict=True):
            block.forward = plain
    return calls


class _Listening(TorchFunctionMode):
    """Notes each call of attention."""

    def __init__(self, calls: list[Call], times: int):
        super().__init__()
        self._calls, self._times = calls, times

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            named = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
            named = {name: autocast(one).detach() if isinstance(one, Tensor) else one for name, one in named.items()}
            query, key, value = (named.pop(name) for name in ARGUMENTS[:3])
            self._calls.append(Call((query, key, value), named, self._times))
        return func(*args, **kwargs)


# ---- the trial


def tried(calls: Sequence[Call], kernels: Sequence[str], *, seconds: float = SECONDS) -> Trial:
    """Passes of each kernel in turns, after one that is not timed. A kernel that cannot do the largest of the calls, or
    fails, is left out; of smaller calls that it cannot do the others are asked.

    seconds: after which no further round begins, once each kernel was timed.
    """
    until, left_out = time.monotonic() + seconds, {}
    for kernel in kernels:
        if (reason := _refusal(calls, kernel, kernels)) is not None:
            left_out[kernel] = reason
    going = [kernel for kernel in kernels if kernel not in left_out]
    passes_s: dict[str, list[float]] = {kernel: [] for kernel in going}
    if len(going) < 2:
        return Trial(passes_s, left_out)
    for _ in range(ROUNDS):
        for kernel in going:
            passes_s[kernel].append(_pass_s(calls, in_order(kernel, going)))
        if time.monotonic() > until:
            break
    return Trial(passes_s, left_out)


def _refusal(calls: Sequence[Call], kernel: str, kernels: Sequence[str]) -> str | None:
    """Why that kernel cannot be had; else it has been run once."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with preferring([kernel]):
                max(calls, key=lambda call: call.products).run()
            _pass_s(calls, in_order(kernel, kernels))
        except RuntimeError as error:  # also of a device without memory
            return why(kernel, [str(warning.message) for warning in said], str(error))
    return None


def why(kernel: str, said: Sequence[str], error: str) -> str:
    """What torch's warnings say about this kernel; if there are none, how its error begins."""
    reasons, is_own = [], False
    for line in (text.partition(" (Triggered internally")[0].strip() for text in said):
        if line.endswith("not used because:"):
            is_own = line.lower().startswith(TITLES.get(kernel, kernel))
        elif is_own:
            reasons.append(line)
    return " ".join(reasons) or error.strip().partition("\n")[0]


def _pass_s(calls: Sequence[Call], kernels: Sequence[str]) -> float:
    """Seconds of the attention of all blocks."""
    device, total_s = calls[0].given[0].device, 0.0
    with preferring(kernels):
        for call in calls:
            _wait(device)
            begun = time.perf_counter()
            call.run()
            _wait(device)
            total_s += call.times * (time.perf_counter() - begun)
    return total_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
