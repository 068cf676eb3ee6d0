"""`reeltune cache`: encodes what a recipe trains on and is measured by, once, into files.

Any number of processes may run it, together or one after another: each takes its share of the keys, by the keys
themselves, and waits for no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from reeltune.cache.entries import Item, grouped, items_of, keys_of, splits, ways
from reeltune.cache.keys import Keys, Split
from reeltune.cache.progress import ProgressBar
from reeltune.cache.store import Store, Tensors, Writer
from reeltune.config.recipe import Recipe
from reeltune.core.errors import refuse
from reeltune.core.interrupt import Interrupt
from reeltune.core.types import Batch, Described
from reeltune.data.camera import CameraError
from reeltune.data.loader import Reader, collate, read_ahead
from reeltune.data.media import MediaError
from reeltune.distributed.engine import choose_kernels, place_in_launch
from reeltune.families.spec import Family
from reeltune.run.data import Inputs, gather
from reeltune.run.folder import within_checkpoint
from reeltune.run.loading_memory import told_when_full
from reeltune.run.machine import machine_notices
from reeltune.run.model import choose_family, encode_options, load_parts, outlines

AT_WORK = ("vae_mini_batch",)  # levers that make less at once of what is encoded


class Unreadable(NamedTuple):
    path: str  # of the clip
    reason: str


Entry = tuple[str, str, Tensors | Unreadable, str]  # key, split, what it holds or why it cannot be made, of what files


def fill(recipe: Recipe) -> int:
    """Makes this process's share of the missing entries. Returns 0, or 128 + the signal that ended it.

    Raises UserError for everything that a user can mend.
    """
    folder = Path(str(recipe.cache.cache_folder))
    refuse("recipe", [f"cache_folder {line}" for line in within_checkpoint(folder)])
    rank, world, device = place_in_launch()
    choose_kernels(allow_tf32=recipe.training.allow_tf32, deterministic=recipe.training.deterministic)
    family, mode, _ = choose_family(recipe)
    inputs = gather(recipe, family, mode, show_progress=rank == 0)
    keys = keys_of(recipe, family, mode, show_progress=rank == 0)
    together = max(recipe.training.vae_mini_batch, 1)
    work = Work.of(keys, inputs, Store(folder), rank, world, together=together)
    encoder = Encoder(recipe, family, mode, inputs, device)
    ends = "ends after this entry" if rank == 0 else ""
    told: set[str] = set()  # paths of what cannot be read
    with Interrupt(ends) as interrupt, ProgressBar(work.count, shown=rank == 0, title="encode") as bar:
        for notice in [*inputs.scan.notices, *machine_notices(recipe, only_encoding=True)]:
            bar.say(notice)
        full = told_when_full(
            recipe, device, partial(outlines, recipe, family), "clips are encoded", network=False, besides=AT_WORK
        )
        with full, closing(Writer(folder, keys.facts)) as writer:  # what was made stays, whatever ends this
            for key, split, made, content in encoder.entries(work):
                if isinstance(made, Unreadable):
                    writer.fail(key, made.reason)
                    if made.path not in told:
                        bar.say(f"left out: {made.path} {made.reason}; mend it, and run reeltune cache again")
                    told.add(made.path)
                else:
                    writer.add(key, split, made, content)
                bar.advance()
                if interrupt.code:
                    break
        bar.say(f"{folder}: {writer.count} entries written ({writer.bytes / 1e9:.3g} GB), {work.there} were there")
    return interrupt.code


@dataclass
class Work:
    """What one process has to make."""

    null: str | None = None  # key
    texts: dict[str, str] = field(default_factory=dict)  # key -> caption, where a text depends on nothing else
    groups: list[list[Item]] = field(default_factory=list)  # what is read and encoded together
    there: int = 0  # entries of all processes that need not be made

    @classmethod
    def of(cls, keys: Keys, inputs: Inputs, store: Store, rank: int, world: int, *, together: int = 1) -> Work:
        """Entries that are not in the store, or whose files could not be read when last tried.

        together: clips of a group. One that lacks a clip is encoded whole, and no process shares it with another, so
        that its bits do not depend on what was there before, or on the number of processes.
        """
        work, seen = cls(), set()

        def to_do(key: str, content: str = "") -> bool:
            if key in seen:
                return False
            seen.add(key)
            there = store.has_made(key, content)
            work.there += there
            return not there

        def mine(key: str) -> bool:
            return int(key[:8], 16) % world == rank

        if to_do(keys.null) and mine(keys.null):
            work.null = keys.null

        def missing(item: Item) -> Item:
            clip, text = to_do(item.clip, item.content), to_do(item.text, item.text_content)
            if text and not keys.text_of_clip:
                if mine(item.text):
                    work.texts[item.text] = splits(inputs)[item.split][item.row].text
                text = False
            return item._replace(clip=item.clip if clip else "", text=item.text if text else "")

        for group in grouped(items_of(keys, inputs), together):
            left = [missing(item) for item in group]
            whole = any(item.clip for item in left)
            if (whole or any(item.text for item in left)) and mine(group[0].clip):
                work.groups.append([item for item in left if whole or item.text])
        return work

    @property
    def count(self) -> int:
        """Entries to make."""
        of_clips = sum(bool(item.clip) + bool(item.text) for group in self.groups for item in group)
        return (self.null is not None) + len(self.texts) + of_clips


class Encoder:
    """Groups through the functions that train. Networks are read when the first entry needs them."""

    def __init__(self, recipe: Recipe, family: Family, mode: str, inputs: Inputs, device: torch.device):
        self.recipe, self.family, self.mode, self.inputs, self.device = recipe, family, mode, inputs, device

    @cached_property
    def parts(self):
        return load_parts(self.recipe, self.family, self.device, encoders=False, network=False)

    def entries(self, work: Work) -> Iterator[Entry]:
        if work.null is not None:
            yield work.null, "text", self.family.blank_caption(self.parts), ""
        for key, caption in work.texts.items():
            yield key, "text", self._text(caption, None), ""
        if work.groups:
            opened = read_ahead(Opened(self.inputs), work.groups, self.recipe.data.dataloader_num_workers)
            for group in opened:
                yield from self.of_group(group)

    def of_group(self, group: Group) -> Iterator[Entry]:
        for item, reason in group.failed:
            unreadable = Unreadable(splits(self.inputs)[item.split][item.row].path, reason)
            yield from ((key, item.split, unreadable, "") for key in (item.clip, item.text) if key)
        if group.batch is None:
            return
        batch = group.batch.to(self.device)
        clips = self._clips(batch) if any(item.clip for item in group.items) else []
        for i, item in enumerate(group.items):
            if item.clip:
                yield item.clip, item.split, clips[i], item.content
            if item.text:
                text = self._text(batch.text[i], batch.pixels_BFCHW[i : i + 1, 0])
                yield item.text, "text", text, item.text_content

    def _clips(self, batch: Batch) -> list[Tensors]:
        """Each clip's tensors, all but the text; of what is kept, the answer if the draw drops it, then if it keeps
        it."""
        answers = []
        for drawn in (False, True):
            batch.keep = {name: torch.full_like(keep_B, drawn) for name, keep_B in batch.keep.items()}
            answers.append(self.family.keep(batch, self.mode))
        options = encode_options(self.recipe)
        made = self.family.encode(self.parts, batch, self.mode, options=options, described=Described({}))
        kept = {f"keep.{name}": torch.stack([answer[name] for answer in answers], 1).flatten() for name in made.keep}
        rows = {name: tensor.chunk(len(batch.text)) for name, tensor in (made.tensors() | kept).items()}
        return [{name: cut[i] for name, cut in rows.items()} for i in range(len(batch.text))]

    def _text(self, caption: str, picture_BCHW: torch.Tensor | None) -> Tensors:
        described = self.family.describe(self.parts, [caption], picture_BCHW)
        tables = {"cond": described.cond, "null": described.null}
        return {f"{part}.{name}": value for part, table in tables.items() for name, value in table.items()}


class Group(NamedTuple):
    """Items that are encoded together, read."""

    items: list[Item]  # in the order of the batch
    batch: Batch | None  # None: none could be read
    failed: list[tuple[Item, str]]  # and why


class Opened(Dataset[Group]):
    """Items -> Group"""

    def __init__(self, inputs: Inputs):
        self.inputs, self.plan = inputs, inputs.plan(0)
        self.readers: dict[Split, Reader] = {"train": inputs.reader, "held_out": inputs.held_out_reader}

    def __getitem__(self, items: list[Item]) -> Group:
        read, failed = [], []
        for item in items:
            draw = ways(self.inputs, self.plan, item.split, item.row)[item.variant]
            try:
                read.append((item, self.readers[item.split].open(draw)))
            except (MediaError, CameraError) as error:
                failed.append((item, str(error)))
        batch = collate([sample for _, sample in read]) if read else None
        return Group([item for item, _ in read], batch, failed)
