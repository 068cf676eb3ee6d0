"""Draws the cache's numbers in docs/benchmarks.md: python scripts/cache_picture.py docs/benchmarks.md docs/cache.png"""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

PAGE, INK, MUTED, CACHED, LIVE = "#fbfaf7", "#1d1c1a", "#6d6962", "#17786a", "#5b74b8"  # as in style.html
ROW = re.compile(r"\| cached step over live step, tiny (\w+), (\d+) px \| ([\d.e-]+) \|")


def draw(benchmarks: str, file: Path) -> None:
    rows = ROW.findall(benchmarks)
    figure = Figure(figsize=(11, 0.9 + 0.42 * len(rows)), dpi=100, facecolor=PAGE, layout="constrained")
    axes = figure.add_subplot(facecolor=PAGE)
    shares = [float(share) for *_, share in rows]
    bars = axes.barh(range(len(rows)), shares, 0.62, color=CACHED, label="from the cache")
    rest = [1 - share for share in shares]
    axes.barh(range(len(rows)), rest, 0.62, shares, color=LIVE, alpha=0.35, label="reading and encoding")
    axes.bar_label(bars, [f" {share:.0%}" for share in shares], color=INK, fontsize=10)
    axes.set_yticks(range(len(rows)), [f"{name}, {side} px" for name, side, _ in rows], color=MUTED)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "a live step"], color=MUTED)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=2, frameon=False, labelcolor=MUTED)
    figure.savefig(file, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2]))
