"""Recipes that read a cache, and what a cache holds."""

import re
from dataclasses import replace

import torch

from reeltune.cache import store

STEPS = 4


def cached(given, folder):
    return replace(given, cache=replace(given.cache, cache_folder=str(folder)))


def contents(folder):
    held = store.Store(folder)
    return {key: held.read(key, split) for key, (_, split) in held.entries.items()}


def assert_same_contents(folder, other, *, part=False):
    ours, theirs = contents(folder), contents(other)
    assert ours.keys() <= theirs.keys() if part else ours.keys() == theirs.keys()
    for key, tensors in ours.items():
        assert tensors.keys() == theirs[key].keys()
        assert all(torch.equal(tensors[name], theirs[key][name]) for name in tensors)


def entries_written(capfd) -> list[int]:
    """Entries written by each `fill` since the last call."""
    return [int(count) for count in re.findall(r": (\d+) entries written", capfd.readouterr().err)]
