"""One training step, run by the very code that trains, on tensors that have sizes and no values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from reeltune import blocks
from reeltune.diffusion.loss import Loss, diffusion_loss, settle
from reeltune.engine import Engine
from reeltune.errors import UserError
from reeltune.families import weights
from reeltune.families.spec import Family, Parts
from reeltune.forecast import depth
from reeltune.forecast.parts import PHASES, Rehearsal
from reeltune.forecast.tracker import ELSEWHERE, HOST, Tracker
from reeltune.inputs import choose_family, encode_options, load_parts
from reeltune.learner import Learner
from reeltune.recipe import Model, Recipe
from reeltune.sample import Setup, at_rest
from reeltune.trainable import matches, released_names, select
from reeltune.types import Batch, Draw, Encoded, Posterior

MOST_BYTES = 2**34  # of pixels in a step
RESIDENT = ("weights", "still", "average", "frozen", "batch")  # parts that are there in every phase
ALL = frozenset(PHASES)
TRAINED = frozenset({"forward", "backward"})
SEEN = frozenset({"encode", "preview"})
CHANGES = {  # setting -> the phases in which it changes more than what is there all the time; others may change all
    "train_batch_size": TRAINED | {"encode"},
    "gradient_accumulation_steps": frozenset[str](),
    "gradient_checkpointing": TRAINED,
    "offload_activations": TRAINED,
    "blocks_to_swap": TRAINED | {"preview"},
    "step_in_backward": TRAINED | {"step"},
    "vae_tiling": SEEN,
    "encode_ahead": frozenset[str](),
    "offload": frozenset[str](),
    "video_sample_n_frames": TRAINED | SEEN,
    "low_vram": SEEN,
    "cache_folder": SEEN,
    "cache_variants": frozenset[str](),
    "use_ema": frozenset({"step"}),
    "use_8bit_adam": frozenset({"step"}),
    "use_came": frozenset({"step"}),
    "use_adafactor": frozenset({"step"}),
    "trained_weights": TRAINED | {"step"},
}


def rehearse(
    recipe: Recipe,
    draws: Sequence[Draw],
    captions: Sequence[str],
    *,
    phases: Set[str] = ALL,
    like: Rehearsal | None = None,
    whole: bool = False,
) -> Rehearsal:
    """A micro-step of these draws, and the optimizer's step after it; then a preview of the first draw's shape.

    phases: those that are run; all others are as in `like`, a rehearsal of the same run, but for what is there all the
    time. Without `like` only "preview" can be left out. whole: with each of equal blocks, which takes long and comes
    to the same (forecast/depth.py). Raises UserError as loading does.
    """
    asked = recipe.training.mixed_precision
    engine = Engine("bf16" if asked == "fp16" else asked, on_cpu=True)  # the CPU has no fp16
    with one_of(recipe.parallel.context_parallel) as mesh:
        return _rehearse(engine, mesh, recipe, draws, captions, phases, like, whole)


@contextmanager
def one_of(count: int) -> Iterator[DeviceMesh | None]:
    """As the first of so many processes that share a clip; the others, with whom it speaks, are not there."""
    if count == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (1, 1, count), mesh_dim_names=("data", "ring", "ulysses"))
    finally:
        dist.destroy_process_group()


def _rehearse(
    engine: Engine,
    mesh: DeviceMesh | None,
    recipe: Recipe,
    draws: Sequence[Draw],
    captions: Sequence[str],
    phases: Set[str],
    like: Rehearsal | None,
    whole: bool,
) -> Rehearsal:
    family, mode, objective = choose_family(recipe)
    training = recipe.training
    with weights.unread() as stand_ins:
        recipe = replace(recipe, training=replace(training, low_vram=False))
        parts = load_parts(recipe, family, engine.device)
        batch = empty_batch(family, mode, draws, captions, stand_ins)
    counts = counts_of(family, parts, recipe.model)
    alike = not recipe.memory.blocks_to_swap and recipe.memory.gradient_checkpointing_share == 1
    stands = depth.shorten(parts.net, family.blocks) if alike and not whole else []
    times = depth.times_of(stands)
    if mesh is not None and family.split is not None:
        family.split(parts.net, mesh)
    setup = Setup(family, mode, parts, objective, engine.autocast, encode_options(recipe))
    learner = Learner(
        family,
        parts,
        engine,
        still_matching(recipe.model, parts.net, counts.names),
        recipe.optimization,
        recipe.memory,
        seed=training.seed,
        gradient_checkpointing=training.gradient_checkpointing,
        batch=len(draws),
        accumulate=training.gradient_accumulation_steps,
    )
    in_backward = recipe.memory.step_in_backward
    if in_backward and phases & (TRAINED | {"step"}):
        phases = phases | TRAINED | {"step"}
    seeds, strata = batch.seeds, [draw.stratum for draw in draws]

    def forward_pass() -> Loss:
        return diffusion_loss(
            family.denoise,
            learner.net,
            objective,
            encoded,
            parts.null,
            seeds,
            strata,
            motion_sub_loss_ratio=recipe.loss.motion_sub_loss_ratio if recipe.loss.motion_sub_loss else None,
            loss_outlier_threshold=recipe.loss.loss_outlier_threshold,
        )

    tracker = Tracker(stand_ins)
    cached = recipe.cache.cache_folder is not None
    own_what_is_there(tracker, parts, learner, batch, times, visiting=training.low_vram or cached)
    if "encode" not in phases:
        assert like is not None
        encoded = renewed(like.encoded, stand_ins)
    elif cached:
        encoded = setup.encode(batch)  # on another day
    if "encode" not in phases or cached:
        tracker.own(tensors_of(encoded), "batch")
    with tracker, host_apart(tracker), depth.counted(stands, tracker):
        if "encode" in phases and not cached:
            with tracker.phase("encode"):
                encoded = setup.encode(batch)
        tracker.rename("encode", "batch")
        resident = {part: tracker.live[part] for part in RESIDENT}
        if in_backward and "step" in phases:  # its state is made bit by bit, and is there in later steps
            learner.backward(forward_pass().value, last=True)
            learner.step(0, recipe.optimization.learning_rate)
            own_state(tracker, learner, times)
        if "forward" in phases:
            with tracker.phase("forward"):
                loss = forward_pass()
            tracker.own(tensors_in(dict(vars(objective))), ELSEWHERE)  # its tables, made once
            saved_bytes, offloaded_bytes = tracker.live["forward"] + tracker.live["casts"], tracker.live[HOST]
            tracker.rename("forward", "activations")
            with tracker.phase("backward"), gradients_owned(tracker, learner.learning, times):
                learner.backward(loss.value / training.gradient_accumulation_steps, last=True)
            gradient_bytes = tracker.live["gradients"]
            reached = tuple(parameter.grad is not None for parameter in learner.learning)
            del loss
        else:
            assert like is not None
            saved_bytes, offloaded_bytes = like.saved_bytes, like.offloaded_bytes
            gradient_bytes, reached = like.gradient_bytes, like.reached
        del batch
        if "step" in phases:
            with_gradients = [*compress(learner.learning, reached)]
            if not in_backward:  # the first step makes the state, which later ones find
                give_gradients(with_gradients, tracker, times, stand_ins)
                learner.step(0, recipe.optimization.learning_rate)
                own_state(tracker, learner, times)
                give_gradients(with_gradients, tracker, times, stand_ins)
            with tracker.phase("step"):
                learner.step(1, recipe.optimization.learning_rate)
            own_state(tracker, learner, times)
            state_bytes = tracker.live["optimizer"]
        else:
            assert like is not None
            state_bytes = like.state_bytes
        if "preview" in phases:
            with tracker.phase("preview"):
                one_pass(setup, learner.plain, encoded)
    peaks = tracker.peaks
    if like is not None:
        peaks |= {phase: like.peaks[phase] | resident for phase in like.peaks.keys() - phases - {"encode"}}
        if "encode" in like.peaks.keys() - phases:
            peaks["encode"] = like.peaks["encode"] | {**resident, "batch": like.peaks["encode"].get("batch", 0)}
    for phase in peaks:  # later steps find it there
        peaks[phase]["optimizer"] = state_bytes
    if training.gradient_accumulation_steps > 1:  # later micro-steps find the gradients of those before
        for phase in ("encode", "forward", "backward"):
            if phase in peaks:
                peaks[phase]["gradients"] = gradient_bytes
    if in_backward and "step" in phases:
        tracker.flops["backward"] = tracker.flops.pop("step")
    sizes = {name: size_bytes(weights_of(module)) for name, module in parts.frozen.items()}
    return Rehearsal(
        peaks=peaks,
        flops={**(like.flops if like is not None else {}), **tracker.flops},
        saved_bytes=saved_bytes,
        gradient_bytes=gradient_bytes,
        state_bytes=state_bytes,
        offloaded_bytes=offloaded_bytes,
        swapped_bytes=sum(size_bytes(weights_of(block)) for block in learner.swapped),
        parameters=counts.parameters,
        trainable=counts.trainable,
        number_bytes=engine.dtype.itemsize,
        weight_bytes={"network": counts.network_bytes, **sizes},
        block_parameters=counts.block_parameters,
        still_blocks=counts.still_blocks,
        other_parameters=counts.other_parameters,
        encoded_bytes=size_bytes(tensors_of(encoded)) // len(draws),
        reached=reached,
        encoded=encoded,
    )


def empty_batch(
    family: Family, mode: str, draws: Sequence[Draw], captions: Sequence[str], stand_ins: AbstractContextManager
) -> Batch:
    """Clips of zeros. Those that may be looked at by more than networks have values; the others need none.

    Raises UserError for clips that no machine could read.
    """
    (frames, height, width), B, needs = draws[0].shape, len(draws), family.needs[mode]
    if B * frames * 3 * height * width > MOST_BYTES:
        raise UserError(
            "recipe",
            f"the largest step has {B} x {frames} frames of {width} x {height}, more than {MOST_BYTES / 1e9:.0f} GB of "
            "pixels before anything is computed; lower the sample sizes, video_sample_n_frames or train_batch_size",
        )
    pixels = torch.zeros(B, frames, 3, height, width, dtype=torch.uint8)
    with stand_ins:
        return Batch(
            draws=list(draws),
            text=list(captions),
            pixels_BFCHW=pixels,
            ref_frame_B=torch.zeros(B, dtype=torch.int64),
            keep={name: torch.ones(B, dtype=torch.bool) for name in ("text", *family.drop)},
            control_BFCHW=torch.zeros(pixels.shape, dtype=torch.uint8) if "control" in needs else None,
            camera_BFCHW=torch.zeros(B, frames, 6, height, width) if "camera" in needs else None,
            mask_BFHW=torch.ones(B, frames, height, width, dtype=torch.bool) if "mask" in needs else None,
        )


@dataclass(frozen=True)
class Counts:
    """Of the whole network."""

    names: dict[str, str]  # ours -> released
    parameters: int
    trainable: int
    network_bytes: int
    block_parameters: int  # of the largest block
    other_parameters: int  # outside of blocks
    still_blocks: int  # of which nothing learns


def counts_of(family: Family, parts: Parts, model: Model) -> Counts:
    """After saying what learns. Raises UserError for patterns that match nothing."""
    net = parts.net
    names = released_names(net, partial(family.to_released, config=parts.config))
    select(net, names, model.trainable_modules, model.trainable_modules_low_learning_rate)
    found = blocks.blocks_of(net, family.blocks)
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in found]
    whole = sum(weight.numel() for weight in net.parameters())
    return Counts(
        names=names,
        parameters=whole,
        trainable=sum(weight.numel() for weight in net.parameters() if weight.requires_grad),
        network_bytes=size_bytes(weights_of(net)),
        block_parameters=max(sizes),
        other_parameters=whole - sum(sizes),
        still_blocks=sum(not any(weight.requires_grad for weight in block.parameters()) for block in found),
    )


def still_matching(model: Model, net: nn.Module, names: dict[str, str]) -> Model:
    """Without the patterns that match only blocks that were taken out."""
    left = [names[name] for name, _ in net.named_parameters()]

    def some(patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(one for one in patterns if any(matches(one, name) for name in left))

    low = some(model.trainable_modules_low_learning_rate)
    return replace(model, trainable_modules=some(model.trainable_modules), trainable_modules_low_learning_rate=low)


Times = Callable[[Tensor], int]


def own_what_is_there(
    tracker: Tracker, parts: Parts, learner: Learner, batch: Batch, times: Times, *, visiting: bool
) -> None:
    """visiting: frozen networks are on the device only while they are borrowed."""
    tensors = weights_of(parts.net)
    learning = {id(parameter) for parameter in learner.learning}
    tracker.own((tensor for tensor in tensors if id(tensor) in learning), "weights", times)
    tracker.own((tensor for tensor in tensors if id(tensor) not in learning), "still", times)
    for block in learner.swapped:
        tracker.own(weights_of(block), ELSEWHERE)
    tracker.own(parts.null.values(), "batch")
    tracker.own(tensors_in(vars(batch)), ELSEWHERE)  # in the host's memory until Batch.to
    if learner.average is not None:
        for name, average in learner.average.weights.items():
            count = times(learner.average.trained[name])
            tracker.own([average], "average", lambda _, count=count: count)
    for module in parts.frozen.values():
        tracker.own(weights_of(module), ELSEWHERE if visiting else "frozen")
    if visiting:

        @contextmanager
        def borrow(name: str) -> Iterator[nn.Module]:
            module = parts.frozen[name]
            tracker.own(weights_of(module), "frozen")
            yield module
            tracker.own(weights_of(module), ELSEWHERE)

        parts.borrow = borrow


def own_state(tracker: Tracker, learner: Learner, times: Times) -> None:
    states = learner.optimizer.state_dict()
    for i, state in states.get("optimizer", states)["state"].items():
        tracker.own(tensors_in(state), "optimizer", lambda _, i=i: times(learner.learning[i]))


@contextmanager
def gradients_owned(tracker: Tracker, parameters: Sequence[nn.Parameter], times: Times) -> Iterator[None]:
    def arrived(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        tracker.own([parameter.grad], "gradients", lambda _: times(parameter))

    hooks = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in parameters]
    yield
    for hook in hooks:
        hook.remove()


def give_gradients(
    parameters: Sequence[nn.Parameter], tracker: Tracker, times: Times, stand_ins: FakeTensorMode
) -> None:
    """As a backward pass would have left them."""
    for parameter in parameters:
        with stand_ins:
            parameter.grad = torch.empty_like(parameter)
        tracker.own([parameter.grad], "gradients", lambda _, parameter=parameter: times(parameter))


@contextmanager
def host_apart(tracker: Tracker) -> Iterator[None]:
    """What goes to the machine's own memory is not on the device, though here both are one."""
    to_host, to_device = blocks.to_host, blocks.to_device

    def gone(tensor: Tensor) -> Tensor:
        copy = to_host(tensor)
        tracker.own([copy], HOST)
        return copy

    def back(tensor: Tensor, device: torch.device) -> Tensor:
        return tensor.clone() if tracker.part_of(tensor) == HOST else to_device(tensor, device)

    blocks.to_host, blocks.to_device = gone, back
    try:
        yield
    finally:
        blocks.to_host, blocks.to_device = to_host, to_device


