"""A recipe as a form: its fields are the Recipe's, with their sentences and defaults.  (no torch)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from reeltune.config.parse import NOTHING, Setting, build, converted, flat, sentences, settings

REQUIRED = ("pretrained_model_name_or_path", "train_data_dir", "train_data_meta")  # of `check` and `plan` (cli.py)
LONG = frozenset({"validation_prompts", "validation_paths", "negative_prompt"})  # written over several lines


@dataclass(frozen=True)
class Field:
    """A setting as the form asks for it."""

    setting: Setting
    sentence: str
    value: str  # as it is written in the form; empty where it is as it is usually
    usual: str  # what it is then

    @property
    def on(self) -> bool:
        """Whether a switch is on."""
        return (self.value or self.usual) == "true"

    @property
    def lines(self) -> bool:
        return self.setting.name in LONG


def fields_of(tree: Mapping[str, Any]) -> dict[str, list[Field]]:
    """Section -> its fields, with what the tree gives."""
    found: dict[str, list[Field]] = {}
    for name, setting in settings().items():
        usual = written(setting, setting.default)
        value = _chosen(setting, tree[name]) if name in tree else ""
        found.setdefault(setting.section, []).append(Field(setting, sentences()[name], value, usual))
    return found


def _chosen(setting: Setting, value: Any) -> str:
    """Empty for what is so anyway. What is no value of the setting stays as it is, for the rules to tell of."""
    try:
        value = converted(setting, value)
    except ValueError:
        return written(setting, value)
    if value == setting.default:
        return ""
    return NOTHING[1] if value is None else written(setting, value)


def written(setting: Setting, value: Any) -> str:
    """A value, or a list's text, as the form has it."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ("\n" if setting.name in LONG else " ").join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def tree_of(form: Mapping[str, str]) -> dict[str, Any]:
    """The settings that the form gives, text all of them; those left empty, or as they are anyway, are left out."""
    tree: dict[str, Any] = {}
    for name, setting in settings().items():
        text = form.get(name, "").replace("\r\n", "\n").strip()
        if setting.is_switch:
            text = text or ("false" if "switches" in form else "")
        if not text:
            continue
        value: Any = text
        if setting.is_list:
            value = [word for word in (text.split("\n") if setting.name in LONG else text.split()) if word.strip()]
        try:
            if converted(setting, value) == setting.default:
                continue
        except ValueError:
            pass  # `build` tells of it
        tree[name] = value
    return tree


def as_yaml(tree: Mapping[str, Any]) -> str:
    """What `reeltune train` reads: the settings that were chosen, in the order in which they are written down."""
    recipe = flat(build(tree))
    plain = {name: list(v) if isinstance(v := recipe[name], tuple) else v for name in settings() if name in tree}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
