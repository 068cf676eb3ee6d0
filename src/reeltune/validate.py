"""Is it learning? The held-out loss and previews, made by the very functions that train.

Neither touches a global generator, a gradient or the network's modes, so that training goes on as if they had not
been. Both run on the main process alone; the others wait.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reeltune.diffusion.loss import Cond, error_at, gaussian, mean_square, settle
from reeltune.diffusion.objective import Objective
from reeltune.errors import UserError
from reeltune.families.spec import Family, Parts
from reeltune.types import Batch, Draw, Encoded

Read = Callable[[Draw], Batch]  # a batch of one, on the CPU, nothing dropped


@dataclass(frozen=True)
class Setup:
    """All that a network is trained with, beside its weights."""

    family: Family
    mode: str
    parts: Parts
    objective: Objective
    autocast: Callable[[], AbstractContextManager] = nullcontext
    vae_mini_batch: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def encode(self, batch: Batch) -> Encoded:
        batch = batch.to(self.parts.device)
        settings = {"vae_mini_batch": self.vae_mini_batch, "options": self.options}
        return self.family.encode(self.parts, batch, self.mode, **settings)

    def denoise(self, net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: Cond) -> Tensor:
        with self.autocast():
            return self.family.denoise(net, x_BCThw, timestep_B, cond)


@contextmanager
def at_rest(net: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass
class HeldOut:
    """The loss of clips that are never trained on, always at the same noise levels with the same noise.

    Every number is paired with that of the starting weights, kept in validation/start.json, because clips and levels
    differ far more from each other than a training run changes them.
    """

    setup: Setup
    draws: list[Draw]
    names: list[str]  # a name for each draw, to know the start's clips by
    read: Read
    held_out_levels: int
    output_dir: Path

    @property
    def levels(self) -> list[float]:
        """The middles of equal shares of the schedule, noisiest first."""
        count = self.held_out_levels
        return [self.setup.objective.quantile((i + 0.5) / count) for i in range(count)]

    def measure(self, net: nn.Module, step: int) -> dict[str, Any]:
        """One row for metrics.jsonl. The first measurement of a run, or one at step 0, is the start."""
        losses = self._losses(net)
        start_step, start = self._start(step, losses)
        differences = (losses - start).mean(1)  # per clip, because levels of one clip are not independent
        bands = zip(self.levels, losses.mean(0).tolist(), start.mean(0).tolist(), strict=True)
        return {
            "kind": "validation",
            "step": step,
            "start_step": start_step,
            "loss": float(losses.mean()),
            "loss_start": float(start.mean()),
            "difference": float(differences.mean()),
            "band95": band95(differences),
            "per_band": [{"level": level, "loss": loss, "loss_start": before} for level, loss, before in bands],
            "n": len(losses),
        }

    def _losses(self, net: nn.Module) -> np.ndarray:
        """float64[clips, levels]: mean square errors, unweighted, so that runs of all settings compare."""
        setup, rows = self.setup, []
        with at_rest(net):
            for draw in self.draws:
                encoded = setup.encode(self.read(draw))
                x0, cond = settle(encoded, [draw.seed], setup.parts.null)
                for band, level in enumerate(self.levels):
                    noise = gaussian(x0, [draw.seed], "noise", str(band))
                    level_B = torch.full((1,), level, device=x0.device)
                    error = error_at(setup.denoise, net, setup.objective, x0, cond, noise, level_B)
                    rows.append(mean_square(error, encoded.loss_mask))
        return torch.cat(rows).double().cpu().numpy().reshape(len(self.draws), -1)

    def _start(self, step: int, losses: np.ndarray) -> tuple[int, np.ndarray]:
        """(step, losses) of the weights to compare with. Raises UserError if they are of other clips or levels."""
        path = self.output_dir / "validation" / "start.json"
        told = {"clips": self.names, "levels": self.levels}
        if step == 0 or not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"step": step, **told, "losses": losses.tolist()}, indent=1) + "\n")
            return step, losses
        kept = json.loads(path.read_text())
        changed = [name for name in told if kept[name] != told[name]]
        if changed:
            raise UserError(
                str(path),
                f"the run started with other held-out {' and '.join(changed)} than now; restore validation_data_meta, "
                "held_out_share and held_out_levels, or delete this file to compare with the weights of now",
            )
        return kept["step"], np.array(kept["losses"])


# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (NIST/SEMATECH e-Handbook, 1.3.6.7.2)
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
Z_975 = 1.959964  # and of the normal distribution


def band95(differences: np.ndarray) -> list[float] | None:
    """95 % confidence interval of the mean of independent differences, by Student's t; None for fewer than two."""
    freedom = len(differences) - 1
    if freedom < 1:
        return None
    if freedom <= len(T_975):
        t = T_975[freedom - 1]
    else:  # Abramowitz and Stegun, 26.7.5
        z = Z_975
        t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    mean, half = differences.mean(), t * differences.std(ddof=1) / math.sqrt(len(differences))
    return [float(mean - half), float(mean + half)]
