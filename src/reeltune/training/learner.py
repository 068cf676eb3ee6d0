"""What learns: the network, its optimizer and its average, stepped, saved and loaded together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reeltune.checkpoint import folder as checkpoint
from reeltune.checkpoint.state import Shared, Whole
from reeltune.config.recipe import Optimization, Recipe
from reeltune.core.errors import UserError
from reeltune.distributed.ddp import piece
from reeltune.distributed.engine import Engine
from reeltune.distributed.sharded_io import Piece
from reeltune.families.spec import Family, Parts
from reeltune.memory.resting import Resting
from reeltune.memory.size import size_bytes
from reeltune.optim.optimizers import (
    MovingAverage,
    StochasticRounding,
    build_optimizer,
    clip_ceiling,
    restore,
    set_rate,
    soften_outliers,
)
from reeltune.optim.step_in_backward import StepInBackward
from reeltune.training.trained_network import TrainedNetwork, prepare_network


class Learner:
    """A network in training, with its optimizer and moving average.

    `net` is the network to call in training, which the engine may have wrapped; `plain` is the same one unwrapped.

    batch: samples that this process takes in a forward and backward pass. accumulate: passes in an optimizer step.
    """

    def __init__(
        self,
        network: TrainedNetwork,
        optimizer: Any,
        engine: Engine,
        optimization: Optimization,
        *,
        step_in_backward: bool,
        batch: int,
        accumulate: int,
    ):
        self.network, self.plain, self.names, self.learning = network, network.plain, network.names, network.learning
        self.engine, self.optimization = engine, optimization
        self.average = MovingAverage(self.plain, optimization.ema_decay) if optimization.use_ema else None
        self.trainer = engine.prepare(
            self.plain, optimizer, batch=batch, accumulate=accumulate, max_norm=self._most_norm
        )
        self.net, self.optimizer = self.trainer.net, self.trainer.optimizer
        self.in_backward = StepInBackward(optimizer, self.learning) if step_in_backward else None
        self.resting = Resting(self._on_device, engine.device)
        self.plain.train()

    def _on_device(self) -> Iterator[tuple[Tensor, bool]]:
        """(tensor, whether a step may change it) of all that is on the device between two steps, without gradients."""
        yield from ((weight, weight.requires_grad) for weight in self.plain.parameters())
        yield from ((buffer, False) for buffer in self.plain.buffers())
        average = {} if self.average is None else self.average.weights
        for leaf in tree_leaves([self.optimizer.state_dict(), average]):
            if isinstance(leaf, Tensor):
                yield leaf, True

    def rest(self) -> None:
        """Moves all of it to the CPU's memory, to make room for another network. Shards stay on the device."""
        if not self.engine.sharded and self.engine.device.type != "cpu":
            self.resting.leave()

    def wake(self) -> None:
        """Moves all of it back to the device."""
        self.resting.come()

    def held_bytes(self) -> dict[str, int]:
        """part -> bytes that this process holds of it now."""
        parts = {
            "weights": list(self.plain.parameters()),
            "gradients": [weight.grad for weight in self.plain.parameters()],
            "optimizer state": self.optimizer.state_dict(),
            "the moving average": {} if self.average is None else self.average.weights,
        }
        return {part: size_bytes(tree) for part, tree in parts.items()}

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """The backward pass of a micro-step. last: whether it is the last one of its optimizer step."""
        if self.in_backward is None:
            self.trainer.backward(loss, last=last)
        else:
            self.in_backward.backward(loss)

    def rehearse(self, loss: Tensor) -> None:
        """A backward pass whose gradients are thrown away."""
        (self.trainer if self.in_backward is None else self.in_backward).rehearse(loss)

    def step(self, step: int, rate: float) -> Tensor:
        """Clips gradients, takes an optimizer step, clears gradients. Returns the norm before clipping, on the device.

        step: how many were taken before. rate: the learning rate.
        """
        optimization = self.optimization
        start = optimization.abnormal_norm_clip_start
        ceiling = clip_ceiling(step, self._most_norm, optimization.initial_grad_norm_ratio, start)
        soften = partial(soften_outliers, max_norm=ceiling) if start is not None and step > start else None
        set_rate(self.optimizer, rate)
        norm = (
            self.trainer.step(self.learning, ceiling, soften)
            if self.in_backward is None
            else self.in_backward.step(ceiling, soften)
        )
        if self.average is not None:
            self.average.update(step)
        return norm

    def rates(self, rate: float) -> dict[str, float]:
        """Columns of a row of metrics.jsonl: "lr", the learning rate; with Prodigy also "d", by which it multiplies lr
        in the next step."""
        d = self.optimizer.param_groups[0].get("d")
        return {"lr": rate} if d is None else {"lr": rate, "d": float(d)}

    @property
    def _most_norm(self) -> float:
        """max_grad_norm; infinity where nothing is clipped."""
        most = self.optimization.max_grad_norm
        return math.inf if most is None else most

    def weights(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint keeps, by our names: not copies, so training goes on changing them."""
        return self.network.weights()

    def write_weights(self, weights: dict[str, Tensor], average: dict[str, Tensor] | None, folder: Path) -> None:
        """Writes transformer/ (or adapter/) and, if there is an average, transformer_ema/, under the released names.

        folder: a checkpoint, or the part of one that is this network's, which has the weights right in it.
        """
        self.network.write(self.network.weights_in(folder), weights)
        if average is not None:
            self.network.write(folder / f"{self.network.folder}_ema", {**weights, **average})

    def pieces(self) -> Iterator[Piece]:
        """Views of what this process keeps of weights, optimizer state and average."""
        yield from self.trainer.pieces(self.network.kept)
        for name, average in ({} if self.average is None else self.average.weights).items():
            yield piece(f"average/{self.names[name]}", average, self.engine.rank, self.engine.world)

    def scalars(self) -> dict[str, dict[str, float]]:
        """Released name of a weight -> the values in its optimizer state that are single numbers, such as the step."""
        return self.trainer.scalars(self.network.kept)

    def write_outline(self, folder: Path, scalars: dict[str, dict[str, float]]) -> None:
        """Writes what the pieces do not hold: config.json, whole shapes, and single numbers of the optimizer state."""
        kept, shapes = self.network.kept, self.network.shapes
        outline = {name: torch.empty(shapes[name], device="meta") for name in kept}
        self.network.write(self.network.weights_in(folder), outline)
        shapes = {released: shapes[name] for name, released in kept.items()}
        Shared.write_outline(folder, shapes, scalars)

    def state(self) -> dict:
        """All that an exact resume needs beside the weights: not copies, so training goes on changing it."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.engine.scaler_state(),
            "average": None if self.average is None else self.average.weights,
        }

    def load_state(self, resumed_from: Path) -> None:
        """Reads optimizer state, loss scale and average from the checkpoint whose weights the network has already.

        Raises UserError for a state that this engine cannot take over.
        """
        is_shared = checkpoint.is_shared(resumed_from)
        if is_shared != self.engine.sharded and self.optimization.use_came:
            ways = {True: "zero2 or zero3 in several processes", False: "ddp or one process"}
            raise UserError(
                "resume",
                f"use_came is true, whose state is another in each; {resumed_from.name} was written by "
                f"{ways[is_shared]}, and cannot be gone on with by {ways[not is_shared]}; start as it was written",
            )
        if is_shared or self.engine.sharded:
            saved = Shared(resumed_from) if is_shared else self._whole(resumed_from)
            self.trainer.make_state(self.names, saved.keys, saved.scalars)
            pieces = list(self.pieces())
            # ZeRO has a state also for what never had a gradient, and there it stays zero. An average that was not kept
            # begins with the weights.
            averaged = any(piece.name in saved for piece in pieces if piece.name.startswith("average/"))
            absent = ("optimizer/",) if averaged else ("optimizer/", "average/")
            saved.fill(piece for piece in pieces if piece.name in saved or not piece.name.startswith(absent))
            return
        state = checkpoint.load(resumed_from)
        restore(self.optimizer, state["optimizer"])
        self.engine.load_scaler_state(state["scaler"])
        if self.average is not None and state["average"] is not None:
            for name, weight in self.average.weights.items():
                weight.copy_(state["average"][name])

    def _whole(self, resumed_from: Path) -> Whole:
        """A checkpoint that one process wrote, to be read by several."""
        names = {id(weight): self.names[name] for name, weight in self.plain.named_parameters()}
        state = checkpoint.load(resumed_from)
        return Whole(resumed_from, state, [names[id(weight)] for weight in self.learning], self.names)


