"""`reeltune plan`: what a run will see, need and take, before it. Reads measurements and headers, never weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from reeltune.config.parse import build, flat
from reeltune.config.recipe import Parallel, Recipe
from reeltune.core.errors import UserError, refuse
from reeltune.core.types import Draw, Shape
from reeltune.data.plan import Plan
from reeltune.distributed.engine import PEAK_FLOPS
from reeltune.estimate import sharding, throughput
from reeltune.estimate.epoch import DataForecast, forecast_data
from reeltune.estimate.fake_step import ALL, TRAINED, rehearse
from reeltune.estimate.remedies import Change, Offer, Verdict, changes, judge, search
from reeltune.estimate.result import Rehearsal
from reeltune.estimate.sharding import ENGINES
from reeltune.memory import levers
from reeltune.run.data import Inputs, gather
from reeltune.run.model import check_split, choose_family
from reeltune.run.sizes import size_rules
from reeltune.training.loop import steps_of
from reeltune.training.prefetch import encodes_ahead

GB = 10**9  # of a device's size. Cards have some 7 % more than so many; CUDA's own needs and gaps are left that
DEVICES = {  # GB, from NVIDIA's data sheet of each
    "B200": 180,
    "H200": 141,
    "H100": 80,
    "A100": 80,
    "L40S": 48,
    "L4": 24,
    "RTX 6000 Ada": 48,
    "RTX 4090": 24,
    "RTX 3090": 24,
}
BESIDE = {"forward", "backward", "step"}  # phases in which the next batch may be encoded
MOST_TFLOPS = 100_000  # of one device; more is a slip of units
PREFETCHED = 2  # batches that each worker holds ready (torch.utils.data.DataLoader, prefetch_factor)


@dataclass(frozen=True)
class Machines:
    """What the run is planned for."""

    gpus: int = 1
    device: str = "80GB"
    """A name of DEVICES, or a size such as 48GB."""
    throughput_tflops: float | None = None  # reached by each device
    measured: Path | None = None  # an earlier run's folder

    @property
    def size_bytes(self) -> int:
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB", self.device)
        if size and float(size[1]) > 0:
            return int(float(size[1]) * GB)
        if self.device in DEVICES:
            return DEVICES[self.device] * GB
        raise UserError(
            "plan",
            f"device is {self.device!r}, not one of {', '.join(DEVICES)}, nor a size; give one, such as 48GB",
        )


@dataclass(frozen=True)
class Forecast:
    model: str
    mode: str
    machines: Machines
    engine: str  # a name of ENGINES
    inputs: Inputs
    left_out: list[tuple[str, str]]  # (path, reason) of entries that training will not use
    data: DataForecast
    largest: Shape
    batch: int
    steps: int
    ways: int  # cache_variants
    rehearsal: Rehearsal  # as the engine computes
    peaks: dict[str, dict[str, int]]  # on each device
    kept_bytes: dict[bool, int]  # gradient checkpointing or not -> activations kept for the backward pass
    host_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    step_flops: dict[str, float]  # phase -> of a mean micro-step of one process
    run_flops: float  # of all steps, on all devices
    throughput: throughput.Throughput | None
    verdict: Verdict
    offers: list[Offer]


def forecast(recipe: Recipe, machines: Machines, told: Callable[[str], None] = lambda _: None) -> Forecast:
    """told: what is being done now. Raises UserError for what training would refuse, and for unknown machines."""
    engine = sharding.name_of(recipe.parallel.engine, machines.gpus)
    check(recipe, machines)
    family, mode, _ = choose_family(recipe)
    world = machines.gpus // recipe.parallel.context_parallel  # that take samples of their own
    inputs = gather(recipe, family, mode, group=recipe.training.train_batch_size * world)
    plan = inputs.plan(0)
    accumulate = recipe.training.gradient_accumulation_steps
    data = forecast_data(plan, inputs.train, inputs.rules, accumulate=accumulate)
    steps = steps_of(recipe, data.micro_steps)

    known: dict[Any, Rehearsal] = {}

    def rehearsed(
        recipe: Recipe, engine: str, draws: list[Draw], phases: Set[str], like: Rehearsal | None
    ) -> Rehearsal:
        if ENGINES[engine].own_copies and recipe.training.mixed_precision != "no":
            recipe = replace(recipe, model=replace(recipe.model, trained_weights="bf16_stochastic"))
        captions = [inputs.train[draw.record].text for draw in draws]
        alike = replace(recipe, parallel=replace(Parallel(), context_parallel=recipe.parallel.context_parallel))
        key = (alike, draws[0].shape, len(draws), frozenset(phases))
        if key not in known:  # engines and their numbers of devices share what one device does
            known[key] = rehearse(recipe, draws, captions, phases=phases, like=like)
        return known[key]

    def first_draws(recipe: Recipe, gpus: int) -> list[Draw]:
        """Of the first rank in the first micro-step, which is the largest."""
        b = recipe.training.train_batch_size
        world = gpus // recipe.parallel.context_parallel
        rules = size_rules(recipe, family)
        fresh = Plan(inputs.train, rules, group=b * world, seed=recipe.training.seed, largest_first=True)
        return fresh.share(0, 0, b)

    def changed_by(changed: tuple[Change, ...]) -> tuple[Recipe, int, dict[str, Any]]:
        """(recipe, devices, settings) with these changes. Raises UserError if they do not go with the rest."""
        settings = {name: value for change in changed for name, value in change.settings.items()}
        gpus = settings.pop("gpus", machines.gpus)
        other = build({**flat(recipe), **settings})
        check(other, replace(machines, gpus=gpus))
        check_split(family, other.parallel.context_parallel)
        return other, gpus, settings

    def goes(changed: tuple[Change, ...]) -> bool:
        try:
            changed_by(changed)
        except UserError:
            return False
        return True

    def attempt(changed: tuple[Change, ...], base: Rehearsal | None = None) -> tuple[Verdict, Rehearsal]:
        told(" and ".join(change.words for change in changed) or "the largest step")
        other, gpus, settings = changed_by(changed)
        name = sharding.name_of(other.parallel.engine, gpus)
        draws, phases = first_draws(other, gpus), shown
        if base is not None:
            otherwise = [*settings, *(["trained_weights"] if name != engine else [])]
            phases = shown & levers.reworked(otherwise)
        found = rehearsed(other, name, draws, phases, base)
        peaks, _ = on_each(other, found, gpus)
        if not with_preview(other, inputs):
            peaks.pop("preview", None)
        return judge(peaks, machines.size_bytes), found

    shown = ALL if with_preview(recipe, inputs) else ALL - {"preview"}
    verdict, base = attempt(())
    peaks, kept_back_bytes = on_each(recipe, base, machines.gpus)
    draws = first_draws(recipe, machines.gpus)
    checkpointing = recipe.training.gradient_checkpointing
    told("activations without gradient_checkpointing" if checkpointing else "activations with gradient_checkpointing")
    toggled = replace(recipe, training=replace(recipe.training, gradient_checkpointing=not checkpointing))
    other = rehearsed(toggled, engine, draws, TRAINED, base)
    sizes = sized(
        data, base, lambda shape: rehearsed(recipe, engine, at(draws, shape), TRAINED | {"encode"}, base), told
    )
    curves = {
        phase: throughput.Curve([*sizes], [found.flops.get(phase, 0) for found in sizes.values()])
        for phase in ("encode", "forward", "backward")
    }
    together = recipe.parallel.context_parallel  # devices of which each does its part of a clip
    whole = throughput.Curve(
        [*sizes], [together * sum(found.flops.get(phase, 0) for phase in curves) for found in sizes.values()]
    )
    mean = {
        phase: sum(curve(bucket.tokens) * bucket.micro_steps for bucket in data.buckets) / data.micro_steps
        for phase, curve in curves.items()
    }
    possible = changes(recipe, engine, machines.gpus, base.still_blocks, tiles=family.vae_tiles)
    candidates = [change for change in possible if goes((change,))]
    offers = search(candidates, goes, partial(attempt, base=base), (verdict, base))
    return Forecast(
        model=family.name,
        mode=mode,
        machines=machines,
        engine=engine,
        inputs=inputs,
        left_out=left_out(inputs, plan),
        data=data,
        largest=draws[0].shape,
        batch=len(draws),
        steps=steps,
        ways=recipe.cache.cache_variants,
        rehearsal=base,
        peaks=peaks,
        kept_bytes={checkpointing: base.saved_bytes, not checkpointing: other.saved_bytes},
        host_bytes=host_bytes(recipe, base, draws, family.needs[mode], machines.gpus, kept_back_bytes),
        disk_bytes=disk_bytes(recipe, base, steps, data, len(inputs.train), sizes),
        step_flops=mean,
        run_flops=sum(mean.values()) * steps * accumulate * machines.gpus,
        throughput=expected_throughput(machines, whole, len(draws)),
        verdict=verdict,
        offers=offers,
    )


def check(recipe: Recipe, machines: Machines) -> None:
    """Raises UserError for machines that there are not, and for what so many cannot do."""
    machines.size_bytes  # noqa: B018
    gpus, together, given = machines.gpus, recipe.parallel.context_parallel, machines.throughput_tflops
    problems = []
    if gpus < 1:
        problems.append(f"gpus is {gpus}, and so many devices train nothing; give 1 or more")
    elif gpus % together:
        problems.append(
            f"gpus is {gpus} and context_parallel is {together}, of which gpus must be a multiple; give "
            f"{-(-gpus // together) * together}, or leave context_parallel out"
        )
    if given is not None and not 0 < given < MOST_TFLOPS:
        problems.append(
            f"throughput is {given:g} TFLOP/s; it must be more than 0 and less than {MOST_TFLOPS:,}; leave it out "
            "where it is not known"
        )
    if given is not None and machines.measured is not None:
        problems.append("throughput and measured are both given, and say the same; leave one out")
    if gpus > 1:
        problems += [
            f"{name} is {getattr(recipe.memory, name)} and gpus is {gpus}; devices that train together must have all "
            "gradients and weights at once; leave it out, or plan for one"
            for name in levers.pulled_alone(flat(recipe))
        ]
    refuse("plan", problems)


def on_each(recipe: Recipe, found: Rehearsal, gpus: int) -> tuple[dict[str, dict[str, int]], int]:
    """As sharding.peaks, of the recipe's engine; and where the next batch is encoded beside training, that too."""
    parallel = recipe.parallel
    name = sharding.name_of(parallel.engine, gpus)
    peaks, host = sharding.peaks(found, name, gpus, offload=parallel.offload, keep_gathered=parallel.keep_gathered)
    if encodes_ahead(recipe.memory.encode_ahead, on_gpu=True, low_vram=recipe.training.low_vram):
        encoding = peaks.get("encode", {}).get("encode", 0)
        peaks |= {phase: {**peaks[phase], "encode": encoding} for phase in BESIDE & peaks.keys() if encoding}
    return peaks, host


