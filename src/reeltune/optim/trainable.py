"""Which parameters learn, and at which rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from reeltune.core.errors import UserError


def released_names(net: nn.Module, to_released: Callable) -> dict[str, str]:
    """Our parameter name -> the released one, which is what users know and write in patterns."""
    parameters = dict(net.named_parameters())
    ours = {id(tensor): name for name, tensor in parameters.items()}
    return {ours[id(tensor)]: name for name, tensor in to_released(parameters).items()}


def select(
    net: nn.Module,
    names: dict[str, str],
    patterns: Sequence[str],
    low_rate_patterns: Sequence[str] = (),
) -> list[dict]:
    """Sets requires_grad and returns the optimizer's groups: full rate, then half rate where asked.

    A pattern matches where it is part of the released parameter name; "." matches all, as in the original tools.
    Raises UserError naming every pattern that matches nothing.
    """
    unused = [
        f"{field} has {pattern!r}, which is in no parameter name; names look like {_examples(names)}"
        for field, given in (
            ("trainable_modules", patterns),
            ("trainable_modules_low_learning_rate", low_rate_patterns),
        )
        for pattern in given
        if not any(matches(pattern, name) for name in names.values())
    ]
    if unused or not (patterns or low_rate_patterns):
        raise UserError("recipe", unused or "trainable_modules is empty, so nothing would learn; '.' is everything")
    full, low = [], []
    for name, parameter in net.named_parameters():
        is_low = any(matches(pattern, names[name]) for pattern in low_rate_patterns)
        is_full = any(matches(pattern, names[name]) for pattern in patterns)
        parameter.requires_grad_(is_low or is_full)
        if is_low:
            low.append(parameter)
        elif is_full:
            full.append(parameter)
    groups = [{"params": full, "rate": 1.0}, {"params": low, "rate": 0.5}]
    return [group for group in groups if group["params"]]


def matches(pattern: str, name: str) -> bool:
    return pattern == "." or pattern in name


def _examples(names: dict[str, str]) -> str:
    released = list(names.values())
    return ", ".join(released[:: max(1, len(released) // 3)][:3])
