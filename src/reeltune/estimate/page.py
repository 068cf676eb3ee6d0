"""A forecast as tables, on the terminal and, with pictures, as one HTML page."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.table import Table as RichTable

from reeltune.config.recipe import Recipe
from reeltune.core.errors import refuse
from reeltune.core.reading import beginning
from reeltune.core.terminal import Terminal
from reeltune.estimate.machines import DEVICES, Machines
from reeltune.estimate.main import Forecast, forecast
from reeltune.estimate.remedies import MARGIN
from reeltune.estimate.result import PARTS, PHASES
from reeltune.estimate.sharding import ENGINES
from reeltune.estimate.throughput import seconds
from reeltune.estimate.turns import Changes
from reeltune.reporting import charts, report
from reeltune.run.precision import slow_bf16

TONES = {"good": "green", "open": "yellow", "bad": "red"}  # class of a page -> colour of a terminal
LISTED = 12  # rows of a table of clips or sizes; what is more is counted


@dataclass(frozen=True)
class Table:
    """Rows of text under heads; numbers are those of all columns but the first `words`."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1
    note: str = ""


def tables(plan: Forecast) -> list[Table]:
    made = (data_table, size_table, left_out_table, memory_table, other_memory, time_table)
    return [table for table in (make(plan) for make in made) if table.rows]


def verdict_lines(plan: Forecast) -> tuple[str, str, str]:
    """(the answer, its reason, its tone: a key of TONES)"""
    verdict, machines = plan.verdict, plan.machines
    name = machines.device if machines.device in DEVICES else "device" if machines.gpus == 1 else "devices"
    where = f"one {name}" if machines.gpus == 1 else f"each of {machines.gpus} {name}"
    batch, (frames, height, width) = len(plan.draws), plan.draws[0].shape
    needs = (
        f"The fullest moment is the {PHASES[verdict.phase]} of the largest step ({batch} x {frames} frames of "
        f"{width} x {height}), which takes {size(verdict.need_bytes)} of {size(verdict.have_bytes)} on {where}"
    )
    if verdict.safe:
        return "It fits.", f"{needs}: {size(verdict.spare_bytes)} to spare.", "good"
    if verdict.fits:
        less = f"{needs}: {size(verdict.spare_bytes)} to spare, less than the count's {MARGIN:.0%}."
        return "It may fit.", less, "open"
    return "It does not fit.", f"{needs}: {size(-verdict.spare_bytes)} too much.", "bad"


def offer_table(plan: Forecast) -> Table:
    """What would make it fit or, where it has room, faster; a line of a cell for each change."""
    title, price, offers = "What would make it fit, cheapest first", "at the price of", plan.offers
    if plan.faster is not None:
        title, price, offers = "What would be faster, and fit too", "costs now", [plan.faster]
    rows = [
        (
            "\n".join(change.words for change in offer.changes),
            f"{size(offer.verdict.need_bytes)}, {size(offer.verdict.spare_bytes)} to spare",
            "\n".join(offer.prices),
        )
        for offer in offers
    ]
    return Table(title, ("change", "then takes", price), rows, 3)


def data_table(plan: Forecast) -> Table:
    data, inputs, ways = plan.data, plan.inputs, plan.recipe.cache.cache_variants
    mean, high, most = data.step_tokens
    held_out, apart = f"{len(inputs.held_out):,} held out", plan.recipe.data.validation_data_meta
    rows = [
        (
            "entries",
            f"{inputs.scan.entries:,}: {len(inputs.train):,} to train on"
            + (f", {held_out}" if apart is None else f"; {held_out}, of {apart}"),
        ),
        ("left out", f"{len(plan.left_out):,}"),
        ("samples in the first epoch", f"{data.samples:,}"),
        ("repeats", f"{plan.repeated:.1%} of the run's samples at most, to fill its last groups"),
        ("tokens per optimizer step", f"{mean:,.0f} on average, 95 % up to {high:,.0f}, {most:,.0f} at most"),
        ("cropped", f"{data.cropped:.0%} of samples; {data.picture_lost:.1%} of the picture is lost on average"),
        ("footage seen in the first epoch", span(data.footage_s)),
        ("ways of reading a clip", f"{ways} (cache_variants)" if ways else "new ones at every use"),
        ("steps", f"{plan.steps:,}"),
        ("learning rate", str(plan.rates)),
    ]
    return Table("Data", ("", ""), rows, words=2)


