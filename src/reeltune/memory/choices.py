"""Which memory levers a run has pulled, could pull, and could do without.  (no torch)"""

from __future__ import annotations

from collections.abc import Iterator

from reeltune.memory import levers
from reeltune.memory.lever import Exclusion, Lever, Settings, Values, several


def excluded(values: Values) -> Iterator[tuple[Lever, Exclusion]]:
    """The levers pulled with what they do not go with."""
    for lever in levers.LEVERS:
        if lever.pulled(values):
            yield from ((lever, exclusion) for exclusion in lever.excludes if exclusion.applies(values))


def pulled_alone(values: Values) -> list[str]:
    """Settings in use that several processes cannot have."""
    return [lever.setting for lever in levers.LEVERS if lever.alone and lever.pulled(values)]


def offered(values: Values) -> Iterator[tuple[Lever, Settings]]:
    """The levers not pulled yet that such a run can pull, and what to write for that, the cheapest first. Nothing is
    written that goes with no lever already pulled."""
    for lever in levers.LEVERS:
        idle = lever.pulled(values) or any(values[name] for name in lever.unless)
        fits = all(exclusion.permits(values[exclusion.setting]) for exclusion in lever.excludes)
        if fits and not idle and not (lever.alone and several(values)):
            for settings in lever.options(values):
                if "engine" in settings:
                    settings |= given_up(values, settings["engine"])
                if not any(excluded({**values, **settings})):
                    yield lever, settings


def given_up(values: Values, engine: str) -> Settings:
    """What does not go with several processes under that engine, turned off, the dearest first."""
    sharded = {**values, "engine": engine}
    barred = {lever.setting for lever, exclusion in excluded(sharded) if exclusion.setting == "engine"}
    barred |= set(pulled_alone(sharded))
    return {lever.setting: lever.off for lever in reversed(levers.LEVERS) if lever.setting in barred}


def faster(values: Values) -> Iterator[tuple[Lever, list[Settings]]]:
    """The levers pulled at a price in time alone, the dearest first, with what to write in place of each where the
    device has room to spare, the fastest first."""
    for lever in reversed(levers.LEVERS):
        if lever.pulled(values) and not any(values[name] for name in lever.unless):
            possible = [{lever.setting: value} for value in lever.faster]
            allowed = [settings for settings in possible if not any(excluded({**values, **settings}))]
            if allowed:
                yield lever, allowed
