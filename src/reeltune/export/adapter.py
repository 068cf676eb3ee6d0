"""`reeltune export --adapter` and `reeltune import`: adapters from one tool's form to another's, and what a file is.

What is written is read back and held to the rules of every tool that it is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from reeltune.adapters import saved, writing
from reeltune.adapters.adapter import Adapter
from reeltune.adapters.dialects import Found, adapter_of, counted, read_adapter
from reeltune.adapters.files import Stored, file_of, stored_in
from reeltune.adapters.loaders import BY_TOOL, LOADERS, Applied, applied
from reeltune.adapters.networks import Network
from reeltune.adapters.proof import Proof, prove, strengths
from reeltune.checkpoint import folder as checkpoints
from reeltune.checkpoint.state import Shared, has_average
from reeltune.core.errors import UserError, refuse
from reeltune.core.files import whole_file
from reeltune.core.reading import few
from reeltune.run.base import Base
from reeltune.run.folder import within_checkpoint


def export_adapter(
    source: Path,
    out: Path,
    dialect: str,
    *,
    dtype: str = "as_stored",
    ema: bool = False,
    alpha: float | None = None,
    trigger_words: str = "",
    pretrained_model_name_or_path: str | None = None,
) -> Iterator[str]:
    """Writes the adapter of a checkpoint-N folder, or of any tool's file, to `out`, for a tool of writing.DIALECTS.

    Yields what was written, and what each tool applies of it. pretrained_model_name_or_path: what the adapter changes;
    needed where weights were trained in full, whose change is written; else the adapter is held to its names and sizes.
    Of a checkpoint of two experts both are, into NAME_high_noise and NAME_low_noise in place of `out`.
    Raises UserError if `out` is there, or for what the tool does not load as it was trained, and RuntimeError if what
    was written is not that; nothing is left of `out` then.
    """
    if both := checkpoints.parts(source) if checkpoints.is_ours(source) else {}:
        how = {"dtype": dtype, "ema": ema, "alpha": alpha, "trigger_words": trigger_words}
        ends = {part: part.name.removesuffix("_model") for part in both.values()}  # by which people tell them apart
        files = {part: out.with_name(f"{out.stem}_{end}{out.suffix}") for part, end in ends.items()}
        refuse("export", [problem for file in files.values() for problem in _problems(source, file)])
        for part, file in files.items():
            yield from export_adapter(
                part, file, dialect, **how, pretrained_model_name_or_path=pretrained_model_name_or_path
            )
        return
    refuse("export", list(_problems(source, out)))
    stored = _stored(source, ema)
    base = _base(pretrained_model_name_or_path, stored.metadata)
    adapter, found = adapter_of(stored, None if base is None else base.outline, alpha=alpha)
    network = _only(found)
    adapter = _with_changes(adapter, base)
    tensors = writing.written(adapter, network, dialect, writing.FILE_TYPES[dtype])
    facts = _facts(source, out, adapter) | {"trigger": trigger_words}
    most_error = writing.most_error(writing.FILE_TYPES[dtype], tensors)
    with whole_file(out, "wb") as file:
        file.write(save(dict(tensors), writing.metadata(adapter, network, tensors, facts)))
        file.flush()
        proofs = dict(_proofs(Path(file.name), adapter, network))
        mine = [tool for tool in writing.DIALECTS[dialect].tools if network.name in BY_TOOL[tool].names]
        for tool in ("reeltune", *mine):
            if not proofs[tool].holds(most_error):
                raise RuntimeError(f"{out} is not what was trained, by the rules of {tool}: {told(proofs[tool])}")
    yield f"{out}  {out.stat().st_size / 1e6:,.1f} MB: {found.title}, {summary(adapter)}"
    yield from (f"{tool:16} {told(proof)}" for tool, proof in proofs.items() if tool != "reeltune")


def tell(
    path: Path,
    *,
    alpha: float | None = None,
    pretrained_model_name_or_path: str | None = None,
) -> Iterator[str]:
    """What an adapter's file is, and how strong it would be in each tool: from its header and alphas alone.

    alpha: what it was trained with, for a file that does not say. Raises UserError as `read_adapter`.
    """
    base = None if pretrained_model_name_or_path is None else Base(pretrained_model_name_or_path)
    adapter, found = read_adapter(path, None if base is None else base.outline, alpha=alpha, outline=True)
    yield f"{found.file}: {found.title}, in {found.tool}"
    yield summary(adapter)
    yield f"targets: {', '.join(writing.targets(adapter)) or 'none'}"
    if whole := sorted({*adapter.whole, *adapter.changes}):
        yield f"whole weights: {', '.join(few(whole, 5))}"
    yield from _scale(adapter, found)
    for key in (writing.OURS, "ss_base_model_version", "ss_sd_model_name", "modelspec.trigger_phrase"):
        if key in found.metadata:
            yield f"{key}: {found.metadata[key][:200]}"
    yield from dict.fromkeys(  # of networks that are not told apart, many tools make one thing
        f"{loader.tool:16} {_strength(adapter, applied(loader, found.stored, network))}"
        for network in found.networks
        for loader in LOADERS
        if network.name in loader.names
    )


# ---- reading


def _problems(source: Path, out: Path) -> Iterator[str]:
    if not source.exists():
        yield f"{source} is missing; give a checkpoint-N folder, or a file of an adapter"
    if out.suffix != ".safetensors":
        yield f"{out} is to be a file that ends in .safetensors"
    yield from within_checkpoint(out)
    if out.exists() or out.is_symlink():
        yield f"{out} is there already; give another"


def _stored(source: Path, ema: bool) -> Stored:
    if not checkpoints.is_ours(source):
        if ema:
            raise UserError("export", f"{source} is no checkpoint-N folder of ours, and has no moving average")
        return stored_in(file_of(source), outline=False)
    checkpoints.verify(source, under=checkpoints.WEIGHTS)
    if not checkpoints.is_adapter(source):
        raise UserError("export", f"{source} has no adapter: its network learnt in full; leave --adapter out")
    if ema and not has_average(source):
        raise UserError("export", f"{source} has no moving average; it is kept by runs with use_ema")
    if checkpoints.is_shared(source):
        config = saved.config_of(source / checkpoints.ADAPTER)
        alphas = config.pop("alphas")
        shared = dict(Shared(source).weights(average=ema))
        return Stored(source, saved.tensors_in_file(shared, alphas), saved.metadata(config))
    folder = source / (f"{checkpoints.ADAPTER}_ema" if ema else checkpoints.ADAPTER)
    return stored_in(folder / saved.FILE, outline=False)


def _base(model: str | None, metadata: Mapping[str, str]) -> Base | None:
    """The model that is given, or the one that a file of ours says, if it is there."""
    if model is not None:
        return Base(model)
    said = metadata.get("base_model", "")
    if not said or not Path(said).is_dir():
        return None
    kept = {name: text for name in ("transformer_path", "expert") if (text := metadata.get(name, "null")) != "null"}
    try:
        return Base(said, **kept)
    except UserError as error:
        remedy = "--pretrained_model_name_or_path says where the model is"
        told = [f"its base_model, as its metadata says, is {said!r}: {problem}" for problem in error.problems]
        raise UserError("export", [*told, remedy]) from error


def _only(found: Found) -> Network:
    if len(found.networks) > 1:
        names = found.title
        raise UserError("export", f"its layers could be of {names}; --pretrained_model_name_or_path says of which")
    if not found.network.name:
        raise UserError("export", f"no tool is known that loads adapters of {found.network.title}")
    return found.network


def _with_changes(adapter: Adapter, base: Base | None) -> Adapter:
    """Whole weights as their change from the base's, in fp32."""
    if not adapter.whole:
        return adapter
    if base is None:
        names = ", ".join(few(sorted(adapter.whole), 3))
        remedy = "--pretrained_model_name_or_path says where it is"
        raise UserError("export", f"{names} were trained in full, and their change is from the model's; {remedy}")
    changes = {name: weight.float() - base[name].float() for name, weight in adapter.whole.items()}
    return replace(adapter, whole={}, changes={**adapter.changes, **changes})