def with_preview(recipe: Recipe, inputs: Inputs) -> bool:
    shown = recipe.validation
    return bool(shown.validation_prompts or (shown.preview_count and len(inputs.held_out)))


def sized(
    data: DataForecast, base: Rehearsal, rehearsed: Callable[[Shape], Rehearsal], told: Callable[[str], None]
) -> dict[int, Rehearsal]:
    """Tokens of a sample -> the step at that size: the most, the least, and those of the middle sample."""
    most, least = data.buckets[0], data.buckets[-1]
    seen, middle = 0, most
    for middle in data.buckets:
        seen += middle.samples
        if 2 * seen >= data.samples:
            break
    found = {most.tokens: base}
    for bucket in (least, middle):
        if bucket.tokens not in found:
            told(f"a step of {bucket.shape.frames} x {bucket.shape.height} x {bucket.shape.width}")
            found[bucket.tokens] = rehearsed(bucket.shape)
    return found


def at(draws: list[Draw], shape: Shape) -> list[Draw]:
    """The same of another shape."""
    return [replace(draw, shape=shape, frames=tuple(range(shape.frames)), ref_frame=0) for draw in draws]


def left_out(inputs: Inputs, plan: Plan) -> list[tuple[str, str]]:
    rows = [(row.path, row.reason) for row in (*inputs.scan.left_out, *inputs.unsuited)]
    return rows + [(inputs.train[record].path, reason) for record, reason in plan.left_out]


