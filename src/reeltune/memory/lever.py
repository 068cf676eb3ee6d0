"""What a row of the table of memory levers says, and what to write where that hangs on the run.  (no torch)"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]
Values = Mapping[str, Any]
"""Setting -> value, for all of a recipe. Where they are known, also: `gpus`; `encodes_ahead`, whether the next batch is
encoded while the network trains; `blocks` of the network; `frozen_blocks`, those of them with weights that do not
learn; `vae_tiles`, whether the VAE has them."""

TRAINED = frozenset({"forward", "backward"})
SEEN = frozenset({"encode", "preview"})
ALL = TRAINED | SEEN | {"step"}
SHARDED = ("zero2", "zero3", "fsdp")  # engines whose processes each keep a share of weights or optimizer state
VARIANTS = 4  # of a cache: as many as the recipe's rules advise for clips longer than their window
RANK = 32  # of adapters, if in doubt
CHOSEN = ("use_prodigy", "use_muon")  # optimizers chosen for how they learn, which need all weights or whole matrices
SHORT = 9  # frames that are not halved


@dataclass(frozen=True)
class Exclusion:
    """Values of another setting with which a lever does not go: those refused, or all but those allowed."""

    setting: str
    why: str
    """Follows "A is a and B is b": the rule and the remedy."""
    refused: tuple[Any, ...] = ()
    allowed: tuple[Any, ...] = ()

    def permits(self, value: Any) -> bool:
        """Whether the other setting may have that value. None, which is not settled yet, is no value refused and none
        allowed."""
        return value in self.allowed if self.allowed else value not in self.refused

    def applies(self, values: Values) -> bool:
        value = values[self.setting]
        return value is not None and not self.permits(value)


def not_in(engines: tuple[str, ...], remedy: str) -> Exclusion:
    return Exclusion("engine", f", which has no such thing; {remedy}", refused=engines)


def prodigy(remedy: str) -> Exclusion:
    return Exclusion("use_prodigy", f"; it finds its rate from all weights at once; {remedy}", refused=(True,))


WHERE_NOTHING_IS_KEPT = (
    Exclusion(
        "step_in_backward",
        "; what is kept is given back once, and the backward pass may run twice there; set gradient_checkpointing to "
        "true",
        refused=(True,),
    ),
    Exclusion(
        "attention",
        ", which is many operations and none of its own; set gradient_checkpointing to true, or attention to another "
        "kernel",
        refused=("math",),
    ),
    Exclusion(
        "engine",
        ", which gathers weights within the blocks, and otherwise when they are recomputed; set gradient_checkpointing "
        "to true, or engine to fsdp",
        refused=("zero3",),
    ),
)


@dataclass(frozen=True)
class Lever:
    setting: str
    value: Any
    """That spares memory."""
    spares: str
    price: str
    plan_price: str = ""
    """In `plan`, with `{numbers}` of estimate.remedies.numbers; empty: as `price`."""
    phases: frozenset[str] = ALL
    """In which it lowers the fullest moment."""
    beside: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Setting in use -> the phases that are left to this one."""
    same_bits: bool = True
    alone: bool = False
    """Several processes that train together cannot have it."""
    excludes: tuple[Exclusion, ...] = ()
    unless: tuple[str, ...] = ()
    """Settings beside which it is not offered: it spares nothing, or is not what the run was to learn with."""
    replaces: tuple[str, ...] = ()
    """Settings that are turned off with it."""
    off: Any = False
    faster: tuple[Any, ...] = ()
    """Values with the same result that take less time and more memory, the fastest first."""
    in_use: Callable[[Any], bool] | None = None
    """Whether a value of the setting is this lever pulled; None: where it is `value`."""
    changes: Callable[[Values], Iterable[Settings]] | None = None
    """What can be written in the recipe to pull it, by its other values; None: `value`."""
    label: str = ""
    """On the page, in place of `setting: value`."""
    advice: str = ""
    """When the device is full, in place of what `changes` gives."""

    def pulled(self, values: Values) -> bool:
        value = values.get(self.setting)
        return value == self.value if self.in_use is None else self.in_use(value)

    def where(self, values: Values) -> frozenset[str]:
        """The phases in which it spares memory in such a run."""
        return next((phases for name, phases in self.beside.items() if values[name]), self.phases)

    def options(self, values: Values) -> Iterator[Settings]:
        """Each a way to pull it: what to write, with what it takes the place of turned off."""
        replaced = {name: False for name in self.replaces if values[name]}
        for change in [{self.setting: self.value}] if self.changes is None else self.changes(values):
            yield {**replaced, **change}


