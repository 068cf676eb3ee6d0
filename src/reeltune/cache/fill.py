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

import torch
from torch.utils.data import Dataset

from reeltune.cache.entries import Item, items_of, keys_of, splits, ways
from reeltune.cache.keys import Keys, Split
from reeltune.cache.progress import ProgressBar
from reeltune.cache.store import Store, Tensors, Writer
from reeltune.config.recipe import Recipe
from reeltune.core.interrupt import Interrupt
from reeltune.core.types import Batch, Described
from reeltune.data.camera import CameraError
from reeltune.data.loader import Reader, collate, read_ahead
from reeltune.data.media import MediaError
from reeltune.distributed.engine import choose_kernels, place_in_launch
from reeltune.families.spec import Family
from reeltune.run.data import Inputs, gather
from reeltune.run.loading_memory import told_when_full
from reeltune.run.machine import machine_notices
from reeltune.run.model import choose_family, encode_options, load_parts, outlines

Entry = tuple[str, str, Tensors | str]  # key, split, and what it holds or why it cannot be made


def fill(recipe: Recipe) -> int:
    """Makes this process's share of the missing entries. Returns 0, or 128 + the signal that ended it.

    Raises UserError for everything that a user can mend.
    """
    rank, world, device = place_in_launch()
    choose_kernels(allow_tf32=recipe.training.allow_tf32, deterministic=recipe.training.deterministic)
    family, mode, _ = choose_family(recipe)
    inputs = gather(recipe, family, mode, show_progress=rank == 0)
    folder = Path(str(recipe.cache.cache_folder))
    keys = keys_of(recipe, family, mode, show_progress=rank == 0)
    work = Work.of(keys, inputs, Store(folder), rank, world)
    encoder = Encoder(recipe, family, mode, inputs, device)
    ends = "ends after this entry" if rank == 0 else ""
    with Interrupt(ends) as interrupt, ProgressBar(work.count, shown=rank == 0) as bar:
        for notice in [*inputs.scan.notices, *machine_notices(recipe, only_encoding=True)]:
            bar.say(notice)
        full = told_when_full(recipe, device, partial(outlines, recipe, family), "clips are encoded", network=False)
        with full, closing(Writer(folder, keys.facts)) as writer:  # what was made stays, whatever ends this
            for key, split, made in encoder.entries(work):
                if isinstance(made, str):
                    writer.fail(key, made)
                    bar.say(f"left out: {made}")
                else:
                    writer.add(key, split, made)
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
    items: list[Item] = field(default_factory=list)  # with "" for an entry that is not to be made
    there: int = 0  # entries of all processes that need not be made

    @classmethod
    def of(cls, keys: Keys, inputs: Inputs, store: Store, rank: int, world: int) -> Work:
        """Entries that are not in the store, or whose files could not be read when last tried."""
        work, seen = cls(), set()

        def to_do(key: str) -> bool:
            if key in seen:
                return False
            seen.add(key)
            work.there += key in store.entries
            return key not in store.entries

        def mine(key: str) -> bool:
            return int(key[:8], 16) % world == rank

        if to_do(keys.null) and mine(keys.null):
            work.null = keys.null
        for item in items_of(keys, inputs):
            clip, text = to_do(item.clip), to_do(item.text)
            if text and not keys.text_of_clip:
                if mine(item.text):
                    work.texts[item.text] = splits(inputs)[item.split][item.row].text
                text = False
            if (clip or text) and mine(item.clip):
                work.items.append(item._replace(clip=item.clip if clip else "", text=item.text if text else ""))
        return work

    @property
    def count(self) -> int:
        """Entries to make."""
        return (self.null is not None) + len(self.texts) + sum(bool(i.clip) + bool(i.text) for i in self.items)


class Encoder:
    """Batches of one through the functions that train. Networks are read when the first entry needs them."""

    def __init__(self, recipe: Recipe, family: Family, mode: str, inputs: Inputs, device: torch.device):
        self.recipe, self.family, self.mode, self.inputs, self.device = recipe, family, mode, inputs, device

    @cached_property
    def parts(self):
        return load_parts(self.recipe, self.family, self.device, encoders=False, network=False)

    def entries(self, work: Work) -> Iterator[Entry]:
        if work.null is not None:
            yield work.null, "text", self.family.blank_caption(self.parts)
        for key, caption in work.texts.items():
            yield key, "text", self._text(caption, None)
        if work.items:
            opened = read_ahead(Opened(self.inputs), work.items, self.recipe.data.dataloader_num_workers)
            for item, batch in opened:
                yield from self.of_clip(item, batch)

    def of_clip(self, item: Item, batch: Batch | str) -> Iterator[Entry]:
        if isinstance(batch, str):
            yield from ((key, item.split, batch) for key in (item.clip, item.text) if key)
            return
        batch = batch.to(self.device)
        if item.clip:
            yield item.clip, item.split, self._clip(batch)
        if item.text:
            yield item.text, "text", self._text(batch.text[0], batch.pixels_BFCHW[:, 0])

    def _clip(self, batch: Batch) -> Tensors:
        """All but the text; of what is kept, the answer if the draw drops it, then if the draw keeps it."""
        answers = []
        for drawn in (False, True):
            batch.keep = {name: torch.full_like(keep_B, drawn) for name, keep_B in batch.keep.items()}
            answers.append(self.family.keep(batch, self.mode))
        options = encode_options(self.recipe)
        made = self.family.encode(self.parts, batch, self.mode, options=options, described=Described({}))
        return made.tensors() | {f"keep.{name}": torch.cat([answer[name] for answer in answers]) for name in made.keep}

    def _text(self, caption: str, picture_BCHW: torch.Tensor | None) -> Tensors:
        described = self.family.describe(self.parts, [caption], picture_BCHW)
        tables = {"cond": described.cond, "null": described.null}
        return {f"{part}.{name}": value for part, table in tables.items() for name, value in table.items()}


class Opened(Dataset[tuple[Item, Batch | str]]):
    """(item, its batch of one, or why it cannot be read)"""

    def __init__(self, inputs: Inputs):
        self.inputs, self.plan = inputs, inputs.plan(0)
        self.readers: dict[Split, Reader] = {"train": inputs.reader, "held_out": inputs.held_out_reader}

    def __getitem__(self, item: Item) -> tuple[Item, Batch | str]:
        draw = ways(self.inputs, self.plan, item.split, item.row)[item.variant]
        try:
            return item, collate([self.readers[item.split].open(draw)])
        except (MediaError, CameraError) as error:
            return item, str(error)