def _facts(source: Path, out: Path, adapter: Adapter) -> dict[str, str]:
    facts = {"title": out.stem, "base_model": Path(str(adapter.about.get("base_model", ""))).name}
    if checkpoints.is_ours(source):
        whole = checkpoints.whole(source)
        facts["steps"] = str(checkpoints.progress_of(whole).step)
        recipe = whole.parent / "recipe.yaml"
        facts["recipe_sha256"] = hashlib.sha256(recipe.read_bytes()).hexdigest() if recipe.is_file() else ""
    return facts


# ---- proving and telling


def _proofs(file: Path, adapter: Adapter, network: Network) -> Iterator[tuple[str, Proof]]:
    """(tool, what it makes of the file), first of what we read of it ourselves."""
    stored = stored_in(file, outline=False)
    again, _ = adapter_of(stored)
    yield "reeltune", prove(adapter.layers, adapter.changes, Applied(again.layers, again.changes))
    for loader in LOADERS:
        if network.name in loader.names:
            yield loader.tool, prove(adapter.layers, adapter.changes, applied(loader, stored.tensors, network))


LOADS_NONE = "loads none of it, and says so in a log at most"


def told(proof: Proof) -> str:
    if proof.refused:
        return f"does not load it: {proof.refused}"
    parts = [f"applied / trained {proof.lowest_ratio:.6f} to {proof.highest_ratio:.6f} in {proof.layers} layers"]
    parts += [f"relative error {proof.error:.1e}"]
    parts += [f"{len(names)} {what}: {', '.join(few(names, 2))}" for names, what in _odd(proof)]
    return "; ".join(parts) if proof.layers else LOADS_NONE


