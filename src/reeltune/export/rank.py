"""`reeltune rank`: which rank an adapter needs to do what a full fine-tune did, measured by the held-out loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from reeltune.adapters import saved
from reeltune.adapters.adapter import Adapter
from reeltune.adapters.apply import applied
from reeltune.adapters.factors import Factors, factors
from reeltune.checkpoint import folder as checkpoints
from reeltune.config import recipe as recipes
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError, refuse
from reeltune.core.files import whole_folder
from reeltune.core.reading import few
from reeltune.distributed.engine import Engine
from reeltune.export.main import taken
from reeltune.families.spec import Family, learning
from reeltune.run.base import Base, base_of
from reeltune.run.data import Inputs, gather
from reeltune.run.experts import of_expert
from reeltune.run.model import choose_family, chosen_objective, encode_options
from reeltune.sampling.paired import band95
from reeltune.sampling.sample import Setup
from reeltune.sampling.trained import load_trained
from reeltune.sampling.validate import HeldOut


@dataclass(frozen=True)
class Extracted:
    """A full fine-tune, taken apart."""

    layers: dict[str, Factors]  # released name of a linear layer -> its change
    others: dict[str, float]  # other parameters that changed -> the square of the change, which no adapter holds

    def adapter(self, rank: int) -> Adapter:
        return Adapter({name: factors.low_rank(rank) for name, factors in self.layers.items()})

    @property
    def full_rank(self) -> int:
        """The least rank at which an adapter holds all that linear layers learnt."""
        return max(min(len(one.U_OR), len(one.V_IR)) for one in self.layers.values())

    def share(self, rank: int) -> float:
        """The share of the square of all that was trained that the adapter of that rank holds."""
        total = sum(one.square for one in self.layers.values()) + sum(self.others.values())
        return sum(one.square_at(rank) for one in self.layers.values()) / total


@dataclass(frozen=True)
class Measured:
    rank: int
    share: float
    size_bytes: int  # of its file in bf16
    loss: float
    difference: float  # of the held-out loss from the full fine-tune's
    band95: list[float] | None

    @property
    def is_as_good(self) -> bool:
        """Whether the full fine-tune is not measurably better."""
        return self.band95 is not None and self.band95[0] <= 0


def measure_ranks(recipe: Recipe, checkpoint: Path, ranks: Sequence[int], out: Path | None = None) -> Iterator[str]:
    """Yields a line for each rank, and which is the smallest as good as the whole fine-tune; its adapter goes to `out`.

    recipe: the run's, which names the base, the held-out clips and the levels of noise. Where both of two experts
    learnt, each is measured at its own levels, and its adapter goes to a folder of its name in `out`. Raises UserError
    for a checkpoint of adapters, a run without held-out clips, and for `out` that is there already.
    """
    refuse("rank", list(_problems(checkpoint, ranks, out)))
    family, mode, _ = choose_family(recipe)
    inputs = gather(recipe, family, mode)
    if not inputs.held_out_reader.records:
        raise UserError(
            "rank", "no clips are held out, so there is nothing to measure with; give --validation_data_meta FILE"
        )
    for one in learning(family):
        own = of_expert(recipe, one.expert)
        if family.expert == one.expert:
            yield from _of_network(own, one, mode, inputs, checkpoint, ranks, out)
            continue
        place = None if out is None else checkpoints.part_in(out, one.expert)
        for line in _of_network(own, one, mode, inputs, checkpoint, ranks, place):
            yield f"expert {one.expert}: {line}"


def _of_network(
    recipe: Recipe, family: Family, mode: str, inputs: Inputs, checkpoint: Path, ranks: Sequence[int], out: Path | None
) -> Iterator[str]:
    """What `measure_ranks` says of one network that learnt, by its recipe and family."""
    training = recipe.training
    engine = Engine(training.mixed_precision, allow_tf32=training.allow_tf32, deterministic=training.deterministic)
    tuned = replace(
        recipe,
        model=replace(recipe.model, transformer_path=None),
        adapter=recipes.Adapter(),
        output=replace(recipe.output, resume_from_checkpoint=str(checkpoint)),
    )
    trained = load_trained(tuned, family, engine.device)
    objective = chosen_objective(family, recipe.loss)
    setup = Setup(family, mode, trained.parts, objective, engine.autocast, encode_options(recipe))
    levels, net = recipe.validation.held_out_levels, trained.parts.net
    held_out = HeldOut.build(
        setup, inputs.held_out_reader, inputs.rules, held_out_levels=levels, output_dir=checkpoint.parent
    )
    full = held_out.losses(net)
    extracted = take_apart(net, trained.names, base_of(recipe.model), max(ranks))
    before = held_out.losses(net)
    yield from _beginning(before, full, extracted)
    rows = []
    most = extracted.full_rank
    if max(ranks) > most:
        yield f"no linear layer that changed has a rank over {most}, which is measured in place of {max(ranks)}"
    for rank in sorted({min(rank, most) for rank in ranks}):
        adapter = extracted.adapter(rank)
        with applied(net, trained.names, [(adapter, 1.0)]):
            rows.append(_measured(rank, adapter, extracted.share(rank), held_out.losses(net), full))
        yield _line(rows[-1], before, full)
    chosen = next((row for row in rows if row.is_as_good), None)
    if chosen is None:
        all_of_it = "no rank does more: what is lacking lies outside linear layers, which adapters learn by train_whole"
        more = f"try more than {max(ranks)}" if max(ranks) < most else all_of_it
        yield f"none of these ranks is as good as the whole fine-tune; {more}"
    else:
        yield f"rank {chosen.rank} is the smallest that is as good as the whole fine-tune, by these clips"
    if out is not None:
        rank = rows[-1].rank if chosen is None else chosen.rank
        with whole_folder(out) as beside:
            saved.save(beside, extracted.adapter(rank), _about(recipe.model, family, checkpoint))
        yield f"{out / saved.FILE}: rank {rank}; for a tool: `reeltune export {out} FILE --adapter --for TOOL`"


def _about(model: recipes.Model, family: Family, checkpoint: Path) -> dict[str, str | None]:
    """What the adapter's file says of itself."""
    told = {
        "family": family.name,
        "base_model": model.pretrained_model_name_or_path,
        "transformer_path": model.transformer_path,
        "extracted_from": str(checkpoint),
    }
    return told if family.expert is None else {**told, "expert": family.expert}


