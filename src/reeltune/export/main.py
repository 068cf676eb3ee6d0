"""`reeltune export`: a checkpoint's weights in a folder of their own, read back, compared and tried.

Whoever wrote the checkpoint, one process or many: tensors pass through memory one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reeltune import families
from reeltune.checkpoint import folder as checkpoints
from reeltune.checkpoint.state import Shared, has_average
from reeltune.config.moved import recipe_beside
from reeltune.config.parse import build, read
from reeltune.config.recipe import Recipe
from reeltune.core.errors import refuse
from reeltune.core.files import NO_NAMES, whole_folder
from reeltune.core.reading import few
from reeltune.distributed.engine import DTYPES
from reeltune.export import forward_check, streamed
from reeltune.families import configs, weights
from reeltune.families.spec import Family, check_expert, check_mode
from reeltune.families.stored import Stored
from reeltune.memory.host import room_bytes
from reeltune.run.experts import of_expert
from reeltune.run.folder import within_checkpoint

PORTION = 2**18  # numbers
SIZES = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def export(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str = "bf16",
    max_shard_size: str = "80GB",
    diffusers: bool = False,
    ema: bool = False,
    pretrained_model_name_or_path: str | None = None,
) -> Iterator[str]:
    """Writes config.json and weights to `out`; yields what was written and proven. `out` is there once all is proven.

    The weights have the names that the original tools load, or diffusers' with `diffusers`, which needs the model
    that was trained: that of the run's recipe, or pretrained_model_name_or_path. So does the forward pass of the
    proof, which is left out, with a line that says why, where the model is not there or does not fit into memory.
    Another tool's checkpoint-N with such weights is taken too. Raises UserError if `checkpoint` is none, is damaged or
    lacks what is asked for, if `out` has something in it, or a number is not finite or would not be in `dtype`, and
    RuntimeError if what was written does not come back equal; nothing is left of `out` then.
    """
    refuse("export", list(_problems(checkpoint, out, ema)))
    if both := checkpoints.parts(checkpoint):
        how = {"dtype": dtype, "max_shard_size": max_shard_size, "diffusers": diffusers, "ema": ema}
        model = {"pretrained_model_name_or_path": pretrained_model_name_or_path}
        yield from of_both(out, {part: partial(export, part, **how, **model) for part in both.values()})
        return
    checkpoints.verify(checkpoint, under=checkpoints.WEIGHTS)
    recipe = recipe_of(checkpoint, pretrained_model_name_or_path)
    source = _source(checkpoint, ema)
    own = _own_folder(checkpoint)
    family = _family(recipe) if diffusers else None
    config = configs.read_config(own)

    def write_config(folder: Path, outline: Mapping[str, Tensor]) -> None:
        if family is None:
            shutil.copyfile(own / "config.json", folder / "config.json")
        else:
            family.save(folder, outline, config, diffusers=True)

    def proof(folder: Path, theirs: Mapping[str, str]) -> str:
        names = "released" if family is None else "diffusers'"
        return f"{read_back(source, folder, theirs, dtype)}, {dtype}, {names} names: all read back equal"

    outline = {name: in_dtype(meta, dtype) for name, meta in source.outline.items()}
    theirs = renamed(outline, family, config)
    how = recipe, dtype, max_shard_size
    yield from written(out, source, outline, theirs, *how, write_config=write_config, proof=proof)


def of_both(out: Path, exports: Mapping[Path, Callable[[Path], Iterator[str]]]) -> Iterator[str]:
    """Exports each part of a checkpoint into a folder of its name in `out`; nothing is left of `out` if one fails."""
    was_there, is_whole = out.is_dir(), False
    try:
        for part, one in exports.items():
            yield from one(out / part.name)
        is_whole = True
    finally:
        if not is_whole:
            for part in exports:
                shutil.rmtree(out / part.name, ignore_errors=True)
            if out.is_dir() and not was_there:
                out.rmdir()


def written(
    out: Path,
    source: Mapping[str, Tensor],
    outline: Mapping[str, Tensor],
    theirs: Mapping[str, str],
    recipe: Recipe,
    dtype: str,
    max_shard_size: str,
    *,
    write_config: Callable[[Path, Mapping[str, Tensor]], None],
    proof: Callable[[Path, Mapping[str, str]], str],
) -> Iterator[str]:
    """Writes `source` to `out`, tensor by tensor, and proves it there; nothing is left of it otherwise.

    outline: meta tensors in the types that are written, by the source's names. theirs: name to write -> the source's.
    write_config: of a folder and the outline by the names to write. proof: of a folder and `theirs`, in words; raises
    RuntimeError. Raises UserError as `export`.
    """
    by_name = {name: outline[mine] for name, mine in theirs.items()}
    with whole_folder(out) as beside:
        write_config(beside, by_name)
        cast = Cast(source, dtype)
        shard_bytes = int(max_shard_size[:-2]) * SIZES[max_shard_size[-2]]
        files = streamed.write(beside, by_name, lambda name: cast(theirs[name]), shard_bytes)
        refuse("export", few(cast.problems))
        proven = proof(beside, theirs)
        tried = _tried(recipe, beside, outline)
    for file in files:
        yield f"{out / file.name}  {(out / file.name).stat().st_size / 1e6:,.1f} MB"
    yield proven
    yield tried


class Cast:
    """Released name -> tensor in the type that is written; what is lost on the way is kept as `problems`."""

    def __init__(self, source: Mapping[str, Tensor], dtype: str):
        self.source, self.dtype = source, dtype
        self.problems: list[str] = []

    def __call__(self, name: str) -> Tensor:
        tensor = self.source[name]
        cast = in_dtype(tensor, self.dtype)
        if count := not_finite(tensor):
            self.problems.append(f"{name} has {count:,} numbers that are not finite; export an earlier checkpoint")
        elif not_finite(cast):
            largest = max(float(tensor.max()), -float(tensor.min()))
            remedy = "give --dtype bf16, fp32 or as_stored"
            self.problems.append(f"{name} has {largest:g}, more than {self.dtype} holds; {remedy}")
        return cast


def not_finite(tensor: Tensor) -> int:
    """How many of its numbers are not; looked at in portions, as memory has no room for more than the tensor."""
    return sum(int((~torch.isfinite(part)).sum()) for part in tensor.reshape(-1).split(PORTION))


def _own_folder(checkpoint: Path) -> Path:
    """Where the network's config.json lies."""
    ours = checkpoints.is_ours(checkpoint)
    return checkpoints.weights_in(checkpoint) if ours else checkpoints.their_weights(checkpoint)


