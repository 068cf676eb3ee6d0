"""Processes that would not train one run are refused before they train: other settings, files or folders on one."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reeltune.checkpoint import digests
from reeltune.checkpoint import folder as checkpoint
from reeltune.config.parse import flat
from reeltune.config.recipe import Model, Recipe
from reeltune.core.errors import UserError, refuse
from reeltune.core.versions import versions
from reeltune.data.records import Records
from reeltune.distributed.engine import Engine

T = TypeVar("T")
SAMPLES, SAMPLE_BYTES = 16, 4096  # read of each file of a checkpoint, over all of it
CLIPS = 64  # of which the sizes are compared
APPEARS_SECONDS = 10.0  # after which a file server shows to one machine what another has written


def refuse_apart(engine: Engine, recipe: Recipe) -> None:
    """Raises UserError, in all processes, where one has not what rank 0 has."""
    if engine.world > 1:
        refuse_other_settings(engine, recipe)
        refuse_other_checkpoint(engine, recipe)
        refuse_other_folder(engine, Path(recipe.output.output_dir))


def refuse_damaged(engine: Engine, resumed_from: Path) -> list[str]:
    """Raises UserError, in all processes, for files of the checkpoint that are not as they were written.

    Each process reads its share of them. Returns notices.
    """
    _refuse_damaged(engine, resumed_from, ("",))
    if digests.read(resumed_from) is None:
        return [f"{resumed_from} has no {digests.NAME}, so that a changed bit in it would not be noticed"]
    return []


def refuse_damaged_weights(engine: Engine, model: Model, resumed_from: Path | None) -> None:
    """What `refuse_damaged` does, for weights that the recipe names, where they are a checkpoint's. A resumed network
    has its own."""
    own = None if resumed_from is not None and not checkpoint.is_adapter(resumed_from) else model.transformer_path
    for path in filter(None, (own, model.other_expert_path)):
        if (held := checkpoint.holder_of(Path(path))) is not None:
            _refuse_damaged(engine, *held)


def _refuse_damaged(engine: Engine, folder: Path, under: tuple[str, ...]) -> None:
    shares = engine.gather(digests.damages(folder, part=engine.rank, parts=engine.world, under=under))
    if lines := [line for share in shares for line in share]:
        raise checkpoint.damaged(folder, lines)


def from_first(engine: Engine, act: Callable[[], T]) -> T:
    """What `act` gives in rank 0, where alone it is called; a UserError of it is raised in all processes."""
    answer, error = None, None
    if engine.main:
        try:
            answer = act()
        except UserError as refused:
            error = refused
    answer, error = engine.first((answer, error))
    if error is not None:
        raise error
    return answer


def refuse_other_settings(engine: Engine, recipe: Recipe) -> None:
    """Raises UserError where a process was started with other settings, engine or libraries than rank 0."""
    asked = {
        "engine": engine.parallelism.engine,
        "keep_gathered": engine.parallelism.keep_gathered,
        "offload": engine.parallelism.offload,
    }
    others = {"DeepSpeed's settings": engine.parallelism.deepspeed, "blocks to wrap": engine.parallelism.blocks}
    libraries = {f"the version of {name}": number for name, number in versions().items()}
    refuse(
        "launch: processes of one run take the same command, and the same environment, on every machine",
        differences(engine.gather({**flat(recipe), **asked, **others, **libraries})),
    )


def refuse_other_checkpoint(engine: Engine, recipe: Recipe) -> None:
    """Raises UserError where a process finds another checkpoint, by samples of its files, than rank 0."""
    model = recipe.model
    own = model.pretrained_model_name_or_path, model.transformer_path, recipe.adapter.adapter_path
    paths = [path for path in (*own, model.other_expert_path, model.other_expert_adapter) if path is not None]
    samples = {str(file): sampled(file) for path in paths for file in files_of(Path(path))}
    refuse(
        "pretrained_model_name_or_path: processes would train from other weights; give all machines the same files",
        differences(engine.gather(samples)),
    )


def refuse_other_folder(engine: Engine, output_dir: Path) -> None:
    """Raises UserError where a process does not see in output_dir what rank 0 writes there."""
    mark = output_dir / engine.first(f".seen-by-all-{os.getpid()}-{time.time_ns()}")
    if engine.main:
        output_dir.mkdir(parents=True, exist_ok=True)
        mark.touch()
    engine.wait()
    until = time.monotonic() + APPEARS_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    blind = [rank for rank, sees in enumerate(engine.gather(seen)) if not sees]
    if engine.main:
        mark.unlink()
    if blind:
        raise UserError(
            "launch",
            f"output_dir {str(output_dir)!r} is another folder for {_ranks(blind)} than for rank 0; give one that all "
            "machines share, as each writes its part of a checkpoint there",
        )


def refuse_other_records(engine: Engine, records: Records) -> None:
    """Raises UserError where a process has other records than rank 0, or finds other files, by some of their sizes."""
    if engine.world == 1:
        return
    looked_at = range(0, len(records), max(1, len(records) // CLIPS))
    sizes = {path: os.path.getsize(path) for path in (records[i].path for i in looked_at) if os.path.exists(path)}
    refuse(
        "train_data_meta: processes would train on other clips; give all machines the same files",
        differences(engine.gather({"the list of usable clips": records.digest(), **sizes})),
    )


def differences(of_ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the first rank to differ has otherwise than rank 0, and which ranks differ."""
    other = [rank for rank, one in enumerate(of_ranks) if one != of_ranks[0]]
    if not other:
        return []
    ours, theirs = of_ranks[0], of_ranks[other[0]]
    names = [name for name in {**ours, **theirs} if ours.get(name, "missing") != theirs.get(name, "missing")]
    lines = [
        f"{name} is {theirs.get(name, 'missing')} for {_ranks(other)}, {ours.get(name, 'missing')} for rank 0"
        for name in names[:8]
    ]
    return [*lines, *([f"and {len(names) - 8} more"] if len(names) > 8 else [])]


def files_of(folder: Path) -> list[Path]:
    """Not those in hidden folders, where downloads keep their notes."""
    inside = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    hidden = [any(part.startswith(".") for part in path.relative_to(folder).parts) for path in inside]
    return [path for path, notes in zip(inside, hidden, strict=True) if path.is_file() and not notes]


def sampled(file: Path) -> str:
    """A file's size, and a hash of bytes from all over it: weights of another training differ everywhere."""
    size = file.stat().st_size
    hashed = hashlib.blake2b(digest_size=8)
    with file.open("rb") as opened:
        for k in range(SAMPLES):
            opened.seek(k * size // SAMPLES)
            hashed.update(opened.read(SAMPLE_BYTES))
    return f"{size} bytes ({hashed.hexdigest()})"


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank {', '.join(map(str, ranks[:8]))}{more}"
