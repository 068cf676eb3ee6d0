"""Settings of a recipe that accelerate's launcher says by environment.  (no torch)"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from reeltune.core.errors import refuse

NAMES = {  # variable -> (setting, the launcher's flag, what it says where nobody asked it)
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "--mixed_precision", "no"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient_accumulation_steps", "--gradient_accumulation_steps", "1"),
    "ACCELERATE_GRADIENT_CLIPPING": ("max_grad_norm", "--gradient_clipping", "none"),
}


def adopted(given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The launcher's settings that the user has not given by flag or recipe.

    The launcher says its defaults too: those bow to what is given, and are taken where nothing is. Raises UserError
    where launcher and user ask for different things, and for what the launcher asks that is not done here.
    """
    refuse("launch", list(_problems(given, environ)))
    told = {setting: environ[variable] for variable, (setting, _, _) in NAMES.items() if variable in environ}
    return {name: value for name, value in told.items() if name not in given and value != "none"}


def _problems(given: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[str]:
    for variable, (setting, flag, default) in NAMES.items():
        told = environ.get(variable, default)
        if setting in given and told != default and not _same(given[setting], told):
            yield f"{setting} is {given[setting]} and accelerate launch was told {flag} {told}; leave one out"
    if environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        yield "accelerate launch was told --mixed_precision fp8, which is not done here; give bf16"
    backend = environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        yield f"accelerate launch was told --dynamo_backend {backend}; networks are not compiled here; leave it out"


def _same(one: Any, other: str) -> bool:
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == other
