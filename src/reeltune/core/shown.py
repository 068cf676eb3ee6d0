"""Text out of a file, as a terminal shows it, which obeys it, and a spreadsheet, which computes it.  (no torch)"""

from __future__ import annotations

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet computes (OWASP, "CSV Injection")


def printable(text: str) -> str:
    """A text in which what cannot be seen (but for ends of lines) is written as Python writes it."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def cell(text: str) -> str:
    """The text of a table's cell, as `printable`, with ' before what a spreadsheet would take for a formula."""
    shown = printable(text)
    return f"'{shown}" if text.startswith(FORMULA) else shown
