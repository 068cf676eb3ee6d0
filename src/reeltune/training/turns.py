"""Which network learns in a step: the only one, or of two experts the one whose turn it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reeltune.checkpoint import folder as checkpoint
from reeltune.config.recipe import Recipe
from reeltune.core.rng import uniform
from reeltune.distributed.engine import Engine
from reeltune.families.spec import Family, Parts, learning
from reeltune.run.experts import of_expert
from reeltune.run.model import chosen_objective, load_parts
from reeltune.sampling.other_expert import BothExperts, Half
from reeltune.sampling.sample import Setup
from reeltune.training.learner import Learner, learner_of
from reeltune.training.rate import rate_of


@dataclass(frozen=True)
class Turn:
    """A network that learns, with what it is trained by."""

    expert: str | None  # None: there is no other
    setup: Setup  # of its own noise levels
    learner: Learner
    rate: Callable[[int], float]  # step of the run -> learning rate

    def row(self, rate: float) -> dict[str, Any]:
        """What this network adds to a step's row of metrics.jsonl. rate: the learning rate of that step."""
        expert = {} if self.expert is None else {"expert": self.expert}
        return {**self.learner.rates(rate), **expert}

    @property
    def summary(self) -> str:
        """What learns, in a line."""
        summary = self.learner.network.summary
        return summary if self.expert is None else f"expert {self.expert}: {summary}"


class Turns:
    """Which network learns in which step: the only one, or of two the first in `share` of the steps.

    The first learns in step n of the run if floor(share * n + offset) grows from n to n + 1, as a line is drawn in
    pixels (Bresenham, https://doi.org/10.1147/sj.41.0025). So of any n steps in a row it has share * n to within one.
    offset: in [0, 1).
    """

    def __init__(self, each: Sequence[Turn], *, share: float = 1.0, offset: float = 0.0):
        self.each, self._share, self._offset = list(each), share, offset
        self.now = self.each[0]  # on the device
        self.come(self.now)

    def at(self, step: int) -> tuple[Turn, int]:
        """(the network that learns in this step, now on the device; in how many steps it has learnt before)."""
        before, after = self._of_first(step), self._of_first(step + 1)
        first = after > before or len(self.each) == 1
        turn = self.each[0 if first else 1]
        self.come(turn)
        return turn, before if first else step - before

    @property
    def counts(self) -> dict[str, int]:
        """Parameters of all networks, and how many of them learn."""
        counts = [turn.learner.network.counts for turn in self.each]
        return {name: sum(one[name] for one in counts) for name in counts[0]}

    @property
    def notices(self) -> list[str]:
        return [notice for turn in self.each for notice in turn.learner.network.notices]

    def come(self, turn: Turn) -> None:
        """Moves this network to the device, once the other has left it."""
        for other in self.each:
            if other is not turn:
                other.learner.rest()
        turn.learner.wake()
        self.now = turn

    def _of_first(self, steps: int) -> int:
        """How many of the run's first `steps` steps the first network learns in."""
        return steps if len(self.each) == 1 else math.floor(self._share * steps + self._offset)


def turns_of(
    recipe: Recipe,
    setup: Setup,
    engine: Engine,
    *,
    batch: int,
    accumulate: int,
    total_steps: int,
    resumed_from: Path | None,
) -> Turns:
    """Every network that learns, as the checkpoint left it.

    setup: the run's, with the first network in its parts. A second one is read here, once the first has left the
    device. batch, accumulate: as for Learner.
    """
    each: list[Turn] = []
    for family in learning(setup.family):
        own, part = of_expert(recipe, family.expert), resumed_from and checkpoint.part(resumed_from, family.expert)
        if each:
            each[-1].learner.rest()
        parts = _beside(own, family, setup.parts, engine, part) if each else setup.parts
        learner = learner_of(own, family, parts, engine, batch=batch, accumulate=accumulate, resumed_from=part)
        if part is not None:
            learner.load_state(part)
        expert = family.expert if setup.family.expert is None else None
        mine = replace(setup, family=family, parts=parts, objective=chosen_objective(family, recipe.loss))
        each.append(Turn(expert, mine, learner, rate_of(own.optimization, total_steps)))
    if len(each) == 1:
        return Turns(each)
    offset = uniform(1, recipe.training.seed, "expert")[0]
    return Turns(each, share=each[0].setup.objective.share, offset=offset)


def _beside(recipe: Recipe, family: Family, parts: Parts, engine: Engine, part: Path | None) -> Parts:
    """The parts for a second network that learns: its weights, beside the same frozen networks."""
    other = load_network(recipe, family, engine, part, encoders=False)
    return replace(parts, net=other.net, config=other.config)


def load_network(recipe: Recipe, family: Family, engine: Engine, part: Path | None, *, encoders: bool) -> Parts:
    """One network that learns, as it is released or as this part of a checkpoint has it; encoders: and those beside
    it."""
    source = None if part is None else checkpoint.transformer_of(part)
    start_on = torch.device("cpu") if engine.sharded else None  # each process moves its share alone
    return load_parts(recipe, family, engine.device, source, encoders=encoders, start_on=start_on)


def looked_at(turns: Turns, setup: Setup) -> Setup:
    """The Setup for previews and held-out losses. Where two networks learn, each answers at its own noise levels."""
    if len(turns.each) == 1:
        return setup
    assert setup.family.boundary is not None
    boundary = setup.objective.timestep(torch.tensor(setup.family.boundary)).item()
    halves = {
        str(turn.expert): Half(
            turn.setup.objective, turn.setup.objective.share, turn.learner.plain, partial(turns.come, turn)
        )
        for turn in turns.each
    }
    return replace(setup, other=BothExperts(boundary, halves))