def several(values: Values) -> bool:
    return values.get("gpus", 1) > 1 or values["engine"] in SHARDED


# ---- what to write; beside an `engine` also, turned off, what that does not go with


def half_the_batch(values: Values) -> Iterator[Settings]:
    batch = values["train_batch_size"]
    if batch > 1:
        accumulate = values["gradient_accumulation_steps"] * batch // (batch // 2)
        yield {"train_batch_size": batch // 2, "gradient_accumulation_steps": accumulate}


def keep(kept: str, *, where: tuple[bool | str, ...]) -> Callable[[Values], Iterator[Settings]]:
    """Makes the change to `kept`. where: what gradient_checkpointing is, if that would spare memory."""

    def change(values: Values) -> Iterator[Settings]:
        if values["gradient_checkpointing"] in where:
            yield {"gradient_checkpointing": kept}

    return change


def encode_between(values: Values) -> Iterator[Settings]:
    if values["encodes_ahead"]:
        yield {"encode_ahead": False}


def a_cache(values: Values) -> Iterator[Settings]:
    yield {"cache_folder": f"{values['output_dir']}/cache", "cache_variants": VARIANTS}


def encoders_in_bf16(values: Values) -> Iterator[Settings]:
    if values["encoder_weights"] == "fp32" or (values["encoder_weights"], values["mixed_precision"]) == (None, "no"):
        yield {"encoder_weights": "bf16"}


def all_frozen_blocks(values: Values) -> Iterator[Settings]:
    if count := values.get("frozen_blocks", 0):
        yield {"blocks_to_swap": count}


def adapters_instead(values: Values) -> Iterator[Settings]:
    """Alone, over a quantised network, and over one that waits on the host too."""
    if values["trainable_modules"] == (".",) and not values["trainable_modules_low_learning_rate"]:
        adapters = {"rank": RANK}
        yield adapters
        yield {**adapters, "base_weights": "int8"}
        if blocks := values.get("blocks", 0):
            yield {**adapters, "base_weights": "int8", "blocks_to_swap": blocks}


def a_coarser_base(values: Values) -> Iterator[Settings]:
    if values["rank"]:
        yield {"base_weights": "int8"}
        yield {"base_weights": "nf4"}


def one_by_one(vae_mini_batch: int) -> bool:
    """Clips are encoded one by one."""
    return vae_mini_batch <= 1


def tiles(values: Values) -> Iterator[Settings]:
    if values.get("vae_tiles", True):
        yield {"vae_tiling": True}


def half_as_long(values: Values) -> Iterator[Settings]:
    frames = values["video_sample_n_frames"]
    if frames > SHORT:
        yield {"video_sample_n_frames": frames // 2 // 4 * 4 + 1}


def two_to_a_clip(values: Values) -> Iterator[Settings]:
    if values.get("gpus", 1) > 1:
        yield {"context_parallel": 2}


def sharded_by(engine: str) -> Callable[[Values], Iterator[Settings]]:
    def change(values: Values) -> Iterator[Settings]:
        if values.get("gpus", 1) > 1:
            yield {"engine": engine}

    return change


def more_devices(values: Values) -> Iterator[Settings]:
    for count in (2, 4, 8):
        if count > values.get("gpus", 1):
            yield {"gpus": count, "engine": "fsdp"}
