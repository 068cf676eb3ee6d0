"""A network's sizes, from the shapes of an adapter's pairs: what letters of the tables stand for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from reeltune.adapters.adapter import LowRank
from reeltune.adapters.networks import Network


@dataclass(frozen=True)
class Sizes:
    of: dict[str, int]
    problems: list[str]


def solve(network: Network, layers: Mapping[str, LowRank]) -> Sizes:
    """The network's sizes, as most layers have them, with a line in `problems` for each layer that contradicts."""
    facts = list(_facts(network, layers))
    votes: dict[str, Counter[int]] = {}
    for _, expression, size in facts:
        if len(expression) == 1:
            (letter, times), *_ = expression.items()
            if size % times == 0:
                votes.setdefault(letter, Counter())[size // times] += 1
    of = {letter: counts.most_common(1)[0][0] for letter, counts in votes.items()}
    problems = {}
    for name, expression, size in facts:
        if expression.keys() <= of.keys():
            wanted = sum(of[letter] * times for letter, times in expression.items())
            if wanted != size:
                problems[name] = f"{name} has a size of {size} where layers like it have {wanted}"
    return Sizes(of, list(problems.values()))


def _facts(network: Network, layers: Mapping[str, LowRank]) -> Iterator[tuple[str, dict[str, int], int]]:
    for name, pair in layers.items():
        layer = network.layer(name)
        if layer is not None and layer.outputs:
            yield name, terms(layer.outputs), pair.B_OR.shape[0]
            yield name, terms(layer.inputs), pair.A_RI.shape[1]


def terms(expression: str) -> dict[str, int]:
    """ "6D" -> {"D": 6}, "D+F" -> {"D": 1, "F": 1}"""
    return {letter: int(times or 1) for times, letter in re.findall(r"(\d*)([A-Z])", expression)}
