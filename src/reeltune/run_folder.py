"""The folder of a run: its recipe, and what it ran on."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from reeltune import checkpoint
from reeltune.errors import UserError
from reeltune.recipe import Recipe
from reeltune.settings import dump

LIBRARIES = ("reeltune", "torch", "diffusers", "transformers", "accelerate", "av", "numpy", "safetensors")


def refuse_overwriting(output_dir: Path, resumed_from: Path | None) -> None:
    """Raises UserError if output_dir holds checkpoints that this run would mix its own with."""
    there = checkpoint.complete(output_dir)
    if there and resumed_from is None:
        raise UserError(
            "recipe",
            f"output_dir {str(output_dir)!r} already holds {there[-1].name}; go on from it with resume_from_checkpoint "
            "latest, or give another output_dir",
        )


def describe(output_dir: Path, recipe: Recipe, facts: dict) -> None:
    """Writes recipe.yaml (every field) and run.json (versions, machine and `facts`)."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    on_gpu = torch.cuda.is_available()
    about = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        **facts,
    }
    (output_dir / "run.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
