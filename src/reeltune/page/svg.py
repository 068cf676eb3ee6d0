"""The report's charts for a page that allows no style in its lines.  (no torch)"""

from __future__ import annotations

import re

from markupsafe import Markup

STYLE = re.compile(r' style="([^"]*)"')
SHEET = re.compile(r"<style\b.*?</style>", re.DOTALL)
FONT_SIZE = re.compile(r"([\d.]+)px")


def without_styles(svg: str) -> Markup:
    """Style attributes as presentation attributes, which mean the same (SVG 2, 6.6) and which a
    Content-Security-Policy of style-src 'self' lets through. Of a font only its size is kept: the page has its own.
    matplotlib writes it as `font` up to 3.10, and in parts since."""
    return Markup(STYLE.sub(_attributes, SHEET.sub("", svg)))


def _attributes(found: re.Match[str]) -> str:
    told = []
    for declaration in filter(None, map(str.strip, found[1].split(";"))):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            size = FONT_SIZE.search(value)
            told += [("font-size", size[1])] if size else []
        elif name != "font-family":
            told.append((name, value))
    return "".join(f' {name}="{value}"' for name, value in told)