def size_table(plan: Forecast) -> Table:
    buckets = plan.data.buckets
    rows = [
        (
            bucket.aspect,
            f"{bucket.side}",
            f"{bucket.shape.frames}",
            f"{bucket.shape.width} x {bucket.shape.height}",
            f"{bucket.tokens:,}",
            f"{bucket.samples:,}",
            f"{bucket.samples / plan.data.samples:.1%}",
        )
        for bucket in buckets[:LISTED]
    ]
    rest = buckets[LISTED:]
    note = f"and {len(rest)} smaller sizes with {sum(b.samples for b in rest):,} samples" if rest else ""
    return Table(
        "Sizes, largest first", ("aspect", "side", "frames", "pixels", "tokens", "samples", "share"), rows, 1, note
    )


def left_out_table(plan: Forecast) -> Table:
    more = len(plan.left_out) - LISTED
    note = f"and {more:,} more; reeltune check lists all" if more > 0 else ""
    return Table("Left out", ("entry", "why"), plan.left_out[:LISTED], 2, note)


def memory_table(plan: Forecast) -> Table:
    phases = [phase for phase in PHASES if phase in plan.peaks]
    rows = [
        (words, *(size(plan.peaks[phase].get(part, 0)) for phase in phases))
        for part, words in PARTS.items()
        if any(plan.peaks[phase].get(part) for phase in phases)
    ]
    rows.append(("together", *(size(sum(plan.peaks[phase].values())) for phase in phases)))
    kept = ", ".join(f"{size(count)} {words}" for words, count in plan.kept_bytes.items())
    engine = plan.engine
    how = "" if engine in ("one", "ddp") else ", sharded by arithmetic"
    note = f"{ENGINES[engine].words}{how}. Activations kept for the backward pass: {kept}."
    return Table("Memory of each device at its fullest, by phase", ("", *(PHASES[p] for p in phases)), rows, 1, note)


def other_memory(plan: Forecast) -> Table:
    rows = [("host: " + name, size(count)) for name, count in plan.host_bytes.items()]
    rows += [("disk: " + name, size(count)) for name, count in plan.disk_bytes.items()]
    return Table("Host and disk", ("", ""), rows)


def time_table(plan: Forecast) -> Table:
    step_flops = plan.step_flops
    whole = sum(step_flops.values())
    rows = [
        (f"{PHASES[phase]} of a mean micro-step", f"{rounded(flops / 1e12)} TFLOP", f"{flops / whole:.0%}")
        for phase, flops in step_flops.items()
    ]
    rows.append((f"all {plan.steps:,} steps", f"{rounded(plan.run_flops / 1e15)} PFLOP", ""))
    note = "No throughput is known for this device: give --throughput or --measured for the time."
    if (throughput := plan.throughput) is not None:
        least, most = seconds(plan.run_flops, throughput, plan.machines.gpus)
        time = span(least) if most < 1.01 * least else f"{span(least)} to {span(most)}"
        rows.append(("time for them", time, ""))
        rates = (throughput.low, throughput.high)
        rate = " to ".join(dict.fromkeys(rounded(flops_per_s / 1e12) for flops_per_s in rates))
        note = f"At {rate} TFLOP/s of each device: {throughput.source}."
    if (changes := plan.expert_changes) is not None:
        rows += expert_rows(changes)
    return Table("Time", ("", "", ""), rows, 1, note)


def expert_rows(changes: Changes) -> list[tuple[str, str, str]]:
    each = f"{size(changes.sent_bytes)} each time"
    rows = [(f"experts change places {changes.count:,} times, between device and host", each, "")]
    if changes.seconds is not None:
        least, most = changes.seconds
        rows.append(("time for that, beside the steps", f"{span(least)} to {span(most)}", ""))
    return rows


def size(count: float) -> str:
    """Bytes in GB, as devices are sold."""
    return f"{count / 1e9:,.1f} GB" if count >= 5e8 else f"{count / 1e6:,.1f} MB"


def rounded(number: float) -> str:
    """A number with three digits that count, and commas between thousands."""
    return f"{float(f'{number:.3g}'):,.10g}"


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    if seconds < 48 * 3600:
        return str(timedelta(seconds=round(seconds)))
    return f"{seconds / 86400:,.1f} days"


