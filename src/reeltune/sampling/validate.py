"""Is it learning? The held-out loss and previews, made by the very functions that train.

Neither touches a global generator, a gradient or the network's modes, so that training goes on as if they had not
been. Both run on the main process alone; the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError
from reeltune.core.reading import NUMBER, TEXT, require_fields
from reeltune.core.types import Batch, Draw
from reeltune.data.held_out import fixed_draw
from reeltune.data.loader import Reader
from reeltune.data.shapes import SizeRules
from reeltune.diffusion.loss import error_at, gaussian, mean_square, settle
from reeltune.sampling.obedience import Obedience, obedience_of
from reeltune.sampling.other_expert import BothExperts, Half
from reeltune.sampling.paired import REMEDY, band95, forget_starts, keep_start, kept_start
from reeltune.sampling.prompts import (
    NOTHING_DRAWN,
    DrawnControls,
    Request,
    notice_cut,
    played,
    read_one,
    requests_of,
)
from reeltune.sampling.sample import Setup, at_rest, make_clip, write_pixels


@dataclass
class HeldOut:
    """The loss of clips that are never trained on, always at the same noise levels with the same noise.

    Every number is paired with that of the starting weights, kept in validation/start.json, because clips and levels
    differ far more from each other than a training run changes them.
    """

    setup: Setup
    draws: list[Draw]
    names: list[str]  # a name for each draw, to know the start's clips by
    read: Callable[[Draw], Batch]
    held_out_levels: int
    output_dir: Path
    contents: list[int] = field(default_factory=list)  # of their files: one of the same name may be another clip
    controls: list[int] = field(default_factory=list)  # the same of their controls

    @classmethod
    def build(
        cls, setup: Setup, reader: Reader, rules: SizeRules, *, held_out_levels: int, output_dir: str | Path
    ) -> HeldOut:
        """The held-out loss of a setup. reader: of the held-out records, one at least, dropping nothing."""
        draws = [fixed_draw(record, row, rules) for row, record in enumerate(reader.records)]
        names = [Path(record.path).name for record in reader.records]
        files = [record.content for record in reader.records], [record.control_content for record in reader.records]
        return cls(setup, draws, names, partial(read_one, reader), held_out_levels, Path(output_dir), *files)

    @property
    def levels(self) -> list[float]:
        """The middles of equal shares of the schedule, noisiest first; of each of two experts, of its own range."""
        count = self.held_out_levels
        objectives = [half.objective for half in self._halves.values()] or [self.setup.objective]
        return [objective.quantile((i + 0.5) / count) for objective in objectives for i in range(count)]

    @property
    def _halves(self) -> Mapping[str, Half]:
        """Where both of two experts learn."""
        other = self.setup.other
        return other.halves if isinstance(other, BothExperts) else {}

    def _by_expert(self, losses: np.ndarray) -> dict[str, np.ndarray]:
        """Its columns, of each of two that learn."""
        return dict(zip(self._halves, np.split(losses, len(self._halves), axis=1), strict=True)) if self._halves else {}

    def _mean(self, losses: np.ndarray) -> np.ndarray:
        """Per clip, over the levels; of two experts as over one schedule, by the share of each."""
        if not self._halves:
            return losses.mean(1)
        parts = [self._halves[name].share * own.mean(1) for name, own in self._by_expert(losses).items()]
        return np.sum(parts, axis=0)

    def measure(self, net: nn.Module, step: int, *, write: bool = True) -> dict[str, Any] | None:
        """One row for metrics.jsonl. The first measurement of a run, or one at step 0, is the start.

        Without `write` nothing is kept and None returned: the work alone, in step with a process that writes.
        """
        losses = self.losses(net)
        if not write:
            return None
        start_step, start = self._start(step, losses)
        bands = zip(self.levels, losses.mean(0).tolist(), start.mean(0).tolist(), strict=True)
        before = self._by_expert(start)
        experts = {name: _change(own.mean(1), before[name].mean(1)) for name, own in self._by_expert(losses).items()}
        return {
            "kind": "validation",
            "step": step,
            "start_step": start_step,
            **_change(self._mean(losses), self._mean(start)),
            "per_band": [{"level": level, "loss": loss, "loss_start": before} for level, loss, before in bands],
            "per_clip": self._mean(losses).tolist(),  # in the order of start.json: two runs are paired by it
            "n": len(losses),
            **({"experts": [{"expert": name, **told} for name, told in experts.items()]} if experts else {}),
        }

    def losses(self, net: nn.Module) -> np.ndarray:
        """float64[clips, levels]: mean square errors, unweighted, so that runs of all settings compare."""
        if not self._halves:
            return self._losses(net, self.levels)
        own = np.split(np.array(self.levels), len(self._halves))
        columns = []
        for half, levels in zip(self._halves.values(), own, strict=True):
            half.come()
            columns.append(self._losses(half.net, levels.tolist()))
        return np.concatenate(columns, axis=1)

    def _losses(self, net: nn.Module, levels: Sequence[float]) -> np.ndarray:
        setup, rows = self.setup, []
        with at_rest(net):
            for draw in self.draws:
                encoded = setup.encode(self.read(draw))
                x0, cond = settle(encoded, [draw.seed], setup.parts.null)
                for band, level in enumerate(levels):
                    noise = gaussian(x0, [draw.seed], "noise", str(band))
                    level_B = torch.full((1,), level, device=x0.device)
                    error = error_at(setup.denoise, net, setup.objective, x0, cond, noise, level_B)
                    rows.append(mean_square(error, encoded.loss_mask))
        return torch.cat(rows).double().cpu().numpy().reshape(len(self.draws), -1)

    def _start(self, step: int, losses: np.ndarray) -> tuple[int, np.ndarray]:
        """(step, losses) of the weights to compare with. Raises UserError as `kept`."""
        kept = None if step == 0 else self.kept()
        if kept is None:
            sizes = {"sizes": [list(draw.shape) for draw in self.draws]}  # which no resumed run changes
            keep_start(self._path, {"step": step, **self._measured_on, **sizes, "losses": losses.tolist()})
            return step, losses
        return kept["step"], np.array(kept["losses"], dtype=np.float64)

    def kept(self) -> dict[str, Any] | None:
        """What was measured of the weights that the run began with; None if nothing was. Raises UserError if that is of
        other clips or levels."""
        kept = kept_start(self._path, {"clips": TEXT.many(), "levels": NUMBER.many()})
        if kept is None:
            return None
        kept.setdefault("contents", self.contents)  # which runs begun before 2026-11-26 have not
        kept.setdefault("controls", self.controls)  # before 2026-11-27
        changed = [name for name, value in self._measured_on.items() if kept.get(name) != value]
        if changed:
            raise UserError(
                str(self._path),
                f"the run started with other held-out {' and '.join(changed)} than now; restore validation_data_meta, "
                "held_out_share and held_out_levels, or delete this file to compare with the weights of now",
            )
        require_fields(kept, {"losses": NUMBER.many(len(self.levels)).many(len(self.names))}, self._path, REMEDY)
        return kept

    @property
    def _path(self) -> Path:
        return self.output_dir / "validation" / "start.json"

    @property
    def _measured_on(self) -> dict[str, Any]:
        return {"clips": self.names, "levels": self.levels, "contents": self.contents, "controls": self.controls}


def _change(losses_N: np.ndarray, start_N: np.ndarray) -> dict[str, Any]:
    """The change of the loss over clips, because levels of one clip are not independent."""
    differences = losses_N - start_N
    return {
        "loss": float(losses_N.mean()),
        "loss_start": float(start_N.mean()),
        "difference": float(differences.mean()),
        "band95": band95(differences),
    }


@dataclass
class Previews:
    """Clips made on the way, beside the control clip they follow and, if held out, the clip itself."""

    setup: Setup
    requests: list[Request]
    preview_steps: int
    guidance_scale: float
    negative_prompt: str = ""
    obedience: Obedience | None = None

    def make(
        self, net: nn.Module, step: int, output_dir: str | Path, *, write: bool = True
    ) -> list[dict[str, float] | None]:
        """previews/step-N/i.mp4 with its prompt, seed and settings in i.json; previews/control and previews/truth.

        Returns how far each obeys, empty where that is not measured; without `write` neither is anything.
        """
        folder, obeyed = Path(output_dir) / "previews", []
        for i, request in enumerate(self.requests):
            batch = request.batch()
            made_BFCHW = make_clip(
                self.setup,
                net,
                request,
                batch,
                folder / f"step-{step}" / f"{i}.mp4",
                steps=self.preview_steps,
                guidance_scale=self.guidance_scale,
                negative_prompt=self.negative_prompt,
                write=write,
            )
            if made_BFCHW is None:
                continue
            if batch.control_BFCHW is not None:
                write_pixels(folder / "control" / f"{i}.mp4", batch.control_BFCHW, request.fps)
            if request.entry is not None:
                write_pixels(folder / "truth" / f"{i}.mp4", batch.pixels_BFCHW, request.fps)
            if self.obedience is not None:
                obeyed.append(self.obedience.scores(i, batch, made_BFCHW))
        return obeyed


def held_out_requests(reader: Reader, rules: SizeRules, *, count: int, seed: int) -> list[Request]:
    """The first `count` held-out files, clips before pictures, with all their conditions."""
    records = reader.records
    rows = sorted(range(len(records)), key=lambda row: (records[row].kind == "image", row))[:count]
    requests = []
    for i, row in enumerate(rows):
        record, batch = records[row], partial(read_one, reader, fixed_draw(records[row], row, rules))
        control = {"control": record.control_path, "camera": record.camera_path}
        guide = next((path for name, path in control.items() if name in reader.needs), None)
        requests.append(Request(record.text, batch, seed + i, played(record, rules), guide, record.entry, record))
    return requests


@dataclass(frozen=True)
class Checked:
    """What a validation found: rows for metrics.jsonl, where there are any, and what to say beside them."""

    held_out: dict[str, Any] | None = None
    obedience: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()


@dataclass
class Validation:
    """What a run checks at its start, every validation_steps and at its end."""

    held_out: HeldOut | None
    previews: Previews
    output_dir: Path
    notices: Sequence[str] = ()

    @classmethod
    def build(
        cls, recipe: Recipe, setup: Setup, reader: Reader, rules: SizeRules, controls: DrawnControls = NOTHING_DRAWN
    ) -> Validation:
        """What a run measures and shows beside training. reader: of the held-out records, perhaps none. controls: of
        prompts, where they were drawn. Raises UserError for unusable validation_paths."""
        validation, output_dir, seed = recipe.validation, Path(recipe.output.output_dir), recipe.training.seed
        held_out = None
        if len(reader.records):
            levels = validation.held_out_levels
            held_out = HeldOut.build(setup, reader, rules, held_out_levels=levels, output_dir=output_dir)
        if validation.validation_prompts:
            requests = requests_of(recipe, setup.family, setup.mode, rules, controls.drawn)
        else:
            requests = held_out_requests(reader, rules, count=validation.preview_count, seed=seed)
        notice_cut(setup.family, [("negative_prompt", validation.negative_prompt)])
        guidance = validation.guidance_scale, validation.negative_prompt
        previews = Previews(setup, requests, validation.preview_steps, *guidance)
        previews.obedience, notices = obedience_of(validation, setup, requests, output_dir, controls.detector)
        return cls(held_out, previews, output_dir, notices)

    def has_start(self, *, is_own: bool) -> bool:
        """Whether what the weights are compared with was measured. Where the folder is not the run's own, what was is
        another's, and deleted. Raises UserError as HeldOut.kept."""
        if not is_own:
            forget_starts(self.output_dir)
        held_out, obedience = self.held_out, self.previews.obedience
        return (held_out is None or held_out.kept() is not None) and (obedience is None or obedience.kept() is not None)

    def run(self, net: nn.Module, step: int, *, write: bool = True) -> Checked:
        """Makes the previews, measures them and the held-out clips.

        `net` is the unwrapped network. The main process calls this; where the network answers only to all processes
        at once all do, the others without `write`.
        """
        held_out = None if self.held_out is None else self.held_out.measure(net, step, write=write)
        obeyed, obedience = self.previews.make(net, step, self.output_dir, write=write), self.previews.obedience
        if obedience is None or not write:
            return Checked(held_out)
        row = obedience.row(step, obeyed)
        return Checked(held_out, row, () if row is not None else (obedience.judge.unmeasured,))
