"""What stands in for clips, their encodings, the other processes, and the whole network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from reeltune.config.recipe import Model
from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Draw, Encoded, Posterior
from reeltune.families.spec import Family, Parts
from reeltune.memory import blocks
from reeltune.memory.size import size_bytes
from reeltune.optim.trainable import matches, released_names, select

MOST_BYTES = 2**34  # of pixels in a step


@contextmanager
def one_of(count: int) -> Iterator[DeviceMesh | None]:
    """As the first of so many processes that share a clip; the others, with whom it speaks, are not there."""
    if count == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (1, 1, count), mesh_dim_names=("data", "ring", "ulysses"))
    finally:
        dist.destroy_process_group()


def empty_batch(
    family: Family, mode: str, draws: Sequence[Draw], captions: Sequence[str], stand_ins: AbstractContextManager
) -> Batch:
    """Clips of zeros. Those that may be looked at by more than networks have values; the others need none.

    Raises UserError for clips that no machine could read.
    """
    (frames, height, width), B, needs = draws[0].shape, len(draws), family.needs[mode]
    if B * frames * 3 * height * width > MOST_BYTES:
        raise UserError(
            "recipe",
            f"the largest step has {B} x {frames} frames of {width} x {height}, more than {MOST_BYTES / 1e9:.0f} GB of "
            "pixels before anything is computed; lower the sample sizes, video_sample_n_frames or train_batch_size",
        )
    pixels = torch.zeros(B, frames, 3, height, width, dtype=torch.uint8)
    with stand_ins:
        return Batch(
            draws=list(draws),
            text=list(captions),
            pixels_BFCHW=pixels,
            ref_frame_B=torch.zeros(B, dtype=torch.int64),
            keep={name: torch.ones(B, dtype=torch.bool) for name in ("text", *family.drop)},
            control_BFCHW=torch.zeros(pixels.shape, dtype=torch.uint8) if "control" in needs else None,
            camera_BFCHW=torch.zeros(B, frames, 6, height, width) if "camera" in needs else None,
            mask_BFHW=torch.ones(B, frames, height, width, dtype=torch.bool) if "mask" in needs else None,
        )


@dataclass(frozen=True)
class Counts:
    """Of the whole network."""

    names: dict[str, str]  # ours -> released
    parameters: int
    trainable: int
    network_bytes: int
    block_parameters: int  # of the largest block
    other_parameters: int  # outside of blocks
    still_blocks: int  # of which nothing learns


def counts_of(family: Family, parts: Parts, model: Model) -> Counts:
    """After saying what learns. Raises UserError for patterns that match nothing."""
    net = parts.net
    names = released_names(net, lambda state: family.to_released(state, parts.config))
    select(net, names, model.trainable_modules, model.trainable_modules_low_learning_rate)
    found = blocks.blocks_of(net, family.blocks)
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in found]
    whole = sum(weight.numel() for weight in net.parameters())
    return Counts(
        names=names,
        parameters=whole,
        trainable=sum(weight.numel() for weight in net.parameters() if weight.requires_grad),
        network_bytes=size_bytes(weights_of(net)),
        block_parameters=max(sizes),
        other_parameters=whole - sum(sizes),
        still_blocks=sum(not any(weight.requires_grad for weight in block.parameters()) for block in found),
    )


def still_matching(model: Model, net: nn.Module, names: dict[str, str]) -> Model:
    """Without the patterns that match only blocks that were taken out."""
    left = [names[name] for name, _ in net.named_parameters()]

    def some(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one for one in patterns if any(matches(one, name) for name in left))

    low = some(model.trainable_modules_low_learning_rate)
    return replace(model, trainable_modules=some(model.trainable_modules), trainable_modules_low_learning_rate=low)


def first_of(encoded: Encoded) -> Encoded:
    def first(value: Tensor | Posterior) -> Any:
        return Posterior(value.mean[:1], value.logvar[:1]) if isinstance(value, Posterior) else value[:1]

    cond = {name: first(value) for name, value in encoded.cond.items()}
    null = {name: value[:1] for name, value in encoded.null.items()}
    return Encoded(first(encoded.x0), cond, {name: keep_B[:1] for name, keep_B in encoded.keep.items()}, null=null)


def renewed(encoded: Encoded, stand_ins: FakeTensorMode) -> Encoded:
    """The same, its tensors without values made anew, since each loading has its own kind of them."""

    def new(value: Any) -> Any:
        if isinstance(value, Posterior):
            return Posterior(new(value.mean), new(value.logvar))
        if not isinstance(value, FakeTensor):
            return value
        with stand_ins:
            return torch.empty(value.shape, dtype=value.dtype)

    def all_new(values: dict[str, Any]) -> dict[str, Any]:
        return {name: new(value) for name, value in values.items()}

    keep, null = all_new(encoded.keep), all_new(encoded.null)
    return Encoded(new(encoded.x0), all_new(encoded.cond), keep, new(encoded.loss_mask), null)


def tensors_of(encoded: Encoded) -> list[Tensor]:
    values = [encoded.x0, *encoded.cond.values()]
    return [
        one for value in values for one in ((value.mean, value.logvar) if isinstance(value, Posterior) else (value,))
    ]


def weights_of(net: nn.Module) -> list[Tensor]:
    """Each once, though it may have several names."""
    return [*net.parameters(), *net.buffers()]
