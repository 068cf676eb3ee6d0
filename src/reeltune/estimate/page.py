"""A forecast as tables, on the terminal and, with pictures, as one HTML page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.table import Table as RichTable

from reeltune.config.recipe import Recipe
from reeltune.estimate import throughput
from reeltune.estimate.main import Forecast, Machines, forecast
from reeltune.estimate.remedies import MARGIN
from reeltune.estimate.result import PARTS, PHASES
from reeltune.estimate.sharding import ENGINES
from reeltune.reporting import charts, report

LISTED = 12  # rows of a table of clips or sizes; what is more is counted


@dataclass(frozen=True)
class Table:
    """Rows of text under heads; numbers are those of all columns but the first `words`."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1
    note: str = ""


def tables(found: Forecast) -> list[Table]:
    return [
        data_table(found),
        size_table(found),
        *left_out_tables(found),
        memory_table(found),
        other_memory(found),
        time_table(found),
    ]


def verdict_lines(found: Forecast) -> tuple[str, str]:
    """(the answer, its reason)"""
    verdict, machines = found.verdict, found.machines
    where = f"one {machines.device}" if machines.gpus == 1 else f"each of {machines.gpus} x {machines.device}"
    frames, height, width = found.largest
    needs = (
        f"The fullest moment is the {PHASES[verdict.phase]} of the largest step ({found.batch} x {frames} frames of "
        f"{width} x {height}), which takes {size(verdict.need_bytes)} of {size(verdict.have_bytes)} on {where}"
    )
    if verdict.safe:
        return "It fits.", f"{needs}: {size(verdict.spare_bytes)} to spare."
    if verdict.fits:
        return "It may fit.", f"{needs}: {size(verdict.spare_bytes)} to spare, less than the count's {MARGIN:.0%}."
    return "It does not fit.", f"{needs}: {size(-verdict.spare_bytes)} too much."


def offer_rows(found: Forecast) -> list[tuple[str, str, str]]:
    """(changes, what is then needed, price), the cheapest first."""
    return [
        (
            "\n".join(change.words for change in offer.changes),
            f"{size(offer.verdict.need_bytes)}, {size(offer.verdict.spare_bytes)} to spare",
            "\n".join(offer.prices),
        )
        for offer in found.offers
    ]


def data_table(found: Forecast) -> Table:
    data, inputs = found.data, found.inputs
    mean, high, most = data.step_tokens
    rows = [
        (
            "entries",
            f"{inputs.scan.entries:,}: {len(inputs.train):,} to train on, {len(inputs.held_out):,} held out",
        ),
        ("left out", f"{len(found.left_out):,}"),
        ("samples in an epoch", f"{data.samples:,}, of which {data.repeated:.1%} repeated to fill groups"),
        ("tokens per optimizer step", f"{mean:,.0f} on average, 95 % up to {high:,.0f}, {most:,.0f} at most"),
        ("cropped", f"{data.cropped:.0%} of samples; {data.picture_lost:.1%} of the picture is lost on average"),
        ("footage seen in an epoch", span(data.footage_s)),
        ("ways of reading a clip", f"{found.ways} (cache_variants)" if found.ways else "new ones at every use"),
        ("steps", f"{found.steps:,}"),
    ]
    return Table("Data", ("", ""), rows, words=2)


def size_table(found: Forecast) -> Table:
    buckets = found.data.buckets
    rows = [
        (
            bucket.aspect,
            f"{bucket.side}",
            f"{bucket.shape.frames}",
            f"{bucket.shape.width} x {bucket.shape.height}",
            f"{bucket.tokens:,}",
            f"{bucket.samples:,}",
            f"{bucket.samples / found.data.samples:.1%}",
        )
        for bucket in buckets[:LISTED]
    ]
    rest = buckets[LISTED:]
    note = f"and {len(rest)} smaller sizes with {sum(b.samples for b in rest):,} samples" if rest else ""
    return Table(
        "Sizes, largest first", ("aspect", "side", "frames", "pixels", "tokens", "samples", "share"), rows, 1, note
    )


def left_out_tables(found: Forecast) -> list[Table]:
    if not found.left_out:
        return []
    more = len(found.left_out) - LISTED
    note = f"and {more:,} more; reeltune check lists all" if more > 0 else ""
    return [Table("Left out", ("entry", "why"), found.left_out[:LISTED], 2, note)]


def memory_table(found: Forecast) -> Table:
    phases = [phase for phase in PHASES if phase in found.peaks]
    rows = [
        (words, *(size(found.peaks[phase].get(part, 0)) for phase in phases))
        for part, words in PARTS.items()
        if any(found.peaks[phase].get(part) for phase in phases)
    ]
    rows.append(("together", *(size(sum(found.peaks[phase].values())) for phase in phases)))
    kept = [f"{size(found.kept_bytes[on])} {'with' if on else 'without'}" for on in (True, False)]
    engine = ENGINES[found.engine].words
    how = "" if found.engine in ("one", "ddp") else ", sharded by arithmetic"
    note = f"{engine}{how}. Activations kept for the backward pass: {kept[0]} gradient_checkpointing, {kept[1]}."
    return Table("Memory of each device at its fullest, by phase", ("", *(PHASES[p] for p in phases)), rows, 1, note)


