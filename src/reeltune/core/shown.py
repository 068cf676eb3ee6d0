"""Text out of a file, as a terminal shows it, which obeys it, and a spreadsheet, which computes it.  (no torch)"""

from __future__ import annotations

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that a spreadsheet computes (OWASP, "CSV Injection")


def printable(text: str) -> str:
    """The same, with what cannot be seen (but for ends of lines) written as Python writes it."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def cell(text: str) -> str:
    """The same for a cell of a table, which begins with ' where a spreadsheet would take it for a formula."""
    shown = printable(text)
    return f"'{shown}" if text.startswith(FORMULA) else shown
