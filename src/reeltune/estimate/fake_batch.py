"""A batch of fake tensors, and a fake process group in the place of the processes that share its clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from reeltune.core.types import Batch, Draw
from reeltune.families.spec import Family
from reeltune.run.sizes import refuse_too_large


@contextmanager
def first_of(count: int) -> Iterator[DeviceMesh | None]:
    """Within, this process is the first of `count` that share a clip; what the others would send has no values."""
    if count == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (1, 1, count), mesh_dim_names=("data", "ring", "ulysses"))
    finally:
        dist.destroy_process_group()


def empty_batch(
    family: Family, mode: str, draws: Sequence[Draw], captions: Sequence[str], fake: AbstractContextManager
) -> Batch:
    """Clips of zeros. Pixels, which a caption's encoder may look at, have values; what is made within `fake` has none.

    Raises UserError for clips that no machine could read.
    """
    (frames, height, width), B, needs = draws[0].shape, len(draws), family.needs[mode]
    refuse_too_large(draws)
    pixels = torch.zeros(B, frames, 3, height, width, dtype=torch.uint8)
    with fake:
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
