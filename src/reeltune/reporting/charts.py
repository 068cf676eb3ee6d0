"""The report's charts, as SVG that takes its colours and type from the page around it.

Each function returns a whole <svg> element. Colours are CSS variables, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # only who draws waits for it
    from matplotlib.axes import Axes

WHOLE, HALF, THIRD = (12.3, 2.5), (6.0, 2.9), (3.9, 2.3)  # inches of 72 units: one scale for type at each page width
BINS = 300  # points of a line; longer runs are averaged
# Stand-ins that matplotlib draws with -> the page's variables.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--now)",
    "#050505": "var(--start)",
    "#060606": "var(--data)",
    "#070707": "var(--encode)",
    "#080808": "var(--optimizer)",
    "#090909": "var(--page)",
}
STAND_IN = {variable[6:-1]: colour for colour, variable in COLOURS.items()}
STYLE: dict[Any, Any] = {  # matplotlib's type of its keys is its own
    "svg.fonttype": "none",
    "svg.hashsalt": "reeltune",
    "font.size": 10,
    "text.color": STAND_IN["muted"],
    "axes.edgecolor": STAND_IN["rule"],
    "axes.labelcolor": STAND_IN["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": STAND_IN["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": STAND_IN["rule"],
    "ytick.color": STAND_IN["rule"],
    "xtick.labelcolor": STAND_IN["muted"],
    "ytick.labelcolor": STAND_IN["muted"],
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


def noisy(steps: Sequence[float], values: Sequence[float], label: str) -> str:
    """One quantity by step: itself and its spread faintly, its running mean as a line."""
    x, mean, low, high = binned(steps, values)
    with drawing(label, THIRD) as (axes, svg):
        axes.fill_between(x, low, high, color=STAND_IN["now"], alpha=0.18, linewidth=0)
        axes.plot(x, mean, color=STAND_IN["now"], alpha=0.35, linewidth=0.8)
        axes.plot(x, smooth(mean), color=STAND_IN["now"])
    return svg[0]


def exact(steps: Sequence[float], values: Sequence[float], label: str) -> str:
    """One quantity by step, as it is."""
    x, mean, _, _ = binned(steps, values)
    with drawing(label, THIRD) as (axes, svg):
        axes.plot(x, mean, color=STAND_IN["now"])
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        axes.set_ylim(bottom=0)
    return svg[0]


def paired(rows: Sequence[dict], name: str, label: str, size: tuple[float, float] = HALF) -> str:
    """A number by step, with the 95 % band of its paired difference, against that of the starting weights; above it,
    where rows have one, what real clips have (`truth`)."""
    steps, values = ([row[key] for row in rows] for key in ("step", name))
    start, truth = rows[-1][f"{name}_start"], rows[-1].get("truth")
    bands = [row["band95"] or (row["difference"], row["difference"]) for row in rows]
    low, high = ([start + edge for edge in edges] for edges in zip(*bands, strict=True))
    with drawing(label, size) as (axes, svg):
        axes.axhline(start, color=STAND_IN["start"], linestyle=(0, (4, 3)), linewidth=1.4)
        if truth is not None:
            axes.axhline(truth, color=STAND_IN["muted"], linestyle=(0, (1, 2)), linewidth=1.4)
        axes.fill_between(steps, low, high, color=STAND_IN["now"], alpha=0.18, linewidth=0)
        axes.vlines(steps, low, high, color=STAND_IN["now"], linewidth=1)
        axes.plot(steps, values, color=STAND_IN["now"], marker="o", markersize=4)
        axes.set_xlim(min(steps) - 0.02 * (max(steps) or 1), max(steps) * 1.02 or 1)
    return svg[0]


def beside(lines: Sequence[tuple[str, Sequence[float], Sequence[float], bool]], label: str) -> str:
    """Several runs over each other: (colour name, steps, values, whether each value is a measurement of its own, or
    one of a noisy row of which the running mean is drawn)."""
    with drawing(label, HALF) as (axes, svg):
        for colour, steps, values, measured in lines:
            x, mean = (steps, values) if measured else binned(steps, values)[:2]
            drawn = mean if measured else smooth(np.asarray(mean))
            axes.plot(x, drawn, color=STAND_IN[colour], marker="o" if measured else None, markersize=4)
    return svg[0]


def noise_bands(bands: Sequence[dict], size: tuple[float, float] = HALF) -> str:
    """Held-out loss at each noise level, of the starting weights and now."""
    places = np.arange(len(bands))
    with drawing("held-out loss by noise level", size, xlabel="noise level") as (axes, svg):
        axes.bar(places - 0.19, [band["loss_start"] for band in bands], 0.34, color=STAND_IN["start"])
        axes.bar(places + 0.19, [band["loss"] for band in bands], 0.34, color=STAND_IN["now"])
        axes.set_xticks(places, [f"{band['level']:.2f}" for band in bands])
        axes.tick_params(axis="x", length=0)
    return svg[0]


def time_split(steps: Sequence[float], parts: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Seconds of a step by (colour name, seconds), stacked in the order given."""
    x = binned(steps, steps)[0]
    stack = [binned(steps, seconds)[1] for _, seconds in parts]
    with drawing("time of a step by what it is spent on", WHOLE) as (axes, svg):
        axes.stackplot(
            x, stack, colors=[STAND_IN[name] for name, _ in parts], linewidth=0.6, edgecolor=STAND_IN["page"]
        )
        axes.set_ylim(0, 1.15 * np.percentile(np.sum(stack, axis=0), 98))  # one slow start does not flatten the rest
        axes.set_xlim(x[0], x[-1] if len(x) > 1 else x[0] + 1)
    return svg[0]


