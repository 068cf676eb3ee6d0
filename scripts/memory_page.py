"""Writes the table of docs/memory.md from memory/levers.py: python scripts/memory_page.py docs/memory.md"""

import re
import sys
from pathlib import Path

from reeltune.config.rules import shown
from reeltune.memory import levers
from reeltune.memory.lever import Exclusion, Lever

HEAD = ("setting", "what it spares", "its price", "does not go with")
TABLE = re.compile(r"^\| setting \|.*?(?=\n\n)", re.DOTALL | re.MULTILINE)


def table() -> str:
    rows = [HEAD, ("---",) * len(HEAD), *map(cells, levers.LEVERS)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("|  |", "| |")


def cells(lever: Lever) -> tuple[str, ...]:
    label = lever.label or f"`{lever.setting}: {shown(lever.value)}`"
    barred = [*(["several processes"] if lever.alone else []), *map(values, lever.excludes)]
    return label + ("" if lever.same_bits else " *"), lever.spares, lever.price, ", ".join(barred)


def values(exclusion: Exclusion) -> str:
    """What is not to be, of the other setting."""
    some = ", ".join(map(shown, exclusion.refused or exclusion.allowed))
    return f"`{exclusion.setting}` {some}" if exclusion.refused else f"`{exclusion.setting}` other than {some}"


def page(text: str) -> str:
    """The page with the table as it is now."""
    return TABLE.sub(lambda _: table(), text, count=1)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
