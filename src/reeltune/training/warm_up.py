"""Compiles blocks before the first step: for clips of epoch 0, the largest first, alike in a run and its resumes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from reeltune.core.types import Shape
from reeltune.data.plan import Plan
from reeltune.diffusion.loss import Loss
from reeltune.memory.compiled import Compiled
from reeltune.training.dropout import seeded_dropout
from reeltune.training.loss import training_loss
from reeltune.training.run import Run
from reeltune.training.turns import Turn


@dataclass(frozen=True)
class Sizes:
    """The sizes of clips that blocks are compiled with.

    tokens: how many different numbers of tokens the clips of the plan have. first: micro-step -> its shape, for the
    largest shape of each side of the ladder and for the smallest of all; most tokens first.
    """

    tokens: int
    first: dict[int, Shape]

    @classmethod
    def of(cls, plan: Plan) -> Sizes:
        rules, (shapes, which, _) = plan.rules, plan.outline()
        tokens = np.array([rules.geometry.tokens(shape) for shape in shapes])
        sides = np.sqrt([shape.height * shape.width for shape in shapes])
        rungs = np.abs(sides[:, None] - np.array(rules.ladder)).argmin(axis=1)
        drawn, places = np.unique(which, return_index=True)
        largest = {int(rungs[i]): int(i) for i in sorted(drawn.tolist(), key=lambda i: tokens[i])}
        taken = {*largest.values(), min(drawn.tolist(), key=lambda i: tokens[i])}
        alike = {int(tokens[i]): i for i in sorted(taken)}  # by the number of tokens, which is all that blocks see
        place = dict(zip(drawn.tolist(), places.tolist(), strict=True))
        in_order = [i for _, i in sorted(alike.items(), reverse=True)]
        return cls(len(np.unique(tokens)), {place[i]: shapes[i] for i in in_order})


def warm_up(run: Run, compiled: Sequence[Compiled]) -> str:
    """Compiles the blocks of each network that learns, by passes whose gradients are thrown away. Returns the line for
    the log.

    compiled: those blocks, in the order of run.turns.
    """
    engine, begun_s = run.engine, time.monotonic()
    sizes, (first, *others) = Sizes.of(run.reader.plan(0)), compiled
    first.begin(sizes.tokens, " ".join("x".join(map(str, shape)) for shape in sizes.first.values()), *others)
    for micro_step in sizes.first:
        forward = forward_pass(run, micro_step)
        for turn in run.turns.each:
            run.turns.come(turn)
            with engine.same_bits():
                turn.learner.rehearse(forward(turn).value)
    named = ", ".join(f"{F}x{H}x{W}" for F, H, W in sizes.first.values())
    whose = "both networks'" if others else "the network's"
    return (
        f"{whose} blocks are compiled: {first.count} compilation{'s' if first.count > 1 else ''} for "
        f"{sizes.tokens} number{'s' if sizes.tokens > 1 else ''} of tokens, warmed up with {named}, in "
        f"{time.monotonic() - begun_s:.1f} s"
    )


def forward_pass(run: Run, micro_step: int) -> Callable[[Turn], Loss]:
    """A function: network that learns -> its loss over this micro-step of epoch 0, which is read and encoded here."""
    recipe, engine = run.recipe, run.engine
    rank, world = (number * run.split.passes for number in engine.place)
    batch = run.reader[0, micro_step, rank, world]
    encoded = run.setup.encode(batch)

    def forward(turn: Turn) -> Loss:
        with seeded_dropout(recipe.adapter.lora_dropout, engine.device, recipe.training.seed, 0, 0, engine.rank):
            return training_loss(turn.setup, turn.learner.net, encoded, batch.draws, recipe.loss)

    return forward