def _problems(checkpoint: Path, out: Path, ema: bool) -> Iterator[str]:
    is_ours, theirs = checkpoints.is_ours(checkpoint), checkpoints.their_weights(checkpoint)
    if not is_ours and not (weights.has_weights(theirs) and (theirs / "config.json").is_file()):
        have = ", ".join(str(path) for path in checkpoints.complete(checkpoint)) or "none"
        yield f"{checkpoint} is no complete checkpoint-N folder; complete ones in it: {have}"
    elif checkpoints.is_adapter(checkpoint):
        yield f"{checkpoint} keeps an adapter; --merge makes whole weights of it and its base, --adapter a file of it"
    elif ema and not has_average(checkpoint):
        yield f"{checkpoint} has no moving average; it is kept by runs with use_ema"
    yield from taken(out)


def taken(out: Path) -> Iterator[str]:
    """Why nothing can be written there."""
    if out.name in NO_NAMES:
        yield f"{out} is a folder that cannot be made anew; give it a name of its own"
        return
    yield from within_checkpoint(out)
    if out.is_symlink():
        yield f"{out} is a link, in whose place nothing is written; give the folder itself, or another"
        return
    if checkpoints.NAME.match(out.name) and checkpoints.complete(out.absolute().parent):
        yield f"{out} would stand among the checkpoints of a run, which has one of that name to write; give another"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        yield f"{out} is there already and is not an empty folder; give another"


def _source(checkpoint: Path, ema: bool) -> Any:
    """The tensors by released name, each read when asked for; `outline` has them on the meta device."""
    if checkpoints.is_shared(checkpoint):
        return Shared(checkpoint).weights(average=ema)
    return Stored(checkpoint / "transformer_ema" if ema else _own_folder(checkpoint))


def recipe_of(checkpoint: Path, model: str | None) -> Recipe:
    """The run's, where there is one, with another place of its model if one is given; of a part that expert's."""
    file = recipe_beside(checkpoints.whole(checkpoint))
    given = {} if model is None else {"pretrained_model_name_or_path": model}
    return of_expert(build({} if file is None else read(file), given), checkpoints.expert_of(checkpoint))


def _family(recipe: Recipe) -> Family:
    found = families.find(recipe.model.pretrained_model_name_or_path, config_path=recipe.model.config_path)
    return found if recipe.model.expert is None else check_expert(found, recipe.model.expert)


def in_dtype(tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in that type, as the command names it; whole numbers and truth values, which it would round, stay as
    they are."""
    return tensor if dtype == "as_stored" or not tensor.is_floating_point() else tensor.to(DTYPES[dtype])


def renamed(outline: Mapping[str, Tensor], family: Family | None, config: dict) -> dict[str, str]:
    """Name to write -> released name."""
    if family is None:
        return {name: name for name in outline}
    own = {id(meta): name for name, meta in outline.items()}
    return {name: own[id(meta)] for name, meta in family.from_released(dict(outline), config).items()}


def read_back(source: Mapping[str, Tensor], folder: Path, theirs: Mapping[str, str], dtype: str) -> str:
    """Raises RuntimeError naming the tensors that do not come back equal."""
    written = Stored(folder)
    unlike = sorted(theirs.keys() ^ written.keys())
    for name in theirs.keys() & written.keys():
        if not torch.equal(written[name], in_dtype(source[theirs[name]], dtype)):
            unlike.append(name)
    if unlike:
        raise RuntimeError(f"{folder} does not hold what was written: {', '.join(unlike)}")
    return f"{len(written)} tensors"


def _tried(recipe: Recipe, folder: Path, outline: Mapping[str, Tensor]) -> str:
    """What came of a forward pass, or why there was none."""
    model = recipe.model.pretrained_model_name_or_path
    if not model or not Path(model).is_dir():
        remedy = "--pretrained_model_name_or_path says where it is"
        why = f"the model that was trained is not at {model!r}" if model else "no recipe says what model this is of"
        return f"no forward pass: {why}; {remedy}"
    needed, room = forward_check.needed_bytes(Path(model), folder), room_bytes()
    if needed > room:
        return f"no forward pass: it takes {needed / 1e9:.1f} GB of memory and {room / 1e9:.1f} GB are free"
    family = _family(recipe)
    mode = check_mode(family, recipe.model.train_mode)
    floats = (meta.dtype for meta in outline.values() if meta.is_floating_point())
    widest = max(floats, key=lambda dtype: dtype.itemsize, default=torch.float32)
    shape = forward_check.forward(Path(model), family, mode, folder, widest)
    return f"a forward pass of {family.name} on a clip of {'x'.join(map(str, shape))}: finite"
