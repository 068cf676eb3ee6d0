"""The entries that a recipe asks for, and their reading in training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reeltune.cache.fingerprints import fingerprints
from reeltune.cache.keys import READING_VERSION, Keys, Split, digest
from reeltune.cache.store import Store
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.files import CannotWriteError, whole_file
from reeltune.core.types import Draw, Encoded, Record, Shape
from reeltune.data.held_out import fixed_draw
from reeltune.data.measuring import stamps
from reeltune.data.media import MediaError
from reeltune.data.plan import Plan
from reeltune.data.pose_drawing import DRAWING_VERSION
from reeltune.data.records import Records
from reeltune.families.spec import Family
from reeltune.run.data import Inputs
from reeltune.run.model import encode_options
from reeltune.run.precision import encoder_facts


class Item(NamedTuple):
    """One way of reading one record, and the keys of its two entries; "" for one that is not to be made."""

    split: Split
    row: int  # of the split's records
    variant: int
    shape: Shape
    clip: str
    text: str
    content: str = ""  # of its files, as they were measured
    text_content: str = ""  # the same, where its text depends on them


def keys_of(recipe: Recipe, family: Family, mode: str, *, show_progress: bool = True) -> Keys:
    """Reads the checkpoint's frozen networks, with a progress bar on stderr, if they have not been hashed before."""
    assert recipe.cache.cache_folder is not None
    facts = {
        "family": family.name,
        "train_mode": mode,
        "mixed_precision": recipe.training.mixed_precision,
        "allow_tf32": recipe.training.allow_tf32,
        **({"deterministic": True} if recipe.training.deterministic else {}),  # caches before it stay
        **encoder_facts(recipe),
        **encode_options(recipe),
        **fingerprints(family.frozen_files, Path(recipe.cache.cache_folder), show_progress=show_progress),
        "versions": [READING_VERSION, family.encode_version],
    }
    return Keys(
        facts,
        root=str(Path(recipe.data.train_data_dir).absolute()),
        seeds_count="mask" in family.needs[mode],
        text_of_clip=family.caption_sees_picture,
    )


def ways(inputs: Inputs, plan: Plan, split: Split, row: int) -> list[Draw]:
    """All variants of a record to train on, or the one way in which a held-out record is read."""
    return plan.ways(row) if split == "train" else [fixed_draw(inputs.held_out[row], row, inputs.rules)]


def splits(inputs: Inputs) -> dict[Split, Records]:
    return {"train": inputs.train, "held_out": inputs.held_out}


def items_of(keys: Keys, inputs: Inputs) -> Iterator[Item]:
    """Every way of every record. Raises UserError for a file that has gone since the scan."""
    plan = inputs.plan(0)
    for split, records in splits(inputs).items():
        for row, record in enumerate(records):
            for variant, draw in enumerate(ways(inputs, plan, split, row)):
                try:
                    clip = keys.clip(record, draw, split)
                except OSError as gone:
                    raise UserError(
                        "train_data_meta",
                        f"{gone.filename} cannot be opened: {gone.strerror}; it was there when the list was looked "
                        "through; put it back, or start again, which leaves its entry out",
                    ) from gone
                yield Item(split, row, variant, draw.shape, clip, keys.text(record, clip), *contents_of(keys, record))


def contents_of(keys: Keys, record: Record) -> tuple[str, str]:
    """What the files of its clip, and of its text where that depends on them, held when they were measured; "" is
    unknown. Keys have it not, since older caches do not."""
    content = f"{record.content:x} {record.control_content:x}" if record.content or record.control_content else ""
    return content, content if keys.text_of_clip else ""


