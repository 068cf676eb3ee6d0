"""The first batch as files to look at: what the network is really given."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from reeltune.core.files import whole_file
from reeltune.core.types import Batch
from reeltune.data.media import write_clip


def write_first_batch(batch: Batch, folder: Path, *, reference: bool, fps: float = 8.0) -> None:
    """Writes of each sample pixels and control as mp4, the `reference` frame as png, caption and what is dropped as
    txt.

    `batch` is still on the CPU, its pixels 8-bit. Raises CannotWriteError.
    """
    for i, (draw, text) in enumerate(zip(batch.draws, batch.text, strict=True)):
        pixels_FHWC = batch.pixels_BFCHW[i].permute(0, 2, 3, 1).numpy()
        write_clip(folder / f"{i}_pixels.mp4", pixels_FHWC, fps)
        if batch.control_BFCHW is not None:
            write_clip(folder / f"{i}_control.mp4", batch.control_BFCHW[i].permute(0, 2, 3, 1).numpy(), fps)
        if reference:
            with whole_file(folder / f"{i}_reference.png", "wb") as file:
                Image.fromarray(pixels_FHWC[draw.ref_frame]).save(file, format="PNG")
        dropped = [name for name, keep_B in batch.keep.items() if not keep_B[i]]
        frames = f"{draw.frames[0]} to {draw.frames[-1]} ({len(draw.frames)})"
        lines = [
            text,
            "",
            f"shape: {tuple(draw.shape)}",
            f"frames: {frames}",
            f"dropped: {', '.join(dropped) or 'none'}",
        ]
        with whole_file(folder / f"{i}_text.txt") as file:
            file.write("\n".join(lines) + "\n")