def host_bytes(
    recipe: Recipe, found: Rehearsal, draws: list[Draw], needs: tuple[str, ...], gpus: int, kept_back_bytes: int
) -> dict[str, int]:
    """Of the machine's own memory, in the largest step, for all processes of one machine."""
    frames, height, width = draws[0].shape
    per_pixel = 3 + 3 * ("control" in needs) + 6 * 4 * ("camera" in needs) + ("mask" in needs)  # bytes; rays are fp32
    batch = len(draws) * frames * height * width * per_pixel
    workers = recipe.data.dataloader_num_workers
    frozen = sum(size for name, size in found.weight_bytes.items() if name != "network")
    waiting = {
        "what offload keeps there": kept_back_bytes,
        "activations that wait there": found.offloaded_bytes,
        "weights of swapped blocks": found.swapped_bytes,
    }
    copies = {"copies of what is saved, while it is written": saved_bytes(recipe, found)}
    copies = copies if recipe.output.save_in_background else {}
    return (
        {what: gpus * size for what, size in waiting.items() if size}
        | copies
        | {
            "batches that workers hold ready": gpus * batch * max(1, workers * (PREFETCHED + 1)),
            "frozen networks between uses" if recipe.training.low_vram else "networks while they load": gpus
            * (frozen if recipe.training.low_vram else max(found.weight_bytes["network"], frozen)),
        }
    )


