"""Versions of everything that numbers depend on.  (no torch)"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "av", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Versions of this package, which may be used from its source without being installed, and of LIBRARIES."""
    try:
        own = version("reeltune")
    except PackageNotFoundError:
        own = "not installed"
    return {"reeltune": own, **{name: version(name) for name in LIBRARIES}}


def with_python() -> dict[str, str]:
    return {"python": platform.python_version(), **versions()}
