"""Versions of everything that numbers depend on.  (no torch)"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "av", "numpy", "safetensors")
WHERE_THERE = ("flash-attn-4",)  # which computes attention where it is installed


def installed(name: str) -> str | None:
    """A package's version; None: it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of this package, which may be used from its source without being installed, of LIBRARIES, and of those
    WHERE_THERE that are."""
    more = {name: number for name in WHERE_THERE if (number := installed(name)) is not None}
    return {"reeltune": installed("reeltune") or "not installed", **{name: version(name) for name in LIBRARIES}, **more}


def with_python() -> dict[str, str]:
    return {"python": platform.python_version(), **versions()}