def one_pass(setup: Setup, net: nn.Module, encoded: Encoded) -> None:
    """A preview's heaviest moments: one denoising pass of one clip, and decoding it."""
    one = first_of(encoded)
    with at_rest(net):
        x0, cond = settle(one, [0], setup.parts.null)
        x0 = setup.denoise(net, x0, torch.ones(1, device=x0.device), cond)
        del cond
        setup.family.decode(setup.parts, x0)


def first_of(encoded: Encoded) -> Encoded:
    def first(value: Tensor | Posterior) -> Any:
        return Posterior(value.mean[:1], value.logvar[:1]) if isinstance(value, Posterior) else value[:1]

    cond = {name: first(value) for name, value in encoded.cond.items()}
    null = {name: value[:1] for name, value in encoded.null.items()}
    return Encoded(first(encoded.x0), cond, {name: keep_B[:1] for name, keep_B in encoded.keep.items()}, null=null)


def renewed(encoded: Encoded, stand_ins: FakeTensorMode) -> Encoded:
    """The same, its tensors without values made anew, since each loading has its own kind of them."""

    def new(value: Any) -> Any:
        if isinstance(value, Posterior):
            return Posterior(new(value.mean), new(value.logvar))
        if not isinstance(value, FakeTensor):
            return value
        with stand_ins:
            return torch.empty(value.shape, dtype=value.dtype)

    def all_new(values: dict[str, Any]) -> dict[str, Any]:
        return {name: new(value) for name, value in values.items()}

    keep, null = all_new(encoded.keep), all_new(encoded.null)
    return Encoded(new(encoded.x0), all_new(encoded.cond), keep, new(encoded.loss_mask), null)


def tensors_of(encoded: Encoded) -> list[Tensor]:
    values = [encoded.x0, *encoded.cond.values()]
    return [
        one for value in values for one in ((value.mean, value.logvar) if isinstance(value, Posterior) else (value,))
    ]


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def weights_of(net: nn.Module) -> list[Tensor]:
    """Each once, though it may have several names."""
    return [*net.parameters(), *net.buffers()]


def size_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