@torch.no_grad()
def take_apart(net: nn.Module, names: dict[str, str], base: Base, most_rank: int) -> Extracted:
    """Puts the base's weights back into a fine-tuned network, one at a time, and keeps what was changed as factors."""
    linear = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    layers, others = {}, {}
    for name, weight in net.named_parameters():
        before = base[names[name]].to(weight.device)
        change = weight.float() - before.float()
        if change.any():
            if name in linear:
                layers[names[name].removesuffix(".weight")] = factors(change, most_rank, names[name])
            else:
                others[names[name]] = float(change.double().square().sum())
        weight.copy_(before)
    if not layers:
        raise UserError("rank", "no linear layer differs from the base's; is it the checkpoint that was trained?")
    return Extracted(layers, others)


def _problems(checkpoint: Path, ranks: Sequence[int], out: Path | None) -> Iterator[str]:
    if not (checkpoint / "progress.json").is_file():
        yield f"{checkpoint} is no complete checkpoint-N folder of a run"
    elif checkpoints.is_adapter(checkpoint):
        yield f"{checkpoint} keeps an adapter already; give a checkpoint of a run that trained the network"
    if not ranks or min(ranks) < 1:
        yield f"ranks are {' '.join(map(str, ranks)) or 'empty'}; give whole numbers from 1, as 4,8,16"
    if out is not None:
        yield from taken(out)


def _measured(rank: int, adapter: Adapter, share: float, losses: np.ndarray, full: np.ndarray) -> Measured:
    differences = (losses - full).mean(1)  # per clip, because levels of one clip are not independent
    numbers = sum(pair.A_RI.numel() + pair.B_OR.numel() for pair in adapter.layers.values())
    return Measured(
        rank,
        share,
        2 * numbers,
        float(losses.mean()),
        float(differences.mean()),
        band95(differences),
    )


def _beginning(before: np.ndarray, full: np.ndarray, extracted: Extracted) -> Iterator[str]:
    change = (full - before).mean(1)
    none = "; it is no better than the base, so that there is no gain to keep" if change.mean() >= 0 else ""
    yield (
        f"held-out loss {before.mean():.4f} of the base, {full.mean():.4f} of the fine-tune "
        f"({change.mean():+.4f}{_band(band95(change))}), {len(full)} clips{none}"
    )
    if extracted.others:
        total = sum(one.square for one in extracted.layers.values()) + sum(extracted.others.values())
        share = sum(extracted.others.values()) / total
        named = ", ".join(few(sorted(extracted.others), 3))
        yield f"{share:.1%} of what was trained is outside linear layers and left out: {named}"


def _line(row: Measured, before: np.ndarray, full: np.ndarray) -> str:
    gained = before.mean() - full.mean()
    kept = f", {(before.mean() - row.loss) / gained:.0%} of its gain" if gained > 0 else ""
    apart = f"{row.difference:+.4f} from the fine-tune{_band(row.band95)}"
    size = f"{row.size_bytes / 1e6:,.1f} MB, {row.share:.1%} of the change"
    return f"rank {row.rank}: {size}, held-out loss {row.loss:.4f}, {apart}{kept}"


def _band(band: list[float] | None) -> str:
    return "" if band is None else f" (95 % band {band[0]:+.4f} to {band[1]:+.4f})"
