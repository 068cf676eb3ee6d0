"""Our families against the reference's own numbers: `python -m benchmarks.parity [--goldens DIR] [--write FILE]`.

Every tensor of every golden file is recomputed in float32 on the CPU. Names, sizes and shapes come from the files.
Exits with 1 if any error is above its bound.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks import parity_cogvideox, parity_easyanimate, parity_hunyuan, parity_wan, parity_wan22
from benchmarks.golden import Row
from tests.conftest import GOLDENS

FAMILIES = parity_wan, parity_wan22, parity_hunyuan, parity_easyanimate, parity_cogvideox
"""Each with golden_files(goldens) and measure(path)."""


def table(rows: list[Row]) -> str:
    """Markdown; cases of one tensor (other shapes, prompts, frame counts) are one line, with the worst of them."""
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        tensor = re.sub(r"^([A-Za-z]\d*|\d+)\.|\.\d+$", "", row.tensor)
        key = row.file, tensor
        if key not in worst or row.absolute > worst[key].absolute:
            worst[key] = row._replace(tensor=tensor)
    same = [row for row in worst.values() if row.ok and row.absolute == 0]
    lines = [
        "# Parity with the original tools",
        "",
        "Largest differences from the numbers of the original tools (VideoX-Fun 804a425) on tiny random checkpoints,",
        "float32 on the CPU. Relative: over the largest value of the original's tensor.",
        f"Written by `make parity` on {date.today()}: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
        + ".",
        "",
        "| file | tensor | absolute | relative | bound | |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.file} | {row.tensor} | {row.absolute:.1e} | {row.relative:.1e} | {row.bound:g} {row.kind} "
        f"| {'' if row.ok else 'ABOVE'} |"
        for row in worst.values()
        if row not in same
    ]
    lines += ["", "Equal to the bit:", ""]
    for file in dict.fromkeys(row.file for row in same):
        lines.append(f"- {file}: {', '.join(row.tensor for row in same if row.file == file)}")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--goldens", type=Path, default=GOLDENS, help="folder of golden files")
    parser.add_argument("--write", type=Path, help="write the table to this file")
    arguments = parser.parse_args(argv)
    rows = [
        row for family in FAMILIES for path in family.golden_files(arguments.goldens) for row in family.measure(path)
    ]
    text = table(rows)
    print(text)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(text)
    above = [row for row in rows if not row.ok]
    print(f"{len(rows)} tensors compared, {len(above)} above their bound")
    return 1 if above or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
