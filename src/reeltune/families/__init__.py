"""One folder for each model family, and which of them a checkpoint is of.

The checkpoint's own files say what it is. A family's libraries are imported once its files are found to be its own.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError, refuse
from reeltune.core.imports import lean_imports
from reeltune.core.reading import brief, read_yaml
from reeltune.families.diagnosis import no_folder, unknown
from reeltune.families.spec import Family

MODULES = {  # each has find(folder, settings) -> Family | None
    "wan_fun": "reeltune.families.wan_fun.family",
    "easyanimate": "reeltune.families.easyanimate.family",
    "cogvideox_fun": "reeltune.families.cogvideox_fun.family",
    "hunyuan_video": "reeltune.families.hunyuan_video.family",
    "toy": "reeltune.families.toy.family",
}

SECTIONS = (  # of the guides' model yaml, that are read
    "transformer_additional_kwargs",
    "vae_kwargs",
    "text_encoder_kwargs",
    "image_encoder_kwargs",
    "scheduler_kwargs",
)


def find(path: str | Path, *, config_path: str | Path | None = None) -> Family:
    """The family of a checkpoint folder, from its JSON files and tensor headers alone.

    config_path: the guides' model yaml, for file names inside the checkpoint and the schedule.
    Raises UserError that says what was found there and what is supported.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError("pretrained_model_name_or_path", no_folder(folder))
    settings = _settings(config_path)
    for module in MODULES.values():
        with lean_imports():
            family = import_module(module).find(folder, settings)
        if family is not None:
            return family
    raise UserError("pretrained_model_name_or_path", unknown(folder, list(MODULES)))


def _settings(config_path: str | Path | None) -> dict[str, Any]:
    if config_path is None:
        return {}
    settings = read_yaml(Path(config_path), "a model's yaml", typed=True)
    refuse(
        str(config_path),
        [
            f"{name} is {brief(settings[name])}; expected a table of names and values"
            for name in SECTIONS
            if not isinstance(settings.get(name), dict | None)
        ],
    )
    return settings
