"""The folder of a run: its recipe, and what it ran on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from reeltune.checkpoint import folder as checkpoint
from reeltune.config.parse import build, dump, flat, read
from reeltune.config.recipe import Recipe
from reeltune.config.rules import OPTIMIZERS, shown
from reeltune.core.errors import UserError, refuse
from reeltune.core.files import whole_file
from reeltune.core.reading import TEXT, few, read_table, require_fields
from reeltune.core.versions import with_python

# Settings beside all sizes that decide which sample comes when, and with which noise.
ORDERING = (
    "seed",
    "video_repeat",
    "held_out_share",
    "control_ref_image",
    "expert",
    "text_drop_ratio",
    "uniform_sampling",
    "cache_variants",
    "context_parallel",
)
# Settings that decide of which weights an optimizer keeps a state, in which order and type.
OF_THE_STATE = ("trained_weights", "trainable_modules", "trainable_modules_low_learning_rate", "lora_plus_ratio")
OF_THE_ADAPTERS = ("rank", "rank_pattern", "use_dora", "train_whole")  # other layers are told by name (read_kept)
IDLE = "keep_all_node_same_token_length"  # always on
GOES_ON_FROM = "goes_on_from"  # in run.json: a checkpoint of another run
RESTORE = "restore it from a copy"


def refuse_overwriting(output_dir: Path, resumed_from: Path | None) -> None:
    """Raises UserError if output_dir holds checkpoints that this run would mix its own with, or is in one that goes."""
    if resumed_from is None:
        refuse("recipe", [f"output_dir {line}" for line in within_checkpoint(Path(output_dir))])
    if theirs := checkpoint.of_other_tools(output_dir):
        names = ", ".join(few([path.name for path in theirs]))
        raise UserError(
            "recipe",
            f"output_dir {str(output_dir)!r} holds {names} of another tool, where this run would write "
            "its own; give another output_dir, and to go on from those weights "
            f"transformer_path {checkpoint.their_weights(theirs[-1])}",
        )
    there = checkpoint.complete(output_dir)
    if there and resumed_from is None:
        raise UserError(
            "recipe",
            f"output_dir {str(output_dir)!r} already holds {there[-1].name}; go on from it with resume_from_checkpoint "
            "latest, or give another output_dir",
        )
    if there and resumed_from is not None and not is_own(output_dir, resumed_from):
        raise UserError(
            "recipe",
            f"resume_from_checkpoint is {str(resumed_from)!r}, but output_dir {str(output_dir)!r} has "
            f"{there[-1].name} of its own; go on from that with latest, or give another output_dir",
        )


def refuse_starting_over(output_dir: Path) -> None:
    """Raises UserError where a run without a checkpoint of its own was to go on from that of another: to start anew
    would lose what that had learnt."""
    about = output_dir / "run.json"
    before = read_table(about, RESTORE) if about.is_file() else {}
    if (path := before.get(GOES_ON_FROM)) is not None:
        raise UserError(
            "resume",
            f"resume_from_checkpoint is latest, and {output_dir} has no complete checkpoint yet; its run went on from "
            f"{path}: give that; to start a new run leave resume_from_checkpoint out",
        )


def is_own(output_dir: Path, resumed_from: Path) -> bool:
    """Whether the checkpoint is of the run of that folder: lies in it, or is a link there."""
    beside = resumed_from.absolute().parent.resolve()
    return Path(output_dir).resolve() in (beside, *beside.parents)


def within_checkpoint(out: Path) -> Iterator[str]:
    """Why nothing is to be written there, though it could: a checkpoint is deleted with all that is in it."""
    own = (out.absolute(), Path(os.path.realpath(out)))
    whole = next((one for path in own for one in (path, *path.parents) if checkpoint.is_complete(one)), None)
    if whole is not None:
        place = "a checkpoint" if whole in own else f"within {whole}"
        yield f"{out} is {place}, which goes once the run has checkpoints_total_limit newer ones; give another"


def refuse_other_model(resumed_from: Path, facts: dict[str, str], *, adapters: bool) -> None:
    """Raises UserError if the checkpoint is of a run of another family or mode than `facts` say, or if not the same
    learnt there: the network, or adapters."""
    if checkpoint.is_adapter(resumed_from) and not adapters:
        raise UserError("resume", f"{resumed_from} keeps adapters, and rank is 0; restore rank")
    if adapters and not checkpoint.is_adapter(resumed_from):
        raise UserError(
            "resume",
            f"{resumed_from} keeps the whole network, and rank asks for adapters; leave rank out, or train adapters "
            f"on it: transformer_path {resumed_from} and another output_dir",
        )
    beside = resumed_from.absolute().parent
    about = (beside.parent if beside.name == checkpoint.SET_ASIDE else beside) / "run.json"
    before = read_table(about, RESTORE) if about.is_file() else {}
    require_fields(before, {name: TEXT for name in facts if name in before}, about, RESTORE)
    refuse(
        f"resume from {resumed_from}: the run is another model's; give another output_dir",
        [f"{name} was {before[name]} and is {now}" for name, now in facts.items() if before.get(name, now) != now],
    )


def changes_since(resumed_from: Path, recipe: Recipe) -> list[str]:
    """Settings that differ from the checkpoint's, in words.

    Raises UserError for those that would change which samples come next: a resumed run must skip and repeat none. And
    for another optimizer, or one of other weights.
    """
    before, now = (flat(r) for r in (build(read(resumed_from / "recipe.yaml")), recipe))
    changed = {
        name: f"{name} was {shown(before[name])} and is {shown(now[name])}" for name in now if now[name] != before[name]
    }
    ordering = {*vars(recipe.sizes), *ORDERING} - {IDLE}
    kept_in = "adapter_path" if recipe.adapter.rank else "transformer_path"
    anew = f"start a new run from its weights: {kept_in} {resumed_from} and another output_dir"
    for settled, why in (
        (ordering, f"the samples would not go on where they were; restore them, or {anew}"),
        (OPTIMIZERS, "no optimizer can go on with the state of another; restore it"),
        (OF_THE_ADAPTERS, "the adapters are others; restore the recipe's settings"),
        (OF_THE_STATE, f"the optimizer's state is of what learnt there; restore it, or {anew}"),
    ):
        refuse(f"resume from {resumed_from}: {why}", [words for name, words in changed.items() if name in settled])
    without = {IDLE, "lora_init", "adapter_path", *([] if recipe.adapter.rank else ["transformer_path"])}
    return [
        f"{words}, without effect on a run that goes on" if name in without else words
        for name, words in changed.items()
        if name not in ("resume_from_checkpoint", "output_dir")
    ]


def describe(output_dir: Path, recipe: Recipe, facts: dict) -> None:
    """Writes recipe.yaml (every field but where it went on from) and run.json (versions, machine and `facts`)."""
    anew = replace(recipe, output=replace(recipe.output, resume_from_checkpoint=None))
    with whole_file(output_dir / "recipe.yaml") as file:
        file.write(dump(anew))
    on_gpu = torch.cuda.is_available()
    about = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": with_python(),
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        **facts,
    }
    with whole_file(output_dir / "run.json") as file:
        file.write(json.dumps(about, indent=2) + "\n")
