"""A picture of many clips side by side, to compare them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from reeltune.core.files import whole_file

GAP, LETTER = 8, 16  # pixels: between frames, and a line's height
LINE = LETTER + GAP


def write_sheet(
    path: Path, frames: Sequence[Sequence[np.ndarray]], *, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """A PNG of frames, uint8_HWC each, by row and column, at their own size; a column's label stands above it, its last
    word alone where no more fits, and a row's above its frames. Raises CannotWriteError."""
    widths = [max(row[column].shape[1] for row in frames) for column in range(len(columns))]
    heights = [max(frame.shape[0] for frame in row) for row in frames]
    lefts = [GAP + sum(widths[:column]) + GAP * column for column in range(len(columns))]
    tops = [LINE + sum(heights[:row]) + (LINE + GAP) * row + LINE for row in range(len(rows))]
    sheet = Image.new("RGB", (lefts[-1] + widths[-1] + GAP, tops[-1] + heights[-1] + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LETTER)

    def write(text: str, left: int, top: int, width: int) -> None:
        """What fits into the width; the font has no other letters than Latin ones."""
        shown = text = text.encode("latin-1", "replace").decode("latin-1")
        while draw.textlength(shown, font) > width and text:
            text = text[:-1]
            shown = f"{text}..."
        draw.text((left, top), shown, "black", font)

    for label, left, width in zip(columns, lefts, widths, strict=True):
        fits = draw.textlength(label, font) <= width
        write(label if fits else label.rpartition(" ")[2], left, GAP // 2, width)
    for label, row, top in zip(rows, frames, tops, strict=True):
        write(label, GAP, top - LINE + GAP // 2, sheet.width - 2 * GAP)
        for frame, left in zip(row, lefts, strict=True):
            sheet.paste(Image.fromarray(frame), (left, top))
    with whole_file(path, "wb") as file:
        sheet.save(file, "PNG")