def other_memory(found: Forecast) -> Table:
    rows = [("host: " + name, size(count)) for name, count in found.host_bytes.items()]
    rows += [("disk: " + name, size(count)) for name, count in found.disk_bytes.items()]
    return Table("Host and disk", ("", ""), rows)


def time_table(found: Forecast) -> Table:
    whole = sum(found.step_flops.values())
    rows = [
        (f"{PHASES[phase]} of a mean micro-step", f"{rounded(flops / 1e12)} TFLOP", f"{flops / whole:.0%}")
        for phase, flops in found.step_flops.items()
    ]
    rows.append((f"all {found.steps:,} steps", f"{rounded(found.run_flops / 1e15)} PFLOP", ""))
    note = "No throughput is known for this device: give --throughput or --measured for the time."
    if found.throughput is not None:
        least, most = throughput.seconds(found.run_flops, found.throughput, found.machines.gpus)
        told = span(least) if most < 1.01 * least else f"{span(least)} to {span(most)}"
        rows.append(("time for them", told, ""))
        rates = (found.throughput.low, found.throughput.high)
        told = " to ".join(dict.fromkeys(rounded(rate / 1e12) for rate in rates))
        note = f"At {told} TFLOP/s of each device: {found.throughput.source}."
    return Table("Time", ("", "", ""), rows, 1, note)


def size(count: float) -> str:
    """Bytes in GB, as devices are sold."""
    return f"{count / 1e9:,.1f} GB" if count >= 5e8 else f"{count / 1e6:,.1f} MB"


def rounded(number: float) -> str:
    """To three digits."""
    return f"{float(f'{number:.3g}'):,.10g}"


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    if seconds < 48 * 3600:
        return str(timedelta(seconds=round(seconds)))
    return f"{seconds / 86400:,.1f} days"


def show(found: Forecast, console: Console) -> None:
    console.print(f"[bold]{found.model}[/], train_mode {found.mode}")
    for table in tables(found):
        console.print()
        console.print(_drawn(table))
        if table.note:
            console.print(table.note, style="dim", highlight=False)
    answer, reason = verdict_lines(found)
    tone = "green" if found.verdict.safe else "yellow" if found.verdict.fits else "red"
    console.print(f"\n[bold {tone}]{answer}[/] {reason}", highlight=False)
    if found.offers:
        heads = ("what would make it fit, cheapest first", "then takes", "at the price of")
        console.print(_drawn(Table("", heads, offer_rows(found), 3)))
    elif not found.verdict.safe:
        console.print("No change of this recipe that is known here makes it fit.")


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(title=table.title or None, show_header=any(table.heads), box=None, pad_edge=False)
    for i, head in enumerate(table.heads):
        drawn.add_column(head, justify="left" if i < table.words else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


# ---- as a page

COLOURS = {  # colour -> (what it stands for, its parts)
    "now": ("weights", ("weights", "masters", "still", "gathered", "casts")),
    "start": ("gradients", ("gradients", "buckets")),
    "optimizer": ("optimizer state and average", ("optimizer", "average")),
    "encode": ("frozen networks", ("frozen",)),
    "data": ("activations, and what is at work", ("activations", "encode", "forward", "backward", "step", "preview")),
    "muted": ("batch and conditions", ("batch",)),
}


def write_page(found: Forecast, path: Path) -> Path:
    """The tables, and pictures of memory and sizes, in one file that needs no other."""
    answer, reason = verdict_lines(found)
    page = (
        report.environment()
        .get_template("estimate/plan.html")
        .render(
            name=found.model,
            mode=found.mode,
            machines=found.machines,
            engine=ENGINES[found.engine].words,
            tone="good" if found.verdict.safe else "open" if found.verdict.fits else "bad",
            answer=answer,
            reason=reason,
            offers=offer_rows(found),
            memory=Markup(memory_chart(found)),
            legend=[(colour, words) for colour, (words, _) in COLOURS.items()],
            sizes=Markup(size_chart(found)),
            tables=tables(found),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return report.write_whole(path, page)


def memory_chart(found: Forecast) -> str:
    rows = [
        (
            PHASES[phase],
            [(colour, sum(parts.get(part, 0) for part in named) / 1e9) for colour, (_, named) in COLOURS.items()],
        )
        for phase, parts in found.peaks.items()
    ]
    return charts.stacked(rows, found.verdict.have_bytes / 1e9, "memory of each device by phase", "GB")


def size_chart(found: Forecast) -> str:
    by_tokens: Counter[int] = Counter()
    for bucket in found.data.buckets:
        by_tokens[bucket.tokens] += bucket.samples
    tokens = sorted(by_tokens)
    names = [f"{count:,}" for count in tokens]
    return charts.counts(names, [by_tokens[count] for count in tokens], "samples by tokens", "tokens of a sample")


def tell(recipe: Recipe, machines: Machines, html: Path | None) -> None:
    """`reeltune plan`: prints the forecast; with `html` also writes it there."""
    waiting = Console(stderr=True)
    with waiting.status("reading measurements") as status:
        found = forecast(recipe, machines, lambda words: status.update(f"estimating: {words}"))
    console = Console()
    show(found, console)
    if html is not None:
        console.print(f"page: {write_page(found, html)}", highlight=False, soft_wrap=True)
