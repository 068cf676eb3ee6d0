"""What the parity tests of all families assert."""

import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.golden import Golden, Row


def assert_parity(path: Path, rows: list[Row], inputs: Iterable[str]) -> None:
    """Every tensor of a golden file is within its bound, or is one of `inputs`: read, and not computed.

    inputs: what a tensor's name ends with, before a number.
    """
    above = [f"{row.tensor}: {row.absolute:.2e} absolute, {row.relative:.2e} relative" for row in rows if not row.ok]
    assert rows and not above
    compared = {row.tensor for row in rows}
    kind = {name: re.sub(r"\.\d+$", "", name).split(".")[-1] for name in Golden(path).tensors}
    assert not [name for name in kind if name not in compared and kind[name] not in inputs]


def off(rows: list[Row]) -> set[str]:
    """The tensors above their bound."""
    return {row.tensor for row in rows if not row.ok}
