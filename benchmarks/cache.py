"""Training from the cache against live, writing it against encoding alone, reading it against the disk.

Steps are of tiny networks (those of the tests), so their ratios tell what reading and encoding cost beside a step, not
what they cost beside a released network's.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from reeltune import families
from reeltune.cache.entries import keys_of
from reeltune.cache.fill import Encoder, Opened, Work, fill
from reeltune.cache.store import Store, Writer, _mapped
from reeltune.config.recipe import Recipe
from reeltune.core.types import Encoded
from reeltune.data.loader import joined
from reeltune.data.media import write_clip
from reeltune.run.data import gather
from reeltune.run.model import choose_family
from reeltune.training.loop import train
from tests.conftest import GOLDENS
from tests.families.every_family import pairs
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.small_run import recipe

SIDES, FRAMES, CLIPS, STEPS, WARM_UP = (64, 128), 9, 8, 10, 3
ENTRIES, ENTRY_MIB = 64, 16  # of the reading: a gigabyte
ROUNDS = 5
BLOCK = 8 * 2**20  # bytes of a plain read


def make_data(folder: Path) -> Path:
    """Clips of moving noise, with controls."""
    folder.mkdir()
    rng, rows = np.random.RandomState(0), []
    for i in range(CLIPS):
        picture = rng.randint(0, 255, (16, 16, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        moving = np.stack([np.roll(picture, 2 * f, axis=1) for f in range(FRAMES)])
        for name in (f"{i}.mp4", f"{i}_control.mp4"):
            write_clip(folder / name, moving, 8.0)
        rows.append({"file_path": f"{i}.mp4", "control_file_path": f"{i}_control.mp4", "text": f"thing {i}"})
    (folder / "metadata_control.json").write_text(json.dumps(rows))
    return folder


def checkpoints(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """(family, checkpoint, mode) of one checkpoint a family: those of the goldens, or our own."""
    seen = {"toy"}
    for (pair,) in (each.values for each in pairs(GOLDENS, modes=False)):
        if pair is None or pair.mode == "control_ref_camera" or pair.checkpoint.endswith("-other"):
            continue  # the clips have no camera paths; of other networks one is enough
        place = folder / "checkpoints" / pair.checkpoint
        place.mkdir(parents=True)
        model = pair.lay_out(place)
        name, _, _ = families.find(model).name.partition("/")
        if name not in seen:
            seen.add(name)
            yield name, model, pair.mode


def of(model: Path, data: Path, out: Path, side: int, **more) -> Recipe:
    sizes = {"video_sample_n_frames": FRAMES, "fix_sample_size": (side, side), "held_out_share": 0, "cache_variants": 1}
    steps = {"max_train_steps": STEPS, "checkpointing_steps": 10**6, "train_batch_size": 1}
    return recipe(model, data, out, **sizes, **steps, **more)


def step_s(given: Recipe) -> float:
    """Seconds of the middle step, reading and encoding included."""
    assert train(given) == 0
    lines = map(json.loads, (Path(given.output.output_dir) / "metrics.jsonl").read_text().splitlines())
    parts = ("data_s", "encode_s", "forward_backward_s", "optimizer_s")
    seconds = [sum(line[name] for name in parts) for line in lines if line["kind"] == "step"]
    return statistics.median(seconds[WARM_UP:])


def steps(folder: Path, data: Path) -> Iterator[tuple[str, float]]:
    for name, model, mode in checkpoints(folder):
        for side in SIDES:
            place = folder / f"{name}_{side}"
            live = of(model, data, place / "live", side, train_mode=mode)
            from_cache = of(model, data, place / "cached", side, train_mode=mode, cache_folder=str(place / "cache"))
            assert fill(from_cache) == 0
            ratio = step_s(from_cache) / step_s(live)
            print(f"{name} at {side} px: a step from the cache is {ratio:.2f} of a live one")
            yield f"cache_step_{name}_{side}", ratio


def writing(given: Recipe) -> float:
    """Seconds of encoding clips that are in memory, over those of reading, encoding and writing them."""
    family, mode, _ = choose_family(given)
    inputs, keys = gather(given, family, mode, show_progress=False), keys_of(given, family, mode)
    folder = Path(str(given.cache.cache_folder))
    work = Work.of(keys, inputs, Store(folder), rank=0, world=1)
    encoder, opened = Encoder(given, family, mode, inputs, torch.device("cpu")), Opened(inputs)
    clips = replace(work, null=None, texts={})
    groups = [opened[items] for items in clips.groups]

    def bare() -> None:
        for group in groups:
            list(encoder.of_group(group))

    def whole() -> None:
        writer = Writer(folder, keys.facts)
        for entry in encoder.entries(clips):
            writer.add(*entry)
        writer.close()

    list(encoder.of_group(groups[0]))  # loads the networks
    bare_s, whole_s = by_turns(bare, whole)
    return bare_s / whole_s


def by_turns(*acts: Callable[[], None], before: Callable[[], None] = lambda: None) -> list[float]:
    """Seconds of each, the least of ROUNDS; by turns, because other programs use processor and disk too."""
    seconds: list[list[float]] = [[] for _ in acts]
    for _ in range(ROUNDS):
        for act, taken in zip(acts, seconds, strict=True):
            before()
            began = time.perf_counter()
            act()
            taken.append(time.perf_counter() - began)
    return [min(taken) for taken in seconds]


def forget(folder: Path) -> None:
    """The system's copies of these files in memory, so that they are read from the disk. Mapped ones would stay."""
    _mapped.cache_clear()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading(folder: Path) -> tuple[float, float]:
    """(entries in random order over the plain disk, GB/s)"""
    half = ENTRY_MIB * 2**20 // 8
    generator, writer = torch.Generator().manual_seed(0), Writer(folder, {})
    for i in range(ENTRIES):
        mean, logvar = torch.randn(2, 1, half, generator=generator)
        writer.add(f"{i:032}", "train", {"x0.mean": mean, "x0.logvar": logvar})
    writer.close()
    store, order = Store(folder), np.random.RandomState(0).permutation(ENTRIES)

    def plain() -> None:
        for path in (folder / "shards").iterdir():
            with path.open("rb", buffering=0) as file:
                while file.read(BLOCK):
                    pass

    def ours() -> None:
        for i in order:
            joined([Encoded.of(store.read(f"{i:032}", "train"))])

    plain_s, ours_s = by_turns(plain, ours, before=partial(forget, folder / "shards"))
    return plain_s / ours_s, writer.bytes / ours_s / 1e9


def main() -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_data(folder / "data")
        found = dict(steps(folder, data))
        wan = tiny_checkpoint(folder / "wan", "control_v1.1")
        more = {"cache_folder": str(folder / "written_cache"), "dataloader_num_workers": 1}
        found["cache_write_ratio"] = writing(of(wan, data, folder / "written", max(SIDES), **more))
        found["cache_read_ratio"], found["cache_read_gb_s"] = reading(folder / "read")
    print(
        f"writing a cache reaches {found['cache_write_ratio']:.2f} of encoding alone; reading one, "
        f"{found['cache_read_gb_s']:.2f} GB/s, {found['cache_read_ratio']:.2f} of the disk"
    )
    return found


if __name__ == "__main__":
    main()
