"""Seconds, tokens, share of the card's arithmetic and memory of a step: by compilation, attention and recomputation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import step
from benchmarks.gpu.ceilings import PRODUCT
from benchmarks.gpu.kernels import shares
from benchmarks.gpu.report import Part, Row
from benchmarks.gpu.sizes import Scale
from benchmarks.gpu.timing import give_back, in_a_row_s, seconds_of
from reeltune.core.errors import UserError
from reeltune.distributed.engine import peak_flops
from reeltune.families.wan_fun.family import CONTROL_V1_1


@dataclass(frozen=True)
class Way:
    """A network, and what its recipe says beside `step.recipe_of`. least_gb: of the card's memory."""

    network: str
    changes: dict[str, Any] = field(default_factory=dict)
    least_gb: float = 0.0

    @property
    def name(self) -> str:
        told = ", ".join(f"{name} {str(value).lower()}" for name, value in self.changes.items())
        return f"{self.network}: {told or 'as it is'}"


KEPT, PRODUCTS = ({"gradient_checkpointing": kept} for kept in ("attention_kept", "products_kept"))
COMPILED, NOTHING_RECOMPUTED = {"compile": "blocks"}, {"gradient_checkpointing": False}
ADAPTER = {"rank": 32, "base_weights": "int8"}
WAYS = (  # what tells most first: a card has no time for all of them
    Way("1.3b", KEPT),
    Way("14b_cut", KEPT | ADAPTER),
    Way("14b_cut", PRODUCTS | COMPILED),
    Way("1.3b", PRODUCTS | COMPILED),
    Way("1.3b", PRODUCTS | COMPILED | {"attention": "flash_4"}),  # where its package is installed
    Way("1.3b", NOTHING_RECOMPUTED | COMPILED, least_gb=120),
    Way("14b_cut", ADAPTER | {"blocks_to_swap": 4}),
    Way("1.3b", KEPT | {"attention": "flash"}),
    Way("1.3b", PRODUCTS),
    Way("14b_cut", KEPT | COMPILED | ADAPTER),
    Way("1.3b", KEPT | COMPILED),
    Way("14b_cut", KEPT | COMPILED),
    Way("1.3b"),
    Way("14b_cut", KEPT),
    Way("14b_cut", PRODUCTS | COMPILED | ADAPTER),
    Way("1.3b", COMPILED),
    Way("14b_cut"),
    Way("1.3b", KEPT | {"attention": "cudnn"}),
    Way("1.3b", {"attention": "efficient"}),
    Way("1.3b", KEPT | COMPILED | {"attention": "flash"}),
)


def measure(
    part: Part, scale: Scale, device: torch.device, checkpoints: dict[str, Path], count: int | None = None
) -> None:
    """checkpoints: of each network, as networks.checkpoint lays them out. count: of WAYS, from the first on."""
    flops = {name: step.flops(network, scale.clip, scale.encoders) for name, network in scale.networks.items()}
    longest_s = 0.0
    for way in WAYS[:count]:
        if way.least_gb > card_gb(device):
            part.not_run(way.name, f"it takes a card of {way.least_gb:g} GB")
        elif part.left_s() < longest_s:
            part.not_run(way.name, "no time is left")
        else:
            with part.attempt(way.name):
                longest_s = max(longest_s, _measure(part, way, scale, device, checkpoints, flops[way.network]))
        give_back(device)


def _measure(
    part: Part, way: Way, scale: Scale, device: torch.device, checkpoints: dict[str, Path], flops: int
) -> float:
    """Returns the seconds that it took."""
    about: Row = {"network": way.network, "changes": way.changes}

    def row() -> None:
        try:
            part.row(way.name, **about, **_numbers(way, scale, device, checkpoints, flops))
        except torch.OutOfMemoryError as error:
            part.row(way.name, **about, does_not_fit=str(error).splitlines()[0])
        except UserError as error:  # torch has no such kernel here
            part.row(way.name, **about, not_there=str(error))

    return seconds_of(row, device)


def _numbers(way: Way, scale: Scale, device: torch.device, checkpoints: dict[str, Path], flops: int) -> Row:
    recipe = step.recipe_of(checkpoints[way.network], **way.changes)
    steps = step.Step(recipe, scale.networks[way.network], scale)
    kernel = steps.choose_attention()
    first_s = seconds_of(steps, device)  # kernels are chosen, perhaps compiled, and the optimizer makes its state
    _begin_anew(device)
    step_s = in_a_row_s(steps, device, rounds=scale.rounds)
    peak_gb, reserved_gb = (_gb(device, of) for of in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved))
    peaks_gb: dict[str, float | str] = {}

    def over(phase: str) -> None:
        peaks_gb[phase] = _gb(device, torch.cuda.max_memory_allocated)
        _begin_anew(device)

    _begin_anew(device)
    loss, shared = shares(lambda: steps(over), device, step_s)
    if not torch.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss.item()}")
    sheet = peak_flops(device, torch.bfloat16)
    return {
        "attention": kernel,
        "step_s": step_s,
        "tokens_s": CONTROL_V1_1.geometry.tokens(scale.clip) / step_s,
        "tflops": flops / step_s / 1e12,
        "mfu": "unknown" if sheet is None else flops / step_s / sheet,
        "peak_gb": peak_gb,
        "reserved_gb": reserved_gb,
        "peaks_gb": peaks_gb,
        "first_step_s": first_s,
        **shared,
    }


def card_gb(device: torch.device) -> float:
    """A CPU, which rehearses, has room for everything."""
    return torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else math.inf


def _begin_anew(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _gb(device: torch.device, bytes_on: Callable[[torch.device], int]) -> float | str:
    return bytes_on(device) / 1e9 if device.type == "cuda" else "unknown"


def against_product(part: Part, ceilings: list[Row]) -> None:
    """Each row's arithmetic over what a matrix product reaches on this card."""
    reached = next((row["tflops"] for row in ceilings if row["row"] == PRODUCT and "tflops" in row), None)
    for row in part.rows:
        if reached is not None and "tflops" in row:
            row["of_product"] = row["tflops"] / reached
