"""Does it fit, by how much, what would make it fit at the least price, and what to spend room on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any

from reeltune.config.parse import flat
from reeltune.config.recipe import Recipe
from reeltune.config.rules import written
from reeltune.estimate.result import StepEstimate
from reeltune.memory import choices
from reeltune.memory.lever import ALL, Values
from reeltune.training.prefetch import encodes_ahead

MARGIN = 0.05  # within which the count may be off; what has less room than this is not called safe
MOST_OFFERS = 3  # sets of changes named
TRIES = 8  # sets of several changes that are estimated for one of them
PCIE_BYTES_PER_S = 25e9  # of a x16 PCIe 4 link in practice; 31.5e9 by its standard


@dataclass(frozen=True)
class Verdict:
    totals: dict[str, int]  # phase -> bytes at its fullest moment
    have_bytes: int

    @property
    def phase(self) -> str:
        """The fullest."""
        return max(self.totals, key=lambda phase: self.totals[phase])

    @property
    def need_bytes(self) -> int:
        return max(self.totals.values())

    @property
    def fits(self) -> bool:
        return self.need_bytes <= self.have_bytes

    @property
    def safe(self) -> bool:
        return self.need_bytes * (1 + MARGIN) <= self.have_bytes

    @property
    def spare_bytes(self) -> int:
        return self.have_bytes - self.need_bytes


def judge(peaks: dict[str, dict[str, int]], have_bytes: int) -> Verdict:
    return Verdict({phase: sum(parts.values()) for phase, parts in peaks.items()}, have_bytes)


@dataclass(frozen=True)
class Change:
    """A lever pulled, by what is written for it."""

    settings: dict[str, Any]  # fields of the recipe, or "gpus"
    price: str  # with what `numbers` fills in
    phases: frozenset[str] = ALL  # in which it spares memory

    @property
    def words(self) -> str:
        return written(self.settings)


def values_of(recipe: Recipe, engine: str, gpus: int, *, blocks: int, still_blocks: int, tiles: bool) -> Values:
    """A run's values, for the table of levers.

    engine: a name of sharding.ENGINES. blocks, still_blocks: as of StepEstimate. tiles: the VAE has them.
    """
    ahead = encodes_ahead(recipe, on_gpu=True)
    network = {"blocks": blocks, "frozen_blocks": still_blocks, "vae_tiles": tiles}
    return {**flat(recipe), "engine": engine, "gpus": gpus, "encodes_ahead": ahead, **network}


def changes(values: Values) -> Iterator[Change]:
    """All that would spare memory, one by one, the cheapest first."""
    for lever, settings in choices.offered(values):
        yield Change(settings, lever.plan_price or lever.price, lever.where(values))


def speedups(values: Values) -> Iterator[list[Change]]:
    """For each lever that is pulled at a price in time alone, the dearest first, what to write in its place, the
    fastest first."""
    for lever, faster in choices.faster(values):
        yield [Change(settings, lever.plan_price or lever.price) for settings in faster]


def numbers(before: StepEstimate, after: StepEstimate, settings: dict[str, Any]) -> dict[str, Any]:
    """What a price may name: from the step as it is, the step with the change, and what was written for it."""
    visits = 2 * sum(size for name, size in before.weight_bytes.items() if name != "network")
    offloaded, swapped = 2 * after.offloaded_bytes, 2 * after.swapped_bytes  # there and back; in both passes
    return {
        **settings,
        "more_flops": sum(after.passes.values()) / max(sum(before.passes.values()), 1) - 1,
        "visits_gib": visits / 2**30,
        "visits_s": visits / PCIE_BYTES_PER_S,
        "offloaded_gb": offloaded / 1e9,
        "offloaded_s": offloaded / PCIE_BYTES_PER_S,
        "swapped_gb": swapped / 1e9,
        "swapped_s": swapped / PCIE_BYTES_PER_S,
    }


@dataclass(frozen=True)
class Offer:
    """Changes that together make it fit, or use what is to spare."""

    changes: tuple[Change, ...]
    verdict: Verdict
    prices: tuple[str, ...]


Chosen = frozenset[int]  # places in the list of candidates
NONE: Chosen = frozenset()


def search(
    candidates: list[Change],
    goes: Callable[[tuple[Change, ...]], bool],
    try_out: Callable[[tuple[Change, ...]], tuple[Verdict, StepEstimate]],
    before: tuple[Verdict, StepEstimate],
) -> list[Offer]:
    """Up to MOST_OFFERS sets of changes that make it fit with room to spare; none, if it has that.

    candidates: the cheapest first. Each set does without the cheapest change of those before it, and without what
    includes that. Last come more devices: the fewest that are enough by themselves, else the most, with changes beside.
    """
    if before[0].safe:
        return []
    tries = Tries(candidates, goes, try_out, {NONE: before})
    machines = frozenset(i for i, change in enumerate(candidates) if "gpus" in change.settings)
    offered: list[Chosen] = []
    barred = machines
    while len(offered) < MOST_OFFERS - bool(machines) and (grown := tries.grow(NONE, barred)) is not None:
        offered.append(grown)
        cheapest = candidates[min(grown)].settings.items()
        barred |= {i for i, change in enumerate(candidates) if cheapest <= change.settings.items()}
    if machines:
        enough = next((frozenset({i}) for i in sorted(machines) if tries.verdict(frozenset({i})).safe), None)
        grown = enough or tries.grow(frozenset({max(machines)}), machines)
        offered += [] if grown is None else [grown]
    return [tries.offer(chosen) for chosen in offered]


def spend(
    speedups: Iterable[list[Change]],
    goes: Callable[[tuple[Change, ...]], bool],
    try_out: Callable[[tuple[Change, ...]], tuple[Verdict, StepEstimate]],
    before: tuple[Verdict, StepEstimate],
) -> Offer | None:
    """Takes from each lever the first change with which, beside those taken before, the run still fits with room to
    spare; their prices are what the lever costs as it is. None: there is none, or no room."""
    verdict, step = before
    chosen, prices = tuple[Change, ...](), tuple[str, ...]()
    if not verdict.safe:
        return None
    for ways in speedups:
        for change in ways:
            larger = (*chosen, change)
            if goes(larger) and (tried := try_out(larger))[0].safe:
                costs = numbers(tried[1], step, change.settings)
                named = [costs[name] for _, name, _, _ in Formatter().parse(change.price) if name]
                if not named or max(named) > 0:  # else it costs nothing beside the others
                    prices += (change.price.format_map(costs),)
                    chosen, (verdict, step) = larger, tried
                break
    return Offer(chosen, verdict, prices) if chosen else None


@dataclass
class Tries:
    candidates: list[Change]
    goes: Callable[[tuple[Change, ...]], bool]
    try_out: Callable[[tuple[Change, ...]], tuple[Verdict, StepEstimate]]
    known: dict[Chosen, tuple[Verdict, StepEstimate]] = field(repr=False)
    """Sets that were estimated; first the run as it is."""

    def picked(self, chosen: Chosen) -> tuple[Change, ...]:
        return tuple(self.candidates[i] for i in sorted(chosen))

    def verdict(self, chosen: Chosen) -> Verdict:
        if chosen not in self.known:
            self.known[chosen] = self.try_out(self.picked(chosen))
        return self.known[chosen][0]

    def offer(self, chosen: Chosen) -> Offer:
        (_, before), (verdict, after) = self.known[NONE], self.known[chosen]
        picked = self.picked(chosen)
        prices = (change.price.format_map(numbers(before, after, change.settings)) for change in picked)
        return Offer(picked, verdict, tuple(prices))

    def expected(self, chosen: Chosen) -> Verdict:
        """The verdict if each change spares what it does alone, beside the largest part of the set that was
        estimated."""
        part = max((part for part in self.known if part <= chosen), key=len)
        before, totals = self.known[NONE][0].totals, self.known[part][0].totals
        for i in chosen - part:
            alone = self.verdict(frozenset({i})).totals
            totals = {phase: size - before.get(phase, 0) + alone.get(phase, 0) for phase, size in totals.items()}
        return replace(self.known[part][0], totals=totals)

    def grow(self, start: Chosen, barred: Set[int]) -> Chosen | None:
        """The start, and changes that make it fit: the cheapest that lowers the fullest phase is added, in place of
        those with which it does not go, until it fits; then what is not needed is left out. None: they do not."""
        chosen, useless, left = start, set[int](), TRIES
        while left:
            now = self.expected(chosen)
            if now.safe:
                chosen, left = self.needed(chosen, start), left - 1
                if self.verdict(chosen).safe:
                    return chosen
                continue
            wanting = (i for i in range(len(self.candidates)) if i not in barred | useless | chosen)
            added = next((i for i in wanting if now.phase in self.candidates[i].phases), None)
            if added is None:
                return None
            larger = frozenset({added, *(i for i in chosen if self.together(i, added))})
            goes = start <= larger and self.goes(self.picked(larger))
            if goes and self.expected(larger).need_bytes < now.need_bytes:
                chosen = larger
            else:
                useless.add(added)
        return None

    def needed(self, chosen: Chosen, start: Chosen) -> Chosen:
        """The set without what it can do without, the dearest first."""
        for i in sorted(chosen - start, reverse=True):
            if self.expected(chosen - {i}).safe:
                chosen -= {i}
        return chosen

    def together(self, one: int, other: int) -> bool:
        a, b = self.candidates[one].settings, self.candidates[other].settings
        return all(a[name] == b[name] for name in a.keys() & b.keys()) and self.goes(
            self.picked(frozenset({one, other}))
        )