def _odd(proof: Proof) -> list[tuple[list[str], str]]:
    return [(names, what) for names, what in ((proof.missing, "missing"), (proof.strange, "unused")) if names]


def _strength(adapter: Adapter, its: Applied) -> str:
    if its.refused:
        return f"does not load it: {its.refused}"
    if not its.layers and not its.changes:
        return LOADS_NONE
    found = strengths(adapter.layers, its)
    missing = len({*adapter.layers, *adapter.changes} - {*its.layers, *its.changes})
    least, most = found or (0.0, 0.0)
    words = f"strength {least:.3f}" + (f" to {most:.3f}" if most - least > 5e-4 else "")
    words += f", {missing} of {len(adapter.layers) + len(adapter.changes)} layers left out" if missing else ""
    return words + (f", {len(its.unused)} tensors unused" if its.unused else "")


def summary(adapter: Adapter) -> str:
    counts = [f"rank {rank}, alpha {alpha:g} ({count} layers)" for rank, alpha, count in counted(adapter.layers)]
    whole = len({*adapter.whole, *adapter.changes})
    return "; ".join(few(counts, 4) + ([f"{whole} whole weights"] if whole else []))


def _scale(adapter: Adapter, found: Found) -> Iterator[str]:
    if any(pair.magnitude_O is not None for pair in adapter.layers.values()):
        yield "DoRA: magnitudes beside the pairs; of the tools below none applies it as it was trained"
    if found.alpha_from:
        yield f"alpha: from {found.alpha_from}"
    elif writing.OURS in found.metadata:
        yield "alpha: none in the file, so the rank is taken for it, which is right: reeltune writes the scale into B"
    elif adapter.layers:
        said = found.metadata.get("ss_network_alpha")
        hint = f"; its metadata says ss_network_alpha {said}, which no tool reads" if said else ""
        yield f"alpha: none in the file, so every tool takes the rank for it{hint}"
        yield "if it was trained with another, --alpha N tells what each tool makes of it, and with --out FILE mends it"
