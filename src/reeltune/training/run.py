"""A run: all that the loop works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reeltune.config.recipe import Recipe
from reeltune.core.types import Progress
from reeltune.data.loader import Reader
from reeltune.distributed.engine import Engine
from reeltune.distributed.watchdog import Watchdog
from reeltune.reporting.ledger import Ledger
from reeltune.reporting.log import Log
from reeltune.sampling.sample import Setup
from reeltune.sampling.validate import Validation
from reeltune.training.meter import Meter
from reeltune.training.parallelism import BatchSplit
from reeltune.training.prefetch import Prefetcher
from reeltune.training.turns import Turns


@dataclass(frozen=True)
class Run:
    """A run as `loop.start` makes it in each process; only `progress` and what has a state of its own change."""

    recipe: Recipe
    engine: Engine
    watchdog: Watchdog
    setup: Setup
    turns: Turns
    validation: Validation
    compares: bool  # whether the weights that validations compare with were measured, or are those of step 0
    prefetcher: Prefetcher  # of all the batches that are left
    reader: Reader  # of any of them
    pixel_reader: Reader | None  # of the first batch's pictures, where batches come from a cache, without them
    split: BatchSplit
    ledger: Ledger
    log: Log
    meter: Meter
    progress: Progress
    total_steps: int
    resumed_from: Path | None  # a checkpoint's folder
    facts: dict[str, Any]  # for run.json
    notices: list[str]

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.output.output_dir)

    @property
    def passes(self) -> int:
        """Forward and backward passes of this process in a step."""
        return self.recipe.training.gradient_accumulation_steps * self.split.passes
