"""What to say when memory runs out while networks are loaded or encode: what they take, what was free, the remedies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import torch
from torch import nn

from reeltune.config.parse import flat
from reeltune.config.recipe import Recipe
from reeltune.config.rules import written
from reeltune.core.errors import UserError, first_words, lacks_memory
from reeltune.families.spec import Parts
from reeltune.memory import choices
from reeltune.memory.host import room_bytes
from reeltune.memory.size import size_bytes

WORDS = {
    "net": "network",
    "vae": "VAE",
    "text": "text encoder",
    "text_2": "second text encoder",
    "image": "image encoder",
}
OF_ENCODERS = ("encoder_weights",)  # levers that make less to load
OF_NETWORKS = ("cache_folder", "base_weights", "trained_weights", *OF_ENCODERS)


class told_when_full:
    """Within, lack of memory of the host or the device becomes UserError.

    doing: in words. outlines: gives the networks without their weights' values, of which the trained one is needed if
    `network`, the frozen ones if `encoders`. besides: levers that spare what is done with them.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        outlines: Callable[[], Parts],
        doing: str,
        *,
        network: bool,
        encoders: bool = True,
        besides: tuple[str, ...] = (),
    ):
        self.recipe, self.device, self.outlines, self.doing = recipe, device, outlines, doing
        self.network, self.encoders, self.besides = network, encoders, besides

    def __enter__(self) -> None:
        self.host_bytes, self.device_bytes = room_bytes(), free_bytes(self.device)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, UserError) or not lacks_memory(error):
            return
        place, had_bytes, on_device = "the host", self.host_bytes, False
        if isinstance(error, torch.OutOfMemoryError) and self.device_bytes is not None:
            place, had_bytes, on_device = str(self.device), self.device_bytes, True
        needed = needed_bytes(self.outlines(), network=self.network, encoders=self.encoders)
        parts = ", ".join(f"{name} {part_bytes / 1e9:.1f} GB" for name, part_bytes in needed.items())
        levers_told = remedies(self.recipe, on_device=on_device, network=self.network, besides=self.besides)
        changes = [*levers_told, f"more memory for {place}"]
        raise UserError(
            "memory",
            f"{place} is full while {self.doing} ({first_words(error)}). The networks take {parts}, "
            f"{sum(needed.values()) / 1e9:.1f} GB together, and {had_bytes / 1e9:.1f} GB were free before. Change one "
            f"or more, the cheapest first: {'; '.join(changes)}",
        ) from error


def free_bytes(device: torch.device) -> int | None:
    """A GPU's free memory; None for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def needed_bytes(outlines: Parts, *, network: bool, encoders: bool) -> dict[str, int]:
    """Network in words -> bytes of its weights, of the trained one and of the frozen ones. outlines: not read yet."""
    nets: dict[str, nn.Module] = {"net": outlines.net} if network else {}
    nets |= {name: load() for name, load in outlines.loaders.items()} if encoders else {}
    return {WORDS.get(name, name): size_bytes(list(net.parameters())) for name, net in nets.items()}


def remedies(recipe: Recipe, *, on_device: bool, network: bool, besides: tuple[str, ...] = ()) -> Iterator[str]:
    """What this recipe has not done yet and may, the cheapest first."""
    helpful = {*(OF_NETWORKS if network else OF_ENCODERS), *(("low_vram",) if on_device else ()), *besides}
    values: Mapping[str, object] = {**flat(recipe), "encodes_ahead": recipe.memory.encode_ahead}
    if not network:  # the cache is what is being made
        values = {**values, "cache_folder": None}
    for lever, settings in choices.offered(values):
        if lever.setting in helpful:
            yield lever.advice or written(settings)
