"""One forward pass of weights as a user will load them: that they fit the network, and that it answers with numbers."""

from __future__ import annotations

from pathlib import Path

import torch

from reeltune.core.errors import UserError
from reeltune.core.types import Batch, Crop, Draw, Sample, Shape
from reeltune.data.loader import collate
from reeltune.diffusion.loss import settle
from reeltune.families import tensor_files
from reeltune.families.spec import Family
from reeltune.sampling.sample import Setup

FRAMES, CELLS = 5, 4  # the least clip that every family learns from; patches to a side
SPARE = 1.2  # memory wanted, over the size of the files


def needed_bytes(model: Path, transformer: Path) -> int:
    """Bytes that hold the frozen networks of `model`, as stored, and the weights in `transformer`, with some to
    spare."""
    frozen = [file for file in model.rglob("*") if file.suffix in (".safetensors", ".pth", ".pt", ".bin")]
    own = set(model.glob("diffusion_pytorch_model*")) | set((model / "transformer").glob("*"))
    files = [file for file in frozen if file not in own] + tensor_files.files_of(transformer)
    return int(SPARE * sum(file.stat().st_size for file in files))


@torch.no_grad()
def forward(model: Path, family: Family, mode: str, transformer: Path, dtype: torch.dtype) -> Shape:
    """Answers to a small black clip with the weights in `transformer`, on the CPU. Returns the clip's shape.

    Raises UserError for weights that do not fit, and where the answer is not finite.
    """
    parts = family.load(model, dtype=dtype, transformer_path=transformer)
    parts.net.eval()
    batch = black_clip(family, mode)
    setup = Setup(family, mode, parts, family.objective, lambda: torch.autocast("cpu", dtype, dtype != torch.float32))
    x0, cond = settle(setup.encode(batch), [0], parts.null)
    timestep_B = family.objective.timestep(torch.tensor([0.5]))
    answer = setup.denoise(parts.net, x0, timestep_B, cond)
    if not answer.isfinite().all():
        raise UserError(
            "export",
            "the network answers with numbers that are not finite, though its weights are, as they were written; "
            "export an earlier checkpoint, or merge adapters at a lower strength",
        )
    return batch.draws[0].shape


def black_clip(family: Family, mode: str) -> Batch:
    """A batch of one small black clip, with all that the mode needs."""
    side = CELLS * family.geometry.multiple
    shape = Shape(family.geometry.legal_frames(max(FRAMES, family.least_frames)), side, side)
    frames = shape.frames
    draw = Draw(0, shape, Crop(side, side, 0, 0), tuple(range(frames)), ref_frame=0, seed=0)
    pixels = torch.zeros(frames, 3, side, side, dtype=torch.uint8)
    made = Sample(draw, "a clip", pixels, keep=dict.fromkeys([*family.drop, "text"], True))
    needs = family.needs[mode]
    if "control" in needs:
        made.control_FCHW = pixels
    if "camera" in needs:
        made.camera_FCHW = torch.zeros(frames, 6, side, side)
    if "mask" in needs:
        made.mask_FHW = torch.ones(frames, side, side, dtype=torch.bool)
    return collate([made])