def learner_of(
    recipe: Recipe,
    family: Family,
    parts: Parts,
    engine: Engine,
    *,
    batch: int,
    accumulate: int,
    resumed_from: Path | None = None,
) -> Learner:
    """The Learner of a recipe. If a run is resumed, call `load_state` next: only the weights are read here."""
    network = prepare_network(family, parts, engine, recipe, resumed_from=resumed_from)
    return with_optimizer(network, recipe, engine, batch=batch, accumulate=accumulate)


def with_optimizer(network: TrainedNetwork, recipe: Recipe, engine: Engine, *, batch: int, accumulate: int) -> Learner:
    """A Learner of this network, by the recipe's optimizer. batch, accumulate: as for Learner."""
    rounding_seed = recipe.training.seed if recipe.model.trained_weights == "bf16_stochastic" else None
    return Learner(
        network,
        optimizer_of(network.groups, recipe.optimization, rounding_seed=rounding_seed),
        engine,
        recipe.optimization,
        step_in_backward=recipe.memory.step_in_backward,
        batch=batch,
        accumulate=accumulate,
    )


def optimizer_of(groups: list[dict[str, Any]], optimization: Optimization, *, rounding_seed: int | None) -> Any:
    """The optimizer that the recipe asks for. rounding_seed: for stochastic rounding of bf16 weights; None: fp32."""
    build = partial(
        build_optimizer,
        learning_rate=optimization.learning_rate,
        betas=(optimization.adam_beta1, optimization.adam_beta2),
        epsilon=optimization.adam_epsilon,
        weight_decay=optimization.adam_weight_decay,
        use_8bit_adam=optimization.use_8bit_adam,
        use_came=optimization.use_came,
        use_adafactor=optimization.use_adafactor,
        use_prodigy=optimization.use_prodigy,
        use_muon=optimization.use_muon,
    )
    return build(groups) if rounding_seed is None else StochasticRounding(groups, build, rounding_seed)
