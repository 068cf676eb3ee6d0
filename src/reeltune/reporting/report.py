"""The run as one HTML page that needs nothing beside itself: is it learning, what does it make, what did it see."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from reeltune.config.parse import settings
from reeltune.config.rules import shown
from reeltune.core.files import whole_file
from reeltune.core.reading import WHOLE, Kind, as_user_error, read_table, read_yaml, require_fields
from reeltune.reporting import charts, obedience
from reeltune.reporting.metrics import Metrics, read_metrics

if TYPE_CHECKING:
    import jinja2

EMBED_BYTES = 32 * 2**20  # pictures and clips beyond this are linked to instead
PROBLEM_ROWS = 100  # entries listed in the page; ledger.csv has all
TYPES = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}
PARTS = (  # of a step's time: field of metrics.jsonl, colour, name
    ("forward_backward_s", "now", "forward and backward"),
    ("optimizer_s", "optimizer", "optimizer"),
    ("encode_s", "encode", "encoding"),
    ("data_s", "data", "waiting for data"),
)


def write(output_dir: Path) -> Path:
    """Reads what a run left in its folder and writes report.html there. Whatever is not there is left out."""
    run = Path(output_dir)
    metrics = read_metrics(run / "metrics.jsonl")
    album = Album(run, EMBED_BYTES)
    recipe = recipe_rows(run / "recipe.yaml")
    with as_user_error(run, "metrics.jsonl or previews are not as a run writes them", RESTORE):
        learning = verdict(metrics)
        page = (
            environment()
            .get_template("reporting/report.html")
            .render(
                name=run.resolve().name,
                run=table_of(run / "run.json", OF_RUN),
                verdict=learning,
                obeys=obedience.verdict(metrics.obedience, loss_falls=learning["tone"] == "good"),
                numbers=headline(metrics),
                previews=read_previews(run, album, metrics.obedience),
                unmeasured="" if metrics.obedience else obedience.UNMEASURED,
                curves=curves(metrics),
                split=time_split(metrics),
                first_batch=first_batch(run, album),
                ledger=table_of(run / "ledger.json", OF_LEDGER),
                problem_rows=PROBLEM_ROWS,
                recipe=recipe,
                notices=metrics.notices,
                saves=metrics.saves,
                linked=album.linked,
            )
        )
    return write_whole(run / "report.html", page)


def write_whole(path: Path, page: str) -> Path:
    """Returns the path. The file is there whole or not at all."""
    with whole_file(path) as file:
        file.write(page)
    return path


def verdict(metrics: Metrics) -> dict[str, str]:
    """Is it learning? The held-out loss answers if its 95 % band leaves zero out; a training loss alone cannot."""
    after = [row for row in metrics.validations if row["step"] > row["start_step"]]
    if not after:
        return {
            "tone": "open",
            "answer": "Nobody can say yet.",
            "reason": "No held-out loss was measured after training began, and a training loss alone is no proof. "
            "Set held_out_share or validation_data_meta.",
        }
    last = after[-1]
    low, high = last["band95"] or (-math.inf, math.inf)
    tone, answer = "open", "Not shown yet."
    if high < 0:
        tone, answer = "good", "It is learning."
    elif low > 0:
        tone, answer = "bad", "It got worse."
    start, now = f"{last['loss_start']:.4f}", f"{last['loss']:.4f}"
    moved = (
        f"stayed at {now}" if start == now else f"{'fell' if last['difference'] < 0 else 'rose'} from {start} to {now}"
    )
    reason = (
        f"On clips it never trained on, the loss {moved} between "
        f"step {last['start_step']} and step {last['step']}, with the same noise: "
    )
    if last["band95"] is None:
        reason += "on one clip alone, which may be chance. Hold out more clips."
    else:
        reason += (
            f"a mean change of {_signed(last['difference'])}, 95 % band {_signed(low)} to {_signed(high)}, "
            f"over {last['n']} clips."
        )
        if tone == "open":
            reason += " The band holds zero, so this may be chance: train longer, or hold out more clips."
    for one in last.get("experts", ()):
        reason += f" Expert {one['expert']} at its own levels: {_signed(one['difference'])}"
        reason += f", 95 % band {' to '.join(map(_signed, one['band95']))}." if one["band95"] else "."
    return {"tone": tone, "answer": answer, "reason": reason}


def headline(metrics: Metrics) -> list[dict[str, str]]:
    """The few numbers at the top: what, value, and what it was at the start."""
    told, steps = [], metrics.steps
    if metrics.validations:
        last = metrics.validations[-1]
        named = {"held-out loss": last, **{f"of expert {one['expert']}": one for one in last.get("experts", ())}}
        for what, one in named.items():
            told.append({"what": what, "now": f"{one['loss']:.4f}", "start": f"{one['loss_start']:.4f}"})
    if metrics.obedience:
        told.append(obedience.number(metrics.obedience[-1]))
    if steps:
        tenth = math.ceil(len(steps["loss"]) / 10)
        told.append(
            {
                "what": "training loss",
                "now": f"{_mean(steps['loss'][-tenth:]):.4f}",
                "start": f"{_mean(steps['loss'][:tenth]):.4f}",
                "note": f"mean of the last and first {tenth}" if tenth > 1 else "last and first step",
            }
        )
    if steps:
        samples = f"{sum(steps['samples']):,}"
        told.append({"what": "steps", "now": f"{steps['step'][-1]:,}", "note": f"{samples} samples, {_took(steps)}"})
    return told


def curves(metrics: Metrics) -> list[dict]:
    drawn, steps, validations, obeyed = [], metrics.steps, metrics.validations, metrics.obedience
    size = charts.THIRD if validations and obeyed else charts.HALF
    if obeyed:
        svg = charts.paired(obeyed, "score", "obedience by step", size)
        drawn.append({"title": "Obedience", "kind": "pair", "svg": svg})
    if validations:
        svg = charts.paired(validations, "loss", "held-out loss by step", size)
        drawn.append({"title": "Held-out loss", "kind": "pair", "svg": svg})
        svg = charts.noise_bands(validations[-1]["per_band"], size)
        drawn.append({"title": "By noise level", "kind": "bars", "svg": svg})
    for whose, own in by_expert(steps).items():
        drawn += [
            {"title": f"{title}{whose}", "kind": "line", "svg": draw(own["step"], own[name], f"{title}{whose}")}
            for name, title, draw in (
                ("loss", "Training loss", charts.noisy),
                ("grad_norm", "Gradient norm", charts.noisy),
                ("lr", "Learning rate", charts.exact),
                ("d", "Rate that Prodigy found, times which the learning rate counts", charts.exact),
            )
            if name in own
        ]
    return [{**curve, "svg": Markup(curve["svg"]), "wide": size == charts.HALF} for curve in drawn]


def by_expert(steps: Mapping[str, Sequence]) -> dict[str, Mapping[str, Sequence]]:
    """The steps of each of two networks that learn in turns, by words for a title; "": of the only one."""
    if "expert" not in steps:
        return {"": steps}
    whose = steps["expert"]
    return {
        f", expert {expert}": {
            name: [value for value, its in zip(values, whose, strict=True) if its == expert]
            for name, values in steps.items()
        }
        for expert in sorted(set(whose))
    }


def time_split(metrics: Metrics) -> dict | None:
    """Shares of the run's time by part, and the stacked chart."""
    steps = metrics.steps
    if "step_s" not in steps:
        return None
    whole_s = sum(steps["step_s"])
    parts = [(colour, steps[name]) for name, colour, _ in PARTS]
    known_mfu = [value for value in steps.get("mfu", ()) if value is not None]
    return {
        "svg": Markup(charts.time_split(steps["step"], parts)),
        "shares": [
            {"name": told, "colour": colour, "share": sum(steps[name]) / whole_s} for name, colour, told in PARTS
        ],
        "rates": {
            "per step": f"{whole_s / len(steps['step_s']):.3g} s",
            "samples": f"{sum(steps['samples']) / whole_s:,.3g} / s",
            "tokens": f"{sum(steps['tokens']) / whole_s:,.0f} / s",
            **({"MFU": f"{100 * _mean(known_mfu):.0f} %"} if known_mfu else {}),
            **({"peak memory": size_text(max(steps["peak_memory_bytes"]))} if "peak_memory_bytes" in steps else {}),
        },
    }