def stacked(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], limit: float, label: str, unit: str) -> str:
    """One bar a row, of (colour name, amount) one after another, and a line that they should not pass."""
    names = [name for name, _ in rows]
    with drawing(label, (WHOLE[0], 0.7 + 0.42 * len(rows)), xlabel=unit) as (axes, svg):
        for place, (_, amounts) in enumerate(rows):
            left = 0.0
            for colour, amount in amounts:
                axes.barh(place, amount, 0.62, left, color=STAND_IN[colour], edgecolor=STAND_IN["page"], linewidth=0.6)
                left += amount
        axes.axvline(limit, color=STAND_IN["ink"], linestyle=(0, (4, 3)), linewidth=1.4)
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_xlim(0, 1.05 * max(limit, *(sum(amount for _, amount in amounts) for _, amounts in rows)))
    return svg[0]


def counts(places: Sequence[str], amounts: Sequence[float], label: str, xlabel: str) -> str:
    """A bar for each place, in their order."""
    with drawing(label, WHOLE, xlabel=xlabel) as (axes, svg):
        axes.bar(range(len(places)), amounts, 0.8, color=STAND_IN["now"])
        step = -(-len(places) // 16)  # as many names as do not touch
        axes.set_xticks(range(0, len(places), step), places[::step])
        axes.tick_params(axis="x", length=0)
    return svg[0]


def binned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(step, mean, least, most) of at most BINS groups of neighbouring steps, as equal in size as may be.

    NaN, which is drawn as a gap, for a group with a value that is not finite.
    """
    groups = min(BINS, len(values))
    edges = np.linspace(0, len(values), groups + 1).astype(int)[:-1]
    heights, counts = np.array(values, dtype=float), np.diff([*edges, len(values)])
    heights[~np.isfinite(heights)] = np.nan
    return (
        np.add.reduceat(np.asarray(steps, dtype=float), edges) / counts,
        np.add.reduceat(heights, edges) / counts,
        np.minimum.reduceat(heights, edges),
        np.maximum.reduceat(heights, edges),
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window centred on each point, a fortieth of the curve to either side and less near its ends.

    Of its finite values, for in fp16 a gradient norm may be infinite; NaN where there are none.
    """
    reach, n, is_finite = len(values) // 40, len(values), np.isfinite(values)
    near = np.minimum(np.minimum(np.arange(n), np.arange(n)[::-1]), reach)
    at = np.arange(n)
    sums, counts = (
        total[at + near + 1] - total[at - near]
        for part in (np.where(is_finite, values, 0.0), is_finite.astype(float))
        for total in [np.concatenate([[0.0], np.cumsum(part)])]
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@contextmanager
def drawing(label: str, size: tuple[float, float], *, xlabel: str = "step") -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; afterwards the list holds the SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    svg: list[str] = []
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        yield axes, svg
        axes.set_xlabel(xlabel)
        if xlabel == "step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawn = file.getvalue()
    [view_box] = re.findall(r'viewBox="[^"]*"', drawn)
    drawn = re.sub(r"^.*?</metadata>", "", drawn, flags=re.DOTALL)  # prolog and <svg ...> too; HTML needs less
    for colour, variable in COLOURS.items():
        drawn = drawn.replace(colour, variable)
    svg.append(f'<svg role="img" aria-label="{label}" {view_box}>{drawn.strip()}')
