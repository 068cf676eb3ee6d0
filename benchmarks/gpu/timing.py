"""Seconds of work on a device, waited for to its end."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def median_s(work: Callable[[], object], device: torch.device, *, warm_up: int, rounds: int) -> float:
    for _ in range(warm_up):
        work()
    return statistics.median(seconds_of(work, device) for _ in range(rounds))


def in_a_row_s(work: Callable[[], object], device: torch.device, *, rounds: int) -> float:
    """Seconds of a call, of several that follow one another as in training: none waits for the one before."""

    def all_of_them() -> None:
        for _ in range(rounds):
            work()

    return seconds_of(all_of_them, device) / rounds


def give_back(device: torch.device) -> None:
    """Memory of what is no longer there."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
