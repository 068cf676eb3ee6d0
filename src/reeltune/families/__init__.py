"""One folder for each model family, and which of them a checkpoint is of.

The checkpoint's own files say what it is. A family is imported only when it is looked for.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import yaml

from reeltune.core.errors import UserError
from reeltune.families.spec import Family

MODULES = {  # each has find(folder, settings) -> Family | None
    "wan_fun": "reeltune.families.wan_fun.family",
    "easyanimate": "reeltune.families.easyanimate.family",
    "cogvideox_fun": "reeltune.families.cogvideox_fun.family",
    "hunyuan_video": "reeltune.families.hunyuan_video.family",
    "toy": "reeltune.families.toy.family",
}


def find(path: str | Path, *, config_path: str | Path | None = None) -> Family:
    """The family of a checkpoint folder, from its JSON files and tensor headers alone.

    config_path: the guides' model yaml, for file names inside the checkpoint and the schedule.
    Raises UserError that says what was found there and what is supported.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError("pretrained_model_name_or_path", f"{str(path)!r} is not a folder; give that of a download")
    settings = _settings(config_path)
    for module in MODULES.values():
        family = import_module(module).find(folder, settings)
        if family is not None:
            return family
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
    raise UserError(
        "pretrained_model_name_or_path",
        f"{folder} holds {there}, which is no checkpoint of a supported family ({', '.join(MODULES)}); "
        "released and diffusers layouts are known",
    )


def _settings(config_path: str | Path | None) -> dict:
    if config_path is None:
        return {}
    try:
        settings = yaml.safe_load(Path(config_path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as broken:
        raise UserError("config_path", f"{config_path} cannot be read ({broken})") from broken
    if not isinstance(settings, dict):
        raise UserError("config_path", f"{config_path} is not a table of sections such as vae_kwargs")
    return settings
