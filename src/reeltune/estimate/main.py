"""`reeltune plan`: what a run will see, need and take, before it. Reads measurements and headers, never weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from reeltune.config.parse import build, flat
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.types import Draw
from reeltune.data.plan import Plan
from reeltune.distributed.engine import PEAK_FLOPS
from reeltune.estimate import sharding, turns
from reeltune.estimate.epoch import DataForecast, forecast_data
from reeltune.estimate.estimator import Estimator
from reeltune.estimate.machines import Machines, check
from reeltune.estimate.remedies import Change, Offer, Verdict, changes, judge, search, speedups, spend, values_of
from reeltune.estimate.result import StepEstimate
from reeltune.estimate.sharding import ENGINES
from reeltune.estimate.throughput import Throughput, Timed, curve, measured, of_peak, timed_steps
from reeltune.families.spec import learning
from reeltune.memory.lever import Values
from reeltune.run.data import Inputs, gather
from reeltune.run.model import check_split, chosen_objective, other_expert_bytes
from reeltune.run.sizes import size_rules
from reeltune.training.background_save import saves_in_background
from reeltune.training.loop import steps_of
from reeltune.training.prefetch import encodes_ahead
from reeltune.training.rate import Rates, rate_of

BESIDE = {"forward", "backward", "step"}  # phases in which the next batch may be encoded
LOADING = "networks while they load"
PREFETCHED = 2  # batches that each worker holds ready (torch.utils.data.DataLoader, prefetch_factor)


def forecast(recipe: Recipe, machines: Machines, progress: Callable[[str], None] = lambda _: None) -> Forecast:
    """What the run will see, need and take. progress: is called with what is being estimated.

    Raises UserError for what training would refuse, and for machines that there are not.
    """
    check(recipe, machines)
    timed = None if machines.measured is None else timed_steps(machines.measured)
    estimator, together = Estimator(recipe), recipe.parallel.context_parallel
    group = recipe.training.train_batch_size * machines.gpus // together
    inputs = gather(recipe, estimator.family, estimator.mode, group=group)
    plan = Forecast(recipe, machines, inputs, estimator, timed, progress)
    progress("the largest step")
    _ = plan.largest_step  # which training may refuse
    return plan


@dataclass(frozen=True)
class Forecast:
    """A run on machines. What it will see, need and take is computed when it is first asked for."""

    recipe: Recipe
    machines: Machines
    inputs: Inputs
    estimator: Estimator
    timed: Timed | None  # steps of machines.measured
    progress: Callable[[str], None]

    @property
    def engine(self) -> str:
        """A name of ENGINES. One process has nothing to shard."""
        return "one" if self.machines.gpus == 1 else self.recipe.parallel.engine or "ddp"

    @property
    def networks(self) -> int:
        """How many networks learn."""
        return 2 if self.recipe.model.expert == "both" else 1

    # ---- data

    @cached_property
    def first_epoch(self) -> Plan:
        return self.inputs.plan(0)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """(path, reason) of entries that training will not use."""
        rows = [(row.path, row.reason) for row in (*self.inputs.scan.left_out, *self.inputs.unsuited)]
        return rows + [(self.inputs.train[record].path, reason) for record, reason in self.first_epoch.left_out]

    @cached_property
    def data(self) -> DataForecast:
        accumulate = self.recipe.training.gradient_accumulation_steps
        return forecast_data(self.first_epoch, self.inputs.train, self.inputs.rules, accumulate=accumulate)

    @cached_property
    def steps(self) -> int:
        return steps_of(self.recipe, self.first_epoch)

    @property
    def micro_steps(self) -> int:
        return self.steps * self.recipe.training.gradient_accumulation_steps

    @property
    def repeated(self) -> float:
        """Share of the run's samples at most, which fill up its last groups: of all epochs that it begins."""
        plan = self.first_epoch
        epochs = plan.epochs_within(self.micro_steps)
        return plan.repeats(epochs) / (plan.micro_steps_before(epochs) * plan.group)

    @property
    def rates(self) -> Rates:
        return Rates.of(rate_of(self.recipe.optimization, self.steps), self.steps)

    # ---- memory

    @cached_property
    def draws(self) -> list[Draw]:
        """The samples of the first rank in the first micro-step, which is the largest."""
        recipe = self.recipe
        batch, seed = recipe.training.train_batch_size, recipe.training.seed
        group = batch * self.machines.gpus // recipe.parallel.context_parallel
        rules = size_rules(recipe, self.estimator.family)
        return Plan(self.inputs.train, rules, group=group, seed=seed, largest_first=True).share(0, 0, batch)

    def estimate(self, draws: list[Draw], *, preview: bool = False) -> StepEstimate:
        """A step of these samples on one device, in the precision in which the engine computes."""
        recipe = self.recipe
        if ENGINES[self.engine].own_copies and recipe.training.mixed_precision != "no":
            recipe = replace(recipe, model=replace(recipe.model, trained_weights="bf16_stochastic"))
        captions = [self.inputs.train[draw.record].text for draw in draws]
        return self.estimator.step(recipe, draws, captions, preview=preview)

    @cached_property
    def largest_step(self) -> StepEstimate:
        shown = self.recipe.validation
        preview = bool(shown.validation_prompts or (shown.preview_count and len(self.inputs.held_out)))
        return self.estimate(self.draws, preview=preview)

    @cached_property
    def shares(self) -> tuple[dict[str, sharding.Parts], int, int]:
        """(phase -> part -> bytes on each device, bytes that each process keeps in the machine's own memory, those that
        it keeps there of a second network that learns).

        The first count that second network too and, where the next batch is encoded while training, its encoding.
        """
        parallel, run = self.recipe.parallel, (self.largest_step, self.engine, self.machines.gpus)
        peaks, host = sharding.peaks(*run, offload=parallel.offload, keep_gathered=parallel.keep_gathered)
        other, resting = sharding.resting(*run, offload=parallel.offload) if self.networks > 1 else (0, 0)
        encoding = peaks.get("encode", {}).get("encode", 0) if encodes_ahead(self.recipe, on_gpu=True) else 0
        for phase, parts in peaks.items():
            parts |= {"other": other} if other else {}
            parts |= {"encode": encoding} if encoding and phase in BESIDE else {}
        return peaks, host, resting

    @property
    def peaks(self) -> dict[str, sharding.Parts]:
        """phase -> part -> bytes on each device."""
        return self.shares[0]

    @property
    def verdict(self) -> Verdict:
        return judge(self.peaks, self.machines.size_bytes)

    def changed(self, changes: Sequence[Change]) -> Forecast:
        """This run with these changes. Raises UserError if they do not go with the rest."""
        settings = {name: value for change in changes for name, value in change.settings.items()}
        machines = replace(self.machines, gpus=settings.pop("gpus", self.machines.gpus))
        recipe = build({**flat(self.recipe), **settings})
        check(recipe, machines)
        check_split(self.estimator.family, recipe.parallel.context_parallel)
        return replace(self, recipe=recipe, machines=machines)

    def goes(self, changes: Sequence[Change]) -> bool:
        try:
            self.changed(changes)
        except UserError:
            return False
        return True

    def try_out(self, changes: Sequence[Change]) -> tuple[Verdict, StepEstimate]:
        self.progress(" and ".join(change.words for change in changes))
        run = self.changed(changes)
        try:
            return run.verdict, run.largest_step
        except UserError:  # training would refuse it, so that it fits nowhere
            return replace(self.verdict, have_bytes=0), self.largest_step

    @property
    def values(self) -> Values:
        step, tiles = self.largest_step, self.estimator.family.vae_tiles
        network = {"blocks": step.blocks, "still_blocks": step.still_blocks, "tiles": tiles}
        return values_of(self.recipe, self.engine, self.machines.gpus, **network)

    @cached_property
    def offers(self) -> list[Offer]:
        """The cheapest sets of changes that would make it fit."""
        possible = [one for one in changes(self.values) if self.goes([one])]
        return search(possible, self.goes, self.try_out, (self.verdict, self.largest_step))

    @cached_property
    def faster(self) -> Offer | None:
        """The changes that would make a step faster, where there is room to spare."""
        return spend(speedups(self.values), self.goes, self.try_out, (self.verdict, self.largest_step))

    @cached_property
    def kept_bytes(self) -> dict[str, int]:
        """Bytes of activations kept for the backward pass: with gradient checkpointing as it is asked for, or else all
        of it, and without."""
        training = self.recipe.training
        on = training.gradient_checkpointing
        with_it = "with gradient_checkpointing" + (f": {on}" if isinstance(on, str) else "")
        self.progress(f"activations {'without' if on else 'with'} gradient_checkpointing")
        other = replace(self.recipe, training=replace(training, gradient_checkpointing=not on))
        steps = [self.largest_step, replace(self, recipe=other).largest_step]
        spared, whole = steps if on else reversed(steps)
        return {with_it: spared.saved_bytes, "without": whole.saved_bytes}

    @property
    def host_bytes(self) -> dict[str, int]:
        """What all processes together hold in the machine's own memory during the largest step -> bytes."""
        recipe, family, step, gpus = self.recipe, self.estimator.family, self.largest_step, self.machines.gpus
        (frames, height, width), needs = self.draws[0].shape, family.needs[self.estimator.mode]
        per_pixel = 3 + 3 * ("control" in needs) + 6 * 4 * ("camera" in needs) + ("mask" in needs)  # bytes; rays: fp32
        batch = len(self.draws) * frames * height * width * per_pixel
        workers = recipe.data.dataloader_num_workers
        frozen = sum(size for name, size in step.weight_bytes.items() if name != "network")
        loading = max(step.weight_bytes["network"], frozen)
        loaded = ("frozen networks between uses", frozen) if recipe.training.low_vram else (LOADING, loading)
        _, kept_back, resting = self.shares
        is_copied = saves_in_background(recipe, 1, self.steps)
        bytes_of = {
            "what offload keeps there": gpus * kept_back,
            "activations that wait there": gpus * step.offloaded_bytes,
            "weights of swapped blocks": gpus * step.swapped_bytes,
            "experts between their turns": gpus * resting,
            "copies of what is saved, kept between saves": is_copied * self.saved_bytes,
            "batches that workers hold ready": gpus * batch * max(1, workers * (PREFETCHED + 1)),
            loaded[0]: gpus * loaded[1],
            "the other expert, for previews": other_expert_bytes(recipe, family),  # in the process that writes
        }
        return {what: size for what, size in bytes_of.items() if size}

    @property
    def disk_bytes(self) -> dict[str, int]:
        """One checkpoint, all that are kept, and a cache of everything that is trained on."""
        output, clips = self.recipe.output, len(self.inputs.train)
        one = self.saved_bytes
        if self.recipe.optimization.use_ema:  # which is written as weights too
            one += self.networks * (self.largest_step.kept_bytes + self.average_bytes)
        made = -(-self.steps // output.checkpointing_steps)
        kept = min(made, output.checkpoints_total_limit or made)
        ways = max(self.recipe.cache.cache_variants, 1)
        entry_bytes = self.mean([step.encoded_bytes for step in self.sizes.values()])
        entries = f"{clips:,} clips, each in {ways} way{'s' if ways > 1 else ''}"
        return {
            "one checkpoint": one,
            f"the {kept} kept, and the next while it is written": one * (kept + 1),
            f"a cache of {entries}, at most": int(entry_bytes * clips * ways),
        }

    @property
    def saved_bytes(self) -> int:
        """Weights, optimizer state and moving average, each once, of each network that learns."""
        return self.networks * (self.largest_step.kept_bytes + self.largest_step.state_bytes + self.average_bytes)

    @property
    def average_bytes(self) -> int:
        return 4 * self.largest_step.trainable if self.recipe.optimization.use_ema else 0  # in fp32

    # ---- time

    @cached_property
    def sizes(self) -> dict[int, StepEstimate]:
        """Tokens of a sample -> the step at that size: the most, the least, and those of the middle sample."""
        buckets = self.data.buckets
        counts = np.cumsum([bucket.samples for bucket in buckets])
        middle = buckets[int(np.searchsorted(2 * counts, self.data.samples))]
        sizes = {buckets[0].tokens: self.largest_step}
        for bucket in (buckets[-1], middle):
            if bucket.tokens not in sizes:
                shape = bucket.shape
                self.progress(f"a step of {shape.frames} x {shape.height} x {shape.width}")
                one_size = {"shape": shape, "frames": tuple(range(shape.frames)), "ref_frame": 0}
                sizes[bucket.tokens] = self.estimate([replace(draw, **one_size) for draw in self.draws])
        return sizes

    def mean(self, values: Sequence[int]) -> float:
        """The mean over an epoch's micro-steps of a quantity that has these values at `sizes`."""
        by_tokens = curve(self.sizes, values)
        return (
            sum(by_tokens(bucket.tokens) * bucket.micro_steps for bucket in self.data.buckets) / self.data.micro_steps
        )

    @property
    def step_flops(self) -> dict[str, float]:
        """phase -> FLOPs of a mean micro-step of one process."""
        passes = [step.passes for step in self.sizes.values()]
        return {phase: self.mean([one[phase] for one in passes]) for phase in passes[0]}

    @property
    def run_flops(self) -> float:
        """FLOPs of all steps, on all devices."""
        return sum(self.step_flops.values()) * self.micro_steps * self.machines.gpus

    @property
    def throughput(self) -> Throughput | None:
        """What each device reaches, as given, measured or usual for it; None where it is not known."""
        given, device = self.machines.throughput_tflops, self.machines.device
        if given is not None:
            return Throughput(given * 1e12, given * 1e12, "as given, taken as exact")
        if self.timed is not None:
            together = self.recipe.parallel.context_parallel
            clip_flops = [together * sum(step.passes.values()) for step in self.sizes.values()]
            return measured(self.timed, curve(self.sizes, clip_flops), len(self.draws))
        compiled = self.recipe.training.compile == "blocks"
        return of_peak(PEAK_FLOPS[device], device, compiled=compiled) if device in PEAK_FLOPS else None

    @property
    def expert_changes(self) -> turns.Changes | None:
        first, *others = learning(self.estimator.family)
        share = chosen_objective(first, self.recipe.loss).share
        run = self.steps, share, self.largest_step, self.engine, self.machines.device
        return turns.changes_in(*run) if others else None
