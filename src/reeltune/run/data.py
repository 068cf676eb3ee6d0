"""The data that a recipe asks for: scanned, split, planned, readable, and its account opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress

from reeltune.config.recipe import Recipe
from reeltune.core.terminal import Terminal
from reeltune.data.held_out import refuse_shared, split
from reeltune.data.loader import Reader
from reeltune.data.metadata import LeftOut
from reeltune.data.plan import Plan, refuse_empty, sampled_lengths, strata_over
from reeltune.data.records import Records
from reeltune.data.scan import Scan, scan
from reeltune.data.shapes import SizeRules, lone_frames
from reeltune.families.captions import cut_captions
from reeltune.families.spec import Family
from reeltune.reporting.ledger import Ledger
from reeltune.run.machine import usable_cores
from reeltune.run.sizes import short_clips, size_rules, suited

FILE_INPUTS = frozenset({"control", "camera"})  # what a mode may need that comes from a file of its own


@dataclass(frozen=True)
class Inputs:
    scan: Scan
    unsuited: list[LeftOut]  # sound entries of train_data_meta that teach this model nothing
    train: Records
    held_out: Records
    rules: SizeRules
    plan: Callable[[int], Plan]  # epoch -> its plan
    reader: Reader  # of `train`
    held_out_reader: Reader


def gather(
    recipe: Recipe,
    family: Family,
    mode: str,
    *,
    group: int | None = None,
    groups_run_on: bool = True,
    show_progress: bool = True,
    just_scanned: bool = False,
) -> Inputs:
    """Scans (with a progress bar on stderr), splits and plans. Raises UserError for unusable data.

    group: samples of a micro-step over all processes; those of one process, if not given. groups_run_on: as of Plan.
    just_scanned: another process of this run has; its index is taken, and no file is looked at.
    """
    data, needs = recipe.data, FILE_INPUTS & set(family.needs[mode])
    rules = size_rules(recipe, family)
    scanned = partial(_scanned, recipe, needs, show_progress=show_progress, just_scanned=just_scanned)
    train_scan = scanned(data.train_data_meta)
    usable, unsuited = suited(train_scan.records, rules, family.least_frames)
    notices = [*train_scan.notices, *lone_frames(rules), *short_clips(usable, rules)]
    notices += [] if just_scanned else cut_captions(family, named_captions(usable))
    if data.validation_data_meta is not None:
        train, held_out_scan = usable, scanned(data.validation_data_meta)
        held_out, short = suited(held_out_scan.records, rules, family.least_frames)
        refuse_shared(train, held_out)
        lines = [*map(str, held_out_scan.left_out), *map(str, short), *held_out_scan.notices]
        lines += short_clips(held_out, rules)
        lines += [] if just_scanned else cut_captions(family, named_captions(held_out))
        notices += [f"{Path(data.validation_data_meta).name}: {line}" for line in lines]
    else:
        rows = split(usable, data.held_out_share, str(Path(data.train_data_dir)))
        train, held_out = (usable.take(part) for part in rows)
    group = group or recipe.training.train_batch_size
    plan = partial(
        Plan,
        train,
        rules,
        group=group,
        seed=recipe.training.seed,
        strata=strata_over(group) if recipe.loss.uniform_sampling else 1,
        video_repeat=data.video_repeat,
        largest_first=True,
        variants=recipe.cache.cache_variants,
        runs_on=groups_run_on,
    )
    if not sampled_lengths(train, rules).any():
        refuse_empty(plan(0), train)
    reader = partial(
        Reader, plan=plan, group=group, needs=frozenset(family.needs[mode]), mask_law=family.masks.get(mode)
    )
    return Inputs(
        scan=replace(train_scan, notices=notices),
        unsuited=unsuited,
        train=train,
        held_out=held_out,
        rules=rules,
        plan=plan,
        reader=reader(train, drop=family.drop, text_drop_ratio=data.text_drop_ratio),
        held_out_reader=reader(held_out, drop=dict.fromkeys(family.drop, 0.0), text_drop_ratio=0.0),
    )


def _scanned(recipe: Recipe, needs: frozenset[str], meta: str, *, show_progress: bool, just_scanned: bool) -> Scan:
    """The clips of a list."""
    data = recipe.data
    columns, console = (*Progress.get_default_columns(), MofNCompleteColumn()), Terminal(stderr=True)
    shown = show_progress and console.is_terminal  # elsewhere a transient bar leaves an empty line
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task(f"scan {Path(meta).name}", total=None)
        return scan(
            Path(meta),
            Path(data.train_data_dir),
            needs=needs,
            decode_check=data.decode_check,
            allow_outside_paths=data.allow_outside_paths,
            max_bad_share=data.max_bad_share,
            index_dir=Path(recipe.output.output_dir) / "index",
            workers=usable_cores(),
            progress=lambda done, files: bar.update(task, completed=done, total=files),
            just_scanned=just_scanned,
        )


def named_captions(records: Records) -> Iterator[tuple[str, str]]:
    return ((f"entry {entry}", text) for entry, text in zip(records.entry, records.column("text"), strict=True))


def ledger_of(recipe: Recipe, inputs: Inputs) -> Ledger:
    """The account of train_data_meta's entries, nothing used yet."""
    unplanned = [
        LeftOut(inputs.train[record].entry, inputs.train[record].path, reason, "use longer clips or a smaller stride")
        for record, reason in inputs.plan(0).left_out
    ]
    return Ledger(
        inputs.scan.entries,
        inputs.train,
        held_out=inputs.held_out if recipe.data.validation_data_meta is None else None,
        left_out=[*inputs.scan.left_out, *unplanned],
        unsuited=inputs.unsuited,
        max_bad_share=recipe.data.max_bad_share,
        root=Path(recipe.data.train_data_dir),
    )
