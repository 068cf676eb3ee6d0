"""Tables of the documents that quote docs/benchmarks.md: measured anew there, they are to be written anew too."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
MARK = re.compile(r"<!-- quotes benchmarks\.md#(\S+) -->\n((?:\|.*\n)+)")
FIGURE = re.compile(r"(?<![\w.])\d+\.\d+")


def section(page: str, anchor: str) -> str:
    """What stands under the heading of that anchor, up to the next of its rank or above."""
    rank, words = next(
        (rank, words)
        for rank, words in re.findall(r"^(#+) (.+)$", page, re.MULTILINE)
        if words.lower().replace(" ", "-") == anchor
    )
    text = page.partition(f"{rank} {words}\n")[2]
    return re.split(rf"^#{{1,{len(rank)}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]


def strange(table: str, measured: str) -> list[str]:
    """The figures of the table that are none of those measured, rounded to as many digits."""
    known = [float(figure) for figure in FIGURE.findall(measured)]
    places = [(figure, len(figure.partition(".")[2])) for figure in FIGURE.findall(table)]
    return [figure for figure, digits in places if figure not in {f"{one:.{digits}f}" for one in known}]


def test_quoted_figures_are_those_measured():
    measured = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    found = {
        (page.name, anchor): strange(table, section(measured, anchor))
        for page in sorted(DOCS.glob("*.md"))
        for anchor, table in MARK.findall(page.read_text(encoding="utf-8"))
    }
    assert found == {
        ("memory.md", "memory"): [],
        ("speed.md", "on-an-h100-and-an-h200"): [],
        ("speed.md", "encoding"): [],
    }


def test_another_figure_is_found():
    assert strange("| a | 0.35 | 1.03 | 0.341 |", "| 0.346 | 1.04 | 0.341 |") == ["1.03"]