def grouped(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Items that are encoded together: so many of one shape, split and variant, in their order, the last of what is
    left.

    A function of the items alone, whatever there is of them in the cache. Those of one variant are together, so that a
    cache of more variants keeps the groups that it has. A clip that comes again, as all variants of a still do, is left
    out; with another caption it comes last, by itself.
    """
    known: set[str] = set()
    open_groups: dict[tuple[Split, int, Shape], list[Item]] = {}
    again: list[Item] = []
    for item in items:
        if item.clip in known:
            if item.text not in known:
                again.append(item)
                known.add(item.text)
            continue
        known |= {item.clip, item.text}
        kind = item.split, item.variant, item.shape
        group = open_groups.setdefault(kind, [])
        group.append(item)
        if len(group) == count:
            yield open_groups.pop(kind)
    yield from open_groups.values()
    yield from ([item] for item in again)


@dataclass
class Cache:
    """A complete cache, opened to train from."""

    store: Store
    keys: Keys

    def null(self, device: torch.device) -> dict[str, Tensor]:
        """What dropped captions become; the family's `load` makes it only with the text encoder."""
        return {name: value.to(device, copy=True) for name, value in self.store.read(self.keys.null, "text").items()}

    def feed(self, inputs: Inputs) -> Inputs:
        """The same inputs, whose samples come encoded. Held-out ones keep their pixels, for previews show them."""
        train, held_out = (View(self.store, self.keys, split) for split in ("train", "held_out"))
        return replace(
            inputs,
            reader=inputs.reader.from_cache(train),
            held_out_reader=inputs.held_out_reader.from_cache(held_out, with_pixels=True),
        )


@dataclass
class View:
    """(record, draw, what is kept) -> Encoded, of one split."""

    store: Store
    keys: Keys
    split: Split

    def __call__(self, record: Record, draw: Draw, keep: Mapping[str, bool]) -> Encoded:
        """A batch of one. Raises MediaError if the file could not be read when it was to be encoded, or is gone."""
        try:
            clip = self.keys.clip(record, draw, self.split)
        except OSError as gone:
            raise MediaError(f"cannot be opened: {gone.strerror}", lasting=False) from None
        if clip in self.store.failed:
            raise MediaError(self.store.failed[clip])
        text = self.keys.text(record, clip)
        content, of_text = contents_of(self.keys, record)
        if not self.store.has_made(clip, content) or not self.store.has_made(text, of_text):
            raise UserError(
                "cache_folder",
                f"{record.path} is not in the cache as it is now, at {tuple(draw.shape)}: it has changed since the run "
                "began, or stands in for files that cannot be read; mend those, and run reeltune cache",
            )
        tensors = self.store.read(clip, self.split) | self.store.read(text, "text")
        for name in [name for name in tensors if name.startswith("keep.")]:
            dropped_kept = tensors[name]
            tensors[name] = dropped_kept[int(keep.get(name.removeprefix("keep."), True))].reshape(1)
        return Encoded.of(tensors)


def open_cache(
    recipe: Recipe, family: Family, mode: str, inputs: Inputs, *, show_progress: bool = True
) -> Cache | None:
    """The recipe's cache; None without cache_folder. Raises UserError that says what is missing, if anything is.

    What was found complete is remembered, because a look at every reading of 100,000 clips takes a minute.
    """
    if recipe.cache.cache_folder is None:
        return None
    folder = Path(recipe.cache.cache_folder)
    keys, store = keys_of(recipe, family, mode, show_progress=show_progress), Store(folder)
    asked_for = [keys.facts, keys.root, repr(inputs.rules), recipe.cache.cache_variants, DRAWING_VERSION]
    asked = digest([*asked_for, *(_as_it_is(records) for records in splits(inputs).values())])
    there = digest([sorted(store.hashes.items()), sorted(store.failed)])
    marker = folder / "complete" / asked
    if not marker.is_file() or marker.read_text() != there:
        _refuse_missing(folder, keys, store, inputs)
        with suppress(CannotWriteError), whole_file(marker) as file:  # or it is looked at again
            file.write(there)
    return Cache(store, keys)


def _as_it_is(records: Records) -> list[str]:
    """Hashes of the records, and of the sizes and times of their files."""
    paths = ([record.path, record.control_path or "", record.camera_path or ""] for record in records)
    arrays = {**records.arrays(), "files": stamps(path for three in paths for path in three)}
    return [hashlib.blake2b(array.tobytes()).hexdigest() for array in arrays.values()]


def _refuse_missing(folder: Path, keys: Keys, store: Store, inputs: Inputs) -> None:
    count, missing, first = 0, 0, ""
    for item in items_of(keys, inputs):
        count += 1
        if not is_there(store, item.clip, item.content) or not is_there(store, item.text, item.text_content):
            missing += 1
            first = first or splits(inputs)[item.split][item.row].path
    if not missing and is_there(store, keys.null):
        return
    what = f"{missing} of {count} readings of clips, the first of {first}" if missing else "the empty caption"
    raise UserError(
        "cache_folder",
        [
            f"{folder} lacks {what}; run reeltune cache with the same settings, which encodes what is missing, or "
            "leave cache_folder out",
            *differences(keys.facts, store.facts),
        ],
    )


def is_there(store: Store, key: str, content: str = "") -> bool:
    """Or is of a file that could not be read, for which another clip stands in."""
    return key in store.failed or store.has_made(key, content)


def differences(now: Mapping[str, Any], then: list[dict[str, Any]]) -> list[str]:
    """What the cache was made with otherwise, if it was never made as it is asked for now."""
    if not then or any(facts == now for facts in then):
        return []
    last = then[-1]
    changed = [name for name in {**now, **last} if last.get(name) != now.get(name)]
    return [f"it was made with {name} {last.get(name)}, which now is {now.get(name)}" for name in changed]