def read_previews(run: Path, album: Album, obeyed: Sequence[dict]) -> list[dict]:
    """What the report shows of each preview: control, before and after training, ground truth; prompt, seed and
    settings; how far it obeys.

    obeyed: the rows of obedience.
    """
    folders = {int(path.name.removeprefix("step-")): path for path in (run / "previews").glob("step-*")}
    if not folders:
        return []
    first, last = min(folders), max(folders)
    found = []
    for i, told in enumerate(sorted(folders[last].glob("*.json"), key=lambda path: int(path.stem))):
        settings = table_of(told)
        clips = [("control", run / "previews/control" / f"{told.stem}.mp4")]
        if first < last:
            name = "before training" if first == 0 else f"step {first}"
            clips.append((name, folders[first] / f"{told.stem}.mp4"))
        name = "the starting weights" if last == 0 else f"after {last} steps"
        clips.append((name, folders[last] / f"{told.stem}.mp4"))
        clips.append(("ground truth", run / "previews/truth" / f"{told.stem}.mp4"))
        found.append(
            {
                "prompt": settings.pop("prompt", ""),
                "control": clips[0][1].exists(),
                "settings": {name: short(value) for name, value in settings.items() if value not in (None, "")},
                "clips": [{"what": what, **album.place(path)} for what, path in clips if path.exists()],
                "obedience": obedience.of_preview(obeyed, i),
            }
        )
    return found