def disk_bytes(
    recipe: Recipe, found: Rehearsal, steps: int, data: DataForecast, clips: int, sizes: dict[int, Rehearsal]
) -> dict[str, int]:
    """One checkpoint, all that are kept, and a cache of everything that is trained on."""
    average = 4 * found.trainable if recipe.optimization.use_ema else 0
    one = saved_bytes(recipe, found) + (found.weight_bytes["network"] + average if average else 0)
    made = -(-steps // recipe.output.checkpointing_steps)
    kept = min(made, recipe.output.checkpoints_total_limit or made)
    encoded = throughput.Curve([*sizes], [rehearsal.encoded_bytes for rehearsal in sizes.values()])
    mean = sum(encoded(bucket.tokens) * bucket.samples for bucket in data.buckets) / data.samples
    ways = max(recipe.cache.cache_variants, 1)
    return {
        "one checkpoint": one,
        f"the {kept} kept, and the next while it is written": one * (kept + 1),
        f"a cache of {clips:,} clips, each in {ways} way{'s' if ways > 1 else ''}, at most": int(mean * clips * ways),
    }


def saved_bytes(recipe: Recipe, found: Rehearsal) -> int:
    """Weights, optimizer state and moving average, each once."""
    average = 4 * found.trainable if recipe.optimization.use_ema else 0
    return found.weight_bytes["network"] + found.state_bytes + average


def expected_throughput(
    machines: Machines, batch_flops: throughput.Curve, batch_size: int
) -> throughput.Throughput | None:
    if machines.throughput_tflops is not None:
        return throughput.given(machines.throughput_tflops * 1e12)
    if machines.measured is not None:
        return throughput.measured(machines.measured, batch_flops, batch_size)
    peak = PEAK_FLOPS.get(machines.device)
    return None if peak is None else throughput.of_peak(peak, machines.device)
