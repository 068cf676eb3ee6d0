"""Which linear layers get an adapter, and of which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from reeltune.core.errors import refuse
from reeltune.core.reading import few, grouped


@dataclass(frozen=True)
class Target:
    name: str  # of the module in our network
    released: str  # in released files
    rank: int
    alpha: float


def linear_layers(net: nn.Module, block_classes: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """Our name -> the released one, of the linear layers in blocks of these classes.

    names: of parameters, ours -> released.
    """
    blocks = [name for name, module in net.named_modules() if type(module).__name__ in block_classes]
    inside = tuple(f"{name}." for name in blocks)
    return {name: released for name, released in _all_linear(net, names).items() if name.startswith(inside)}


def targets(
    net: nn.Module,
    block_classes: Sequence[str],
    names: Mapping[str, str],
    *,
    rank: int,
    alpha: float | None,
    wanted: Sequence[str] = (),
    skipped: Sequence[str] = (),
    ranks: Sequence[str] = (),
    alphas: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> list[Target]:
    """The layers that get an adapter, in the network's order. Nothing wanted: every linear layer of the blocks.

    ranks, alphas: "part of a name=number" for layers with another one. whole: parts of released parameter names that
    learn in full, and need no adapter. Raises UserError for what matches nothing, and for ranks above a layer's size.
    """
    everything = _all_linear(net, names)
    chosen = linear_layers(net, block_classes, names)
    if wanted:
        chosen = {name: released for name, released in everything.items() if _any(wanted, name, released)}
    own_ranks, own_alphas = _numbers(ranks), _numbers(alphas)
    asked = {
        "target_name": wanted,
        "lora_skip_name": skipped,
        "rank_pattern": tuple(own_ranks),
        "alpha_pattern": tuple(own_alphas),
    }
    problems = [
        f"{field} has {part!r}, which is in the name of no linear layer; {_near(part, everything)}"
        for field, parts in asked.items()
        for part in parts
        if not any(_any((part,), *pair) for pair in everything.items())
    ]
    refuse("recipe", problems)
    out, wide = [], []
    sizes = {
        name: min(one.in_features, one.out_features) for name, one in net.named_modules() if isinstance(one, nn.Linear)
    }
    for name, released in chosen.items():
        if _any(skipped, name, released) or in_full(f"{released}.weight", whole):
            continue
        own_rank = int(_last(own_ranks, name, released, rank))
        own_alpha = _last(own_alphas, name, released, float(own_rank) if alpha is None else alpha)
        out.append(Target(name, released, own_rank, own_alpha))
        if own_rank > sizes[name]:
            wide.append((released, f"gets rank {own_rank}, and its own is {sizes[name]} at most; lower rank there"))
    refuse("recipe", few(grouped(wide)))
    if not out:
        refuse("recipe", ["no linear layer is left for an adapter; change target_name or lora_skip_name"])
    return out


def _all_linear(net: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    weights = {f"{name}.weight": name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    return {name: names[weight].removesuffix(".weight") for weight, name in weights.items()}


def in_full(released: str, whole: Sequence[str]) -> bool:
    """Whether the parameter of that name learns in full. whole: parts of released names."""
    return any(part in released for part in whole)


def _any(parts: Sequence[str], *names: str) -> bool:
    """Whether one of them is in one of the names, as whole parts between its dots."""
    return any(f".{part}." in f".{name}." for part in parts for name in names)


def _numbers(patterns: Sequence[str]) -> dict[str, float]:
    return {part: float(number) for part, _, number in (pattern.rpartition("=") for pattern in patterns)}


def _last(numbers: Mapping[str, float], name: str, released: str, otherwise: float) -> float:
    return next((number for part, number in reversed([*numbers.items()]) if _any((part,), name, released)), otherwise)


def _near(part: str, layers: Mapping[str, str]) -> str:
    """Names that may have been meant: the ends of layers' names, numbers left out."""
    ends = {".".join(name.split(".")[-count:]) for pair in layers.items() for name in pair for count in (1, 2, 3)}
    near = get_close_matches(part, sorted(ends), n=3, cutoff=0.5) or sorted(set(layers.values()))[:2]
    return f"there are {', '.join(near)}"
