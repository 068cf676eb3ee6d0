"""What training would do with each entry of a list: measured, split and planned by the functions that training uses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from markupsafe import Markup

from reeltune.config.parse import build, read
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.types import Record
from reeltune.data.records import Records
from reeltune.data.scan import Scan, scan
from reeltune.data.shapes import clip_length
from reeltune.estimate.epoch import Bucket, forecast_data
from reeltune.families.captions import names_of_cut
from reeltune.families.spec import Family
from reeltune.page.svg import without_styles
from reeltune.reporting import charts
from reeltune.run.data import Inputs, gather
from reeltune.run.machine import usable_cores
from reeltune.run.model import choose_family


@dataclass
class Judged:
    """What training would do with a list, by its entries."""

    records: dict[int, Record]
    reasons: dict[int, str]  # why an entry is left out
    kept: dict[str, np.ndarray]  # filter -> its entries, ascending
    notices: list[str]
    buckets: list[Bucket] = field(default_factory=list)  # of the first epoch, most tokens first
    micro_steps: int = 0  # of an epoch
    inputs: Inputs | None = None
    family: Family | None = None
    mode: str = ""

    @cached_property
    def histogram(self) -> Markup | None:
        """Samples by size; drawn once."""
        if not self.buckets:
            return None
        names = [f"{b.shape.width}x{b.shape.height}x{b.shape.frames}" for b in self.buckets]
        samples = [bucket.samples for bucket in self.buckets]
        svg = charts.counts(names, samples, "samples of an epoch by size", "width x height x frames")
        return without_styles(svg)


def by_scan(meta: Path, data_dir: Path, store: Path) -> Judged:
    """Judges a list without a recipe: what can be used at all. Raises UserError for a list of which nothing can."""
    found = scan(
        meta,
        data_dir,
        needs=frozenset(),
        max_bad_share=1.0,
        index_dir=store / "index",
        workers=usable_cores(),
    )
    reasons = _reasons(found)
    return Judged(_by_entry(found.records), reasons, {"left_out": _entries(reasons)}, found.notices)


def by_recipe(recipe_path: Path, store: Path, holds: Callable[[str], bool]) -> Judged:
    """Judges a recipe's train_data_meta as a run would see it. holds: whether a path may be looked at.

    Raises UserError for what training would refuse, and for data that lies elsewhere.
    """
    recipe = _beside(build(read(recipe_path), where=str(recipe_path)), recipe_path.parent / "index", store / "index")
    data = recipe.data
    if not holds(data.train_data_dir) or data.allow_outside_paths:
        where = "allow_outside_paths is set" if data.allow_outside_paths else f"train_data_dir is {data.train_data_dir}"
        raise UserError(str(recipe_path), f"{where}: the data lies outside of what is served; serve a folder above it")
    family, mode, _ = choose_family(recipe)
    inputs = gather(recipe, family, mode, show_progress=False)
    plan = inputs.plan(0)
    forecast = forecast_data(plan, inputs.train, inputs.rules)
    times = np.bincount(plan.outline()[2].ravel(), minlength=len(inputs.train))
    reasons = _reasons(inputs.scan) | {row.entry: row.reason for row in inputs.unsuited}
    reasons |= {int(inputs.train.entry[record]): reason for record, reason in plan.left_out}
    usable = {**_by_entry(inputs.train), **_by_entry(inputs.held_out)} if _splits(recipe) else _by_entry(inputs.train)
    held_out = inputs.held_out.entry.tolist() if _splits(recipe) else []
    kept = {
        "left_out": _entries(reasons),
        "held_out": _entries(held_out),
        "repeated": _entries(inputs.train.entry[times > 1].tolist()),
        "short": _entries(_short(inputs)),
        "cut": _entries(map(int, names_of_cut(family, [(str(entry), one.text) for entry, one in usable.items()]))),
    }
    judged = Judged(
        usable, reasons, kept, inputs.scan.notices, forecast.buckets, forecast.micro_steps, inputs, family, mode
    )
    _ = judged.histogram  # before it is asked for: to draw takes longer than all else of a page
    return judged


def _splits(recipe: Recipe) -> bool:
    """Whether held-out clips are of the same list."""
    return recipe.data.validation_data_meta is None


def _beside(recipe: Recipe, known: Path, index: Path) -> Recipe:
    """The recipe with its index in the store, which begins with what a run has measured already."""
    if not index.exists() and known.is_dir() and not known.is_symlink():
        shutil.copytree(
            known, index, ignore=lambda folder, names: [n for n in names if os.path.islink(f"{folder}/{n}")]
        )
    return replace(recipe, output=replace(recipe.output, output_dir=str(index.parent)))


def _by_entry(records: Records) -> dict[int, Record]:
    return {record.entry: record for record in records}


def _reasons(found: Scan) -> dict[int, str]:
    return {row.entry: f"{row.reason}. {row.remedy}" for row in found.left_out}


def _entries(entries: Iterable[int]) -> np.ndarray:
    return np.array(sorted(entries), np.int64)


def _short(inputs: Inputs) -> list[int]:
    records, rules = inputs.train, inputs.rules
    full = rules.geometry.legal_frames(rules.video_sample_n_frames)
    lengths = np.where(records.kind_video, clip_length(rules, records.frames, records.fps), full)
    return records.entry[lengths < full].tolist()
