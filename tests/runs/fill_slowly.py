"""A process that fills a cache entry by entry, each a shard of its own, with moments between in which to be killed."""

import os
import time

import torch

from reeltune.cache import fill, store


class Slowly(store.Writer):
    def __init__(self, folder, facts):
        super().__init__(folder, facts, shard_bytes=1)

    def add(self, *entry):
        time.sleep(0.003)
        super().add(*entry)


def run(given, rank, world):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    fill.Writer = Slowly
    raise SystemExit(fill.fill(given))
