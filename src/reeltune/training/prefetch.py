"""Batches with what the encoders make of them; where that pays, the next one while the network trains on the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from reeltune.config.kernel_rules import of_the_process
from reeltune.config.recipe import Recipe
from reeltune.core.types import Batch, Encoded

Placed = tuple[Batch, int, int]  # a batch, its epoch, and the cursor after it


class Prefetcher:
    """Reads and encodes batches. Call `batch`, `encoded` and, before the network runs, `begin_next` in each micro-step.

    ahead: a thread reads and encodes the next batch meanwhile, on a GPU in a stream of its own. Nothing else may use
    the encoders then: call `wait` first. An error in the thread is raised where that batch is asked for. Without
    `ahead`, a batch is read and encoded when it is asked for.
    """

    def __init__(
        self,
        batches: Iterator[Placed],
        encode: Callable[[Batch], Encoded],
        *,
        device: torch.device,
        ahead: bool,
    ):
        self._batches, self._encode = batches, encode
        self._thread = ThreadPoolExecutor(1, "encode") if ahead else None
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None
        self._now: Batch | None = None
        self._next: tuple[Future[Placed | None], Future[Encoded | None]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def batch(self) -> Placed:
        """The next batch. The first is read here: only the main thread may set up signal handlers for workers."""
        placed = next(self._batches) if self._next is None else self._next[0].result()
        assert placed is not None, "asked for more batches than there are"
        self._now = placed[0]
        return placed

    def encoded(self) -> Encoded:
        """What the encoders make of the batch that `batch` returned last."""
        assert self._now is not None
        if self._next is None:
            return self._encode(self._now)
        encoded, self._next = self._next[1].result(), None
        assert encoded is not None
        if self._stream is not None:
            here = torch.cuda.current_stream(self._stream.device)
            here.wait_stream(self._stream)
            for tensor in encoded.tensors().values():
                if tensor.is_cuda:
                    tensor.record_stream(here)  # or its memory would be given away while this stream reads it
        return encoded

    def begin_next(self) -> None:
        """Begins to read and encode the next batch, if that is done ahead."""
        if self._thread is not None:
            placed = self._thread.submit(next, self._batches, None)
            self._next = placed, self._thread.submit(self._encode_next, placed)

    def wait(self) -> None:
        """Returns when nothing is under way."""
        if self._next is not None:
            self._next[1].exception()
            if self._stream is not None:
                self._stream.synchronize()

    def _encode_next(self, next_batch: Future[Placed | None]) -> Encoded | None:
        placed = next_batch.result()
        if placed is None:
            return None
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return self._encode(placed[0])


def encodes_ahead(recipe: Recipe, *, on_gpu: bool) -> bool:
    """Whether to encode while the network trains: as the recipe asks; else on a GPU, unless it is short of memory, or
    the kernels chosen for the network would be used for the encoders too. On a CPU both would share the cores."""
    if recipe.memory.encode_ahead is not None:
        return recipe.memory.encode_ahead
    return on_gpu and not recipe.training.low_vram and not (_encoders_run(recipe) and of_the_process(recipe))


def encodes_beside(recipe: Recipe, *, on_gpu: bool) -> bool:
    """Whether encoders compute while the network trains. With a cache they do not, even if batches are read ahead."""
    return _encoders_run(recipe) and encodes_ahead(recipe, on_gpu=on_gpu)


def _encoders_run(recipe: Recipe) -> bool:
    return recipe.cache.cache_folder is None
