"""`reeltune export --merge`: adapters put into the whole weights of their base, tensor by tensor, and proven."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from reeltune.adapters.adapter import Adapter
from reeltune.adapters.apply import merged, refuse_quantised, touched
from reeltune.checkpoint import folder as checkpoints
from reeltune.config.parse import build
from reeltune.config.recipe import Recipe
from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import few
from reeltune.export.main import in_dtype, of_both, read_back, recipe_of, renamed, taken, written
from reeltune.families.stored import Stored
from reeltune.run.adapters import Given, of_checkpoint, read_all
from reeltune.run.base import Base
from reeltune.run.experts import refuse_adapters

FP32_SLACK = 2**-20  # of the largest weight: 16 roundings of fp32, in whose sums terms of its size may cancel


class Merged(Mapping[str, Tensor]):
    """The base's weights with adapters in them, by released name, each made when asked for; `outline` has them on the
    meta device. What adapters change is in fp32, or as the base has it."""

    def __init__(self, base: Base, adapters: Sequence[Given], *, as_stored: bool):
        self.base, self.adapters = base, [(one.adapter, one.strength) for one in adapters]
        self.touched = {name for adapter, strength in self.adapters if strength for name in touched(adapter)}
        refuse_quantised({name: base.outline[name] for name in self.touched})
        self._as_stored = as_stored
        self.outline = {
            name: meta.float() if name in self.touched and not as_stored else meta
            for name, meta in base.outline.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        weight = self.base[name]
        return merged(name, weight, self.adapters).to(self.outline[name].dtype) if name in self.touched else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.outline)

    def __len__(self) -> int:
        return len(self.outline)


def export_merged(
    source: Path,
    out: Path,
    *,
    adapters: Sequence[str] = (),
    dtype: str = "bf16",
    max_shard_size: str = "80GB",
    diffusers: bool = False,
    ema: bool = False,
    pretrained_model_name_or_path: str | None = None,
) -> Iterator[str]:
    """Writes config.json and whole weights to `out`; yields what was written and proven.

    source: a checkpoint-N of a run that trained an adapter, whose base is the recipe's model or
    pretrained_model_name_or_path; or, with adapters alone, a model's folder, or a checkpoint-N of a whole network.
    adapters: FILE:strength each. ema: the moving average of the run's adapter. Computed in fp32 and rounded once.
    Raises as `export`, and UserError for adapters of another network.
    """
    refuse("export", list(taken(out)))
    if both := checkpoints.parts(source) if checkpoints.is_ours(source) else {}:
        if adapters:
            own = " and ".join(map(str, both.values()))
            raise UserError("export", f"--adapters go into one network, and {source} keeps two; give {own} one by one")
        how = {"dtype": dtype, "max_shard_size": max_shard_size, "diffusers": diffusers, "ema": ema}
        model = {"pretrained_model_name_or_path": pretrained_model_name_or_path}
        yield from of_both(out, {part: partial(export_merged, part, **how, **model) for part in both.values()})
        return
    recipe, base, given = _inputs(source, adapters, ema, pretrained_model_name_or_path)
    merging = Merged(base, given, as_stored=dtype == "as_stored")
    family, config = base.family, base.config
    outline = {name: in_dtype(meta, dtype) for name, meta in merging.outline.items()}
    theirs = renamed(outline, family if diffusers else None, config)

    def write_config(folder: Path, by_name: Mapping[str, Tensor]) -> None:
        ours = dict(by_name) if diffusers else family.from_released(dict(by_name), config)
        family.save(folder, ours, config, diffusers=diffusers)

    def proof(folder: Path, theirs: Mapping[str, str]) -> str:
        count = read_back(merging, folder, theirs, dtype)
        names = "diffusers'" if diffusers else "released"
        off = prove(folder, theirs, merging)
        told = f"{len(merging.touched)} of them changed by adapters, at most {off:.1e} from base + change in fp64"
        return f"{count}, {dtype}, {names} names: all read back equal; {told}"

    for one in given:
        yield f"{one.path} at strength {one.strength:g}"
    how = recipe, dtype, max_shard_size
    yield from written(out, merging, outline, theirs, *how, write_config=write_config, proof=proof)


def prove(folder: Path, theirs: Mapping[str, str], merging: Merged) -> float:
    """max |written - (base + change)|, by a way of its own: in fp64, from the files.

    Raises RuntimeError naming weights that are further off than rounding explains.
    """
    written = Stored(folder)
    furthest, wrong = 0.0, []
    for name, released in theirs.items():
        if released not in merging.touched:
            continue
        base, stored = merging.base[released].double(), written[name]
        wanted = base.clone()
        for adapter, strength in merging.adapters:
            wanted += strength * change(adapter, released, base)
        off = (stored.double() - wanted).abs()
        # half a unit in the last place of what is written, and fp32's own in computing what was added up
        units = torch.finfo(stored.dtype).eps * wanted.abs() + FP32_SLACK * (wanted.abs().max() + base.abs().max())
        furthest = max(furthest, float(off.max()))
        if not (off <= units).all():
            wrong.append(name)
    if wrong:
        raise RuntimeError(f"{folder} does not hold base + change: {', '.join(few(sorted(wrong)))}")
    return furthest


def change(adapter: Adapter, name: str, base: Tensor) -> Tensor:
    """The change of the weight of that released name, in fp64, at strength 1. base: the weight, in fp64."""
    out = torch.zeros_like(base)
    if name in adapter.whole:
        out += adapter.whole[name].double() - base
    if name in adapter.changes:
        out += adapter.changes[name].double()
    layer = adapter.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
    if layer is None:
        return out
    turned = base + layer.scale * layer.B_OR.double() @ layer.A_RI.double()
    if layer.magnitude_O is not None:
        turned = torch.nn.functional.normalize(turned, dim=1) * layer.magnitude_O.double()[:, None]
    return out + turned - base


def _inputs(source: Path, texts: Sequence[str], ema: bool, model: str | None) -> tuple[Recipe, Base, list[Given]]:
    """(the recipe that names the base, the base, adapters). Raises UserError."""
    is_ours = checkpoints.is_ours(source)
    if not is_ours:
        refuse("export", list(_of_a_model(source, texts, ema, model)))
        recipe = build({}, {"pretrained_model_name_or_path": str(source)})
        base = Base(source)
        return recipe, base, read_all(texts, base.outline)
    recipe = recipe_of(source, model)
    of_run = checkpoints.is_adapter(source)
    where, other = recipe.model.pretrained_model_name_or_path, recipe.model.transformer_path
    problems = []
    if not Path(where).is_dir():
        problems.append(f"the base is not at {where!r}; --pretrained_model_name_or_path says where it is")
    if not (of_run or texts):
        problems.append(f"{source} keeps the whole network; give --adapters to merge into it, or leave --merge out")
    if ema and not of_run:
        problems.append(f"ema is of a run's adapter, and {source} keeps the whole network; leave it out")
    refuse("export", problems)
    weights = other if of_run else str(source)
    checkpoints.verify_weights(None if weights is None else Path(weights))
    base = Base(
        where,
        config_path=recipe.model.config_path,
        transformer_path=weights,
        expert=recipe.model.expert,
    )
    own = [of_checkpoint(source, base.outline, ema=ema)] if of_run else []
    given = [*own, *read_all(texts, base.outline)]
    refuse_adapters({one.path: one.adapter for one in given}, base.family)
    return recipe, base, given


def _of_a_model(source: Path, texts: Sequence[str], ema: bool, model: str | None) -> Iterator[str]:
    """What is wrong where no checkpoint-N of ours is given."""
    if not source.is_dir():
        yield f"{source} is no folder; give a checkpoint-N folder, or a model's with --adapters"
    if not texts:
        yield f"{source} is no checkpoint-N folder of a run with adapters; give --adapters to merge into this model"
    if ema:
        yield "--ema is of a run's adapter; give its checkpoint-N folder, or leave it out"
    if model is not None:
        yield f"--pretrained_model_name_or_path is {model}, and the base is {source}; leave one out"
