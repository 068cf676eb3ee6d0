"""Every random choice is a pure function of (seed, what, where).  (no torch)

`what` names the choice ("permutation", "size", "noise"), `where` says where we are (epoch, step, sample).
Nothing here keeps state, so a resumed run, another number of workers or another number of ranks
draws the same numbers.
"""

import hashlib
import random

import numpy as np


def seed_of(seed: int, what: str, *where: int | str) -> int:
    """A 63-bit seed, the same on every machine and Python (Python's own `hash` is not)."""
    key = "/".join([str(seed), what, *map(str, where)]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def dice(seed: int, what: str, *where: int | str) -> random.Random:
    """A private generator for one choice."""
    return random.Random(seed_of(seed, what, *where))


def permutation(n: int, seed: int, what: str, *where: int | str) -> np.ndarray:
    """int64[n]. RandomState, because NumPy freezes its streams for ever and those of Generator not."""
    return np.random.RandomState(seed_of(seed, what, *where) % 2**32).permutation(n)


def uniform(n: int, seed: int, what: str, *where: int | str) -> np.ndarray:
    """float64[n] in [0, 1), of the same frozen stream."""
    return np.random.RandomState(seed_of(seed, what, *where) % 2**32).random_sample(n)
