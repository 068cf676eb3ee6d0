"""`reeltune plan`: what a run will see, need and take, before it. Reads measurements and headers, never weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from reeltune.config.parse import build, flat
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError, refuse
from reeltune.core.types import Draw, Shape
from reeltune.data.plan import Plan
from reeltune.distributed.engine import PEAK_FLOPS
from reeltune.estimate import sharding, throughput, turns
from reeltune.estimate.epoch import DataForecast, forecast_data
from reeltune.estimate.estimator import Estimator
from reeltune.estimate.remedies import Change, Offer, Verdict, changes, judge, search
from reeltune.estimate.result import StepEstimate
from reeltune.estimate.sharding import ENGINES
from reeltune.families.spec import learning
from reeltune.memory import levers
from reeltune.run.data import Inputs, gather
from reeltune.run.model import check_split, chosen_objective, other_expert_bytes
from reeltune.run.sizes import size_rules
from reeltune.training.loop import steps_of
from reeltune.training.prefetch import encodes_ahead
from reeltune.training.rate import Rates, rate_of

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
LOADING = "networks while they load"
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
    planned: Planned
    left_out: list[tuple[str, str]]  # (path, reason) of entries that training will not use
    data: DataForecast
    largest: Shape
    batch: int
    steps: int
    repeated: float  # share of the run's samples at most, which fill up its last groups
    rates: Rates  # of the optimizer, over those steps
    largest_step: StepEstimate  # as the engine computes
    peaks: dict[str, dict[str, int]]  # on each device
    kept_bytes: dict[str, int]  # with gradient checkpointing and without -> activations kept for the backward pass
    host_bytes: dict[str, int]
    disk_bytes: dict[str, int]
    step_flops: dict[str, float]  # phase -> of a mean micro-step of one process
    run_flops: float  # of all steps, on all devices
    throughput: throughput.Throughput | None
    expert_changes: turns.Changes | None
    verdict: Verdict
    offers: list[Offer]


@dataclass(frozen=True)
class Planned:
    """A run on machines, and what stays as it is while changes of the two are tried."""

    recipe: Recipe
    machines: Machines
    inputs: Inputs
    estimator: Estimator
    progress: Callable[[str], None]  # is told what is estimated now

    @property
    def engine(self) -> str:
        """A name of ENGINES. One process has nothing to shard."""
        return "one" if self.machines.gpus == 1 else self.recipe.parallel.engine or "ddp"


def forecast(recipe: Recipe, machines: Machines, progress: Callable[[str], None] = lambda _: None) -> Forecast:
    """progress: as of Planned. Raises UserError for what training would refuse, and for machines that there are not."""
    check(recipe, machines)
    estimator = Estimator(recipe)
    family, mode, together = estimator.family, estimator.mode, recipe.parallel.context_parallel
    inputs = gather(recipe, family, mode, group=recipe.training.train_batch_size * machines.gpus // together)
    planned = Planned(recipe, machines, inputs, estimator, progress)
    plan = inputs.plan(0)
    accumulate = recipe.training.gradient_accumulation_steps
    data = forecast_data(plan, inputs.train, inputs.rules, accumulate=accumulate)
    steps = steps_of(recipe, plan)

    verdict, largest = attempt(planned, ())
    peaks, *host = on_each(planned, largest)
    draws = first_draws(planned)
    sizes = at_sizes(planned, data, draws, largest)
    step_flops = mean_flops(data, sizes)
    clip_flops = throughput.curve(sizes, [together * sum(step.passes.values()) for step in sizes.values()])
    return Forecast(
        planned=planned,
        left_out=left_out(inputs, plan),
        data=data,
        largest=draws[0].shape,
        batch=len(draws),
        steps=steps,
        repeated=repeated(plan, steps * accumulate),
        rates=Rates.of(rate_of(recipe.optimization, steps), steps),
        largest_step=largest,
        peaks=peaks,
        kept_bytes=kept_bytes(planned, draws, largest),
        host_bytes=host_bytes(planned, largest, draws, *host),
        disk_bytes=disk_bytes(planned, largest, steps, data, sizes),
        step_flops=step_flops,
        run_flops=sum(step_flops.values()) * steps * accumulate * machines.gpus,
        throughput=expected_throughput(machines, clip_flops, len(draws), recipe.training.compile == "blocks"),
        expert_changes=expert_changes(planned, largest, steps),
        verdict=verdict,
        offers=offers(planned, verdict, largest),
    )


def repeated(plan: Plan, micro_steps: int) -> float:
    """Share of the samples of all epochs that so many micro-steps begin, taken in whole."""
    epochs = plan.epochs_within(micro_steps)
    return plan.repeats(epochs) / (plan.micro_steps_before(epochs) * plan.group)


def first_draws(planned: Planned) -> list[Draw]:
    """Of the first rank in the first micro-step, which is the largest."""
    recipe = planned.recipe
    batch, seed = recipe.training.train_batch_size, recipe.training.seed
    group = batch * planned.machines.gpus // recipe.parallel.context_parallel
    rules = size_rules(recipe, planned.estimator.family)
    return Plan(planned.inputs.train, rules, group=group, seed=seed, largest_first=True).share(0, 0, batch)


def estimate(planned: Planned, draws: list[Draw], *, preview: bool = False) -> StepEstimate:
    """Of one device, in the precision in which the engine computes."""
    recipe = planned.recipe
    if ENGINES[planned.engine].own_copies and recipe.training.mixed_precision != "no":
        recipe = replace(recipe, model=replace(recipe.model, trained_weights="bf16_stochastic"))
    captions = [planned.inputs.train[draw.record].text for draw in draws]
    return planned.estimator.step(recipe, draws, captions, preview=preview)


def changed(planned: Planned, changes: Sequence[Change]) -> Planned:
    """With these changes. Raises UserError if they do not go with the rest."""
    settings = {name: value for change in changes for name, value in change.settings.items()}
    machines = replace(planned.machines, gpus=settings.pop("gpus", planned.machines.gpus))
    recipe = build({**flat(planned.recipe), **settings})
    check(recipe, machines)
    check_split(planned.estimator.family, recipe.parallel.context_parallel)
    return replace(planned, recipe=recipe, machines=machines)


def goes(planned: Planned, changes: Sequence[Change]) -> bool:
    """Whether they go together, and with the rest of the recipe."""
    try:
        changed(planned, changes)
    except UserError:
        return False
    return True


def attempt(planned: Planned, changes: Sequence[Change]) -> tuple[Verdict, StepEstimate]:
    """The largest step with these changes, and whether it fits."""
    planned.progress(" and ".join(change.words for change in changes) or "the largest step")
    run = changed(planned, changes)
    shown = run.recipe.validation
    preview = bool(shown.validation_prompts or (shown.preview_count and len(run.inputs.held_out)))
    step = estimate(run, first_draws(run), preview=preview)
    return judge(on_each(run, step)[0], run.machines.size_bytes), step


def offers(planned: Planned, verdict: Verdict, largest: StepEstimate) -> list[Offer]:
    """Of what could make it fit, the cheapest."""
    network = {"blocks": largest.blocks, "still_blocks": largest.still_blocks}
    tiles = planned.estimator.family.vae_tiles
    possible = changes(planned.recipe, planned.engine, planned.machines.gpus, **network, tiles=tiles)
    candidates = [one for one in possible if goes(planned, (one,))]
    return search(candidates, partial(goes, planned), partial(attempt, planned), (verdict, largest))


def kept_bytes(planned: Planned, draws: list[Draw], largest: StepEstimate) -> dict[str, int]:
    """With gradient checkpointing as it is asked for, or else all of it, and without -> activations kept."""
    recipe = planned.recipe
    on = recipe.training.gradient_checkpointing
    with_it = "with gradient_checkpointing" + (f": {on}" if isinstance(on, str) else "")
    planned.progress(f"activations {'without' if on else 'with'} gradient_checkpointing")
    other = replace(recipe, training=replace(recipe.training, gradient_checkpointing=not on))
    step = estimate(replace(planned, recipe=other), draws)
    spared, whole = (largest, step) if on else (step, largest)
    return {with_it: spared.saved_bytes, "without": whole.saved_bytes}


def at_sizes(planned: Planned, data: DataForecast, draws: list[Draw], largest: StepEstimate) -> dict[int, StepEstimate]:
    """Tokens of a sample -> the step at that size: the most, the least, and those of the middle sample."""
    counts = np.cumsum([bucket.samples for bucket in data.buckets])
    middle = data.buckets[int(np.searchsorted(2 * counts, data.samples))]
    sizes = {data.buckets[0].tokens: largest}
    for bucket in (data.buckets[-1], middle):
        if bucket.tokens not in sizes:
            shape = bucket.shape
            planned.progress(f"a step of {shape.frames} x {shape.height} x {shape.width}")
            same = [replace(draw, shape=shape, frames=tuple(range(shape.frames)), ref_frame=0) for draw in draws]
            sizes[bucket.tokens] = estimate(planned, same)
    return sizes


def mean_flops(data: DataForecast, sizes: dict[int, StepEstimate]) -> dict[str, float]:
    """Phase -> FLOPs of a mean micro-step of one process."""
    flops = [step.passes for step in sizes.values()]
    return {phase: mean(data, sizes, [one[phase] for one in flops]) for phase in flops[0]}


def mean(data: DataForecast, sizes: dict[int, StepEstimate], values: list[int]) -> float:
    """Over the micro-steps, of what has these values at those sizes."""
    curve = throughput.curve(sizes, values)
    return sum(curve(bucket.tokens) * bucket.micro_steps for bucket in data.buckets) / data.micro_steps


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


def on_each(planned: Planned, step: StepEstimate) -> tuple[dict[str, dict[str, int]], int, int]:
    """(as of sharding.peaks with another that learns and, where the next batch is encoded beside training, that too;
    bytes that each process keeps in the machine's own memory; of those of another that learns)"""
    parallel, run = planned.recipe.parallel, (step, planned.engine, planned.machines.gpus)
    peaks, host = sharding.peaks(*run, offload=parallel.offload, keep_gathered=parallel.keep_gathered)
    other, resting = sharding.resting(*run, offload=parallel.offload) if networks(planned.recipe) > 1 else (0, 0)
    encoding = peaks.get("encode", {}).get("encode", 0) if encodes_ahead(planned.recipe, on_gpu=True) else 0
    for phase, parts in peaks.items():
        parts |= {"other": other} if other else {}
        parts |= {"encode": encoding} if encoding and phase in BESIDE else {}
    return peaks, host, resting


def left_out(inputs: Inputs, plan: Plan) -> list[tuple[str, str]]:
    rows = [(row.path, row.reason) for row in (*inputs.scan.left_out, *inputs.unsuited)]
    return rows + [(inputs.train[record].path, reason) for record, reason in plan.left_out]


def host_bytes(
    planned: Planned, step: StepEstimate, draws: list[Draw], kept_back_bytes: int, resting_bytes: int
) -> dict[str, int]:
    """Of the machine's own memory in the largest step, for all processes of one. The last two: as of on_each."""
    recipe, family, gpus = planned.recipe, planned.estimator.family, planned.machines.gpus
    (frames, height, width), needs = draws[0].shape, family.needs[planned.estimator.mode]
    per_pixel = 3 + 3 * ("control" in needs) + 6 * 4 * ("camera" in needs) + ("mask" in needs)  # bytes; rays are fp32
    batch = len(draws) * frames * height * width * per_pixel
    workers = recipe.data.dataloader_num_workers
    frozen = sum(size for name, size in step.weight_bytes.items() if name != "network")
    loading = max(step.weight_bytes["network"], frozen)
    loaded = ("frozen networks between uses", frozen) if recipe.training.low_vram else (LOADING, loading)
    bytes_of = {
        "what offload keeps there": gpus * kept_back_bytes,
        "activations that wait there": gpus * step.offloaded_bytes,
        "weights of swapped blocks": gpus * step.swapped_bytes,
        "experts between their turns": gpus * resting_bytes,
        "copies of what is saved, while it is written": recipe.output.save_in_background * saved_bytes(recipe, step),
        "batches that workers hold ready": gpus * batch * max(1, workers * (PREFETCHED + 1)),
        loaded[0]: gpus * loaded[1],
        "the other expert, for previews": other_expert_bytes(recipe, family),  # in the process that writes
    }
    return {what: size for what, size in bytes_of.items() if size}


def disk_bytes(
    planned: Planned, step: StepEstimate, steps: int, data: DataForecast, sizes: dict[int, StepEstimate]
) -> dict[str, int]:
    """One checkpoint, all that are kept, and a cache of everything that is trained on."""
    recipe, clips = planned.recipe, len(planned.inputs.train)
    one = saved_bytes(recipe, step)
    if recipe.optimization.use_ema:  # which is written as weights too
        one += networks(recipe) * (step.kept_bytes + average_bytes(recipe, step))
    made = -(-steps // recipe.output.checkpointing_steps)
    kept = min(made, recipe.output.checkpoints_total_limit or made)
    ways = max(recipe.cache.cache_variants, 1)
    entries = f"{clips:,} clips, each in {ways} way{'s' if ways > 1 else ''}"
    entry_bytes = mean(data, sizes, [step.encoded_bytes for step in sizes.values()])
    return {
        "one checkpoint": one,
        f"the {kept} kept, and the next while it is written": one * (kept + 1),
        f"a cache of {entries}, at most": int(entry_bytes * clips * ways),
    }


def saved_bytes(recipe: Recipe, step: StepEstimate) -> int:
    """Weights, optimizer state and moving average, each once, of each network that learns."""
    return networks(recipe) * (step.kept_bytes + step.state_bytes + average_bytes(recipe, step))


def networks(recipe: Recipe) -> int:
    """That learn."""
    return 2 if recipe.model.expert == "both" else 1


def expert_changes(planned: Planned, step: StepEstimate, steps: int) -> turns.Changes | None:
    first, *others = learning(planned.estimator.family)
    share = chosen_objective(first, planned.recipe.loss).share
    return turns.changes_in(steps, share, step, planned.engine, planned.machines.device) if others else None


def average_bytes(recipe: Recipe, step: StepEstimate) -> int:
    return 4 * step.trainable if recipe.optimization.use_ema else 0  # in fp32


def expected_throughput(
    machines: Machines, batch_flops: Callable[[float], float], batch_size: int, compiled: bool
) -> throughput.Throughput | None:
    if machines.throughput_tflops is not None:
        rate = machines.throughput_tflops * 1e12
        return throughput.Throughput(rate, rate, "as given, taken as exact")
    if machines.measured is not None:
        return throughput.measured(machines.measured, batch_flops, batch_size)
    peak = PEAK_FLOPS.get(machines.device)
    return None if peak is None else throughput.of_peak(peak, machines.device, compiled=compiled)