def show(plan: Forecast, console: Console) -> None:
    console.print(f"[bold]{plan.estimator.family.name}[/], train_mode {plan.estimator.mode}")
    for table in tables(plan):
        console.print()
        console.print(_drawn(table))
        if table.note:
            console.print(table.note, style="dim", highlight=False)
    answer, reason, tone = verdict_lines(plan)
    console.print(f"\n[bold {TONES[tone]}]{answer}[/] {reason}", highlight=False)
    if (offered := offer_table(plan)).rows:
        console.print()
        console.print(_drawn(offered))
    elif not plan.verdict.safe:
        console.print("No change of this recipe that is known here makes it fit.")


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(title=table.title or None, show_header=any(table.heads), box=None, pad_edge=False)
    for i, head in enumerate(table.heads):
        drawn.add_column(head, justify="left" if i < table.words else "right", overflow="fold")
    for row in table.rows:
        for line in zip_longest(*(cell.split("\n") for cell in row), fillvalue=""):
            drawn.add_row(*line)
    return drawn


# ---- as a page

COLOURS = {  # colour -> (what it stands for, its parts)
    "now": ("weights", ("weights", "masters", "still", "gathered", "other", "casts")),
    "start": ("gradients", ("gradients", "buckets")),
    "optimizer": ("optimizer state and average", ("optimizer", "average")),
    "encode": ("frozen networks", ("frozen",)),
    "data": ("activations, and what is at work", ("activations", "encode", "forward", "backward", "step", "preview")),
    "muted": ("batch and conditions", ("batch",)),
}
MARK, HEAD_BYTES = b"<span>train_mode ", 2**16  # of a page, and in how much of it
LEGEND = [(colour, words) for colour, (words, _) in COLOURS.items()]


def write_page(plan: Forecast, path: Path) -> Path:
    """The tables, and pictures of memory and sizes, in one file that needs no other."""
    answer, reason, tone = verdict_lines(plan)
    template = report.environment().get_template("estimate/plan.html")
    page = template.render(
        plan=plan,
        engine=ENGINES[plan.engine].words,
        tone=tone,
        answer=answer,
        reason=reason,
        offered=offer_table(plan),
        memory=Markup(memory_chart(plan)),
        legend=LEGEND,
        sizes=Markup(size_chart(plan)),
        tables=tables(plan),
    )
    return report.write_whole(path, page)


def _other_file(html: Path) -> Iterator[str]:
    """Why no page is to be written there."""
    if html.suffix.lower() not in (".html", ".htm"):
        yield f"--html is {str(html)!r}; it must end in .html; give {html.stem}.html"
    elif os.path.lexists(html) and not (html.is_file() and MARK in beginning(html, HEAD_BYTES)):
        yield f"--html is {str(html)!r}, which is there and is no page of reeltune plan; give another name"


def memory_chart(plan: Forecast) -> str:
    rows = [
        (
            PHASES[phase],
            [(colour, sum(parts.get(part, 0) for part in named) / 1e9) for colour, (_, named) in COLOURS.items()],
        )
        for phase, parts in plan.peaks.items()
    ]
    return charts.stacked(rows, plan.verdict.have_bytes / 1e9, "memory of each device by phase", "GB")


def size_chart(plan: Forecast) -> str:
    by_tokens: Counter[int] = Counter()
    for bucket in plan.data.buckets:
        by_tokens[bucket.tokens] += bucket.samples
    tokens = sorted(by_tokens)
    names = [f"{count:,}" for count in tokens]
    return charts.counts(names, [by_tokens[count] for count in tokens], "samples by tokens", "tokens of a sample")


def tell(recipe: Recipe, machines: Machines, html: Path | None) -> None:
    """`reeltune plan`: prints the forecast; with `html` also writes it there. Raises UserError for another's file."""
    if html is not None:
        refuse("plan", list(_other_file(html)))
    waiting = Terminal(stderr=True)
    with waiting.status("reading measurements") as status:
        plan = forecast(recipe, machines, lambda words: status.update(f"estimating: {words}"))
        _ = plan.kept_bytes, plan.sizes, plan.offers, plan.faster  # which take long
    uncompiled = ["compile is blocks: memory and arithmetic are those of uncompiled blocks"]
    for notice in [*slow_bf16(recipe), *(uncompiled if recipe.training.compile == "blocks" else [])]:
        waiting.print(notice, highlight=False, markup=False, soft_wrap=True)
    console = Terminal()
    show(plan, console)
    if html is not None:
        console.print(f"page: {write_page(plan, html)}", highlight=False, soft_wrap=True)