def first_batch(run: Path, album: Album) -> list[dict]:
    """The pictures, clips and text of each sample, as the network was given them."""
    samples: dict[str, dict] = {}
    order = ("pixels", "control", "reference")  # what else there is follows
    for path in sorted((run / "first_batch").glob("*_*")):
        index, _, what = path.stem.partition("_")
        sample = samples.setdefault(index, {"media": [], "text": ""})
        if path.suffix == ".txt":
            sample["text"] = path.read_text(encoding="utf-8").strip()
        elif path.suffix in TYPES:
            sample["media"].append({"what": what, **album.place(path)})
    for sample in samples.values():
        sample["media"].sort(key=lambda item: order.index(item["what"]) if item["what"] in order else len(order))
    return [samples[index] for index in sorted(samples, key=int)]


class Album:
    """Pictures and clips put into the page, until it is full; the rest is linked to by its place in the folder."""

    def __init__(self, run: Path, room_bytes: int):
        self.run, self.room_bytes = run, room_bytes
        self.linked: list[str] = []

    def place(self, path: Path) -> dict[str, str]:
        size_bytes = path.stat().st_size
        link = path.relative_to(self.run).as_posix()
        if size_bytes > self.room_bytes:
            self.linked.append(link)
            return {"link": link, "size": size_text(size_bytes)}
        self.room_bytes -= size_bytes
        data = base64.b64encode(path.read_bytes()).decode()
        return {"type": TYPES[path.suffix], "data": f"data:{TYPES[path.suffix]};base64,{data}"}


def recipe_rows(path: Path) -> dict[str, list[tuple[str, str]]]:
    """The recipe as (field, value), those that differ from the defaults apart."""
    if not path.exists():
        return {}
    usual = {name: setting.default for name, setting in settings().items()}
    chosen, left = [], []
    for name, value in read_yaml(path, "a recipe", typed=True).items():
        value = tuple(value) if isinstance(value, list) else value
        (left if name in usual and usual[name] == value else chosen).append((name, shown(value)))
    return {"chosen": chosen, "left": left}


@cache
def environment() -> jinja2.Environment:
    """The templates of this package's pages."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reeltune", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = size_text
    return environment


RESTORE = "restore it from a copy, or delete it"
OF_RUN = {"trainable": WHOLE, "parameters": WHOLE}  # what is shown of run.json, once a run has begun
PLACES = ("used", "not_reached", "held_out", "left_out")
OF_LEDGER = {
    **dict.fromkeys(("entries", *PLACES, "samples", "samples_repeated", "most_used"), WHOLE),
    "problems": Kind(lambda value: isinstance(value, dict), "a table").many(),
}


def table_of(path: Path, kinds: Mapping[str, Kind] | None = None) -> dict:
    """A JSON file's table, empty where there is none. kinds: of the fields that are shown, all or none."""
    table = read_table(path, RESTORE) if path.exists() else {}
    if kinds is None:
        return table
    if not table.keys() & kinds.keys():
        return {}
    require_fields(table, kinds, path, RESTORE)
    return table


def short(value: object) -> str:
    return Path(value).name if isinstance(value, str) else str(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0:+.4f}".replace("-", "−")  # + 0: no minus before zero


def _took(steps: dict[str, list]) -> str:
    return str(timedelta(seconds=round(sum(steps["step_s"])))) if "step_s" in steps else "untimed"


def size_text(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
