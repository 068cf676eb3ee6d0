"""YAML and flags -> Recipe, and back. Every problem is found before a file of the run is opened.  (no torch)"""

from __future__ import annotations

import ast
import difflib
import inspect
import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from reeltune.config.recipe import Recipe
from reeltune.config.rules import broken_rules
from reeltune.core.errors import UserError, refuse
from reeltune.core.near import nearest
from reeltune.core.reading import brief, read_yaml

notices = logging.getLogger(__name__)  # without a handler, Python prints its warnings bare on stderr

NOTHING = ("", "none", "null", "~")  # words for None, where a field may be None
ALL_SETTINGS = "; reeltune train --help lists all"
UNKNOWN_NAMED = 20  # names that are no settings, told one by one
TRUTH = {"true": True, "false": False}
TRAIN_MODE_ALIASES = {
    "control_camera_ref": "control_ref_camera",  # as the original script spells it
    "control_object": "control_ref",  # what the original script ran it as
}


@dataclass(frozen=True)
class Setting:
    """One field of one section of a Recipe."""

    section: str
    name: str
    hint: Any
    default: Any

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The types it may have; None apart."""
        options = get_args(self.hint) if get_origin(self.hint) in (Union, UnionType) else (self.hint,)
        return tuple(option for option in options if option is not NoneType)

    @property
    def may_be_none(self) -> bool:
        return NoneType in get_args(self.hint)

    @property
    def is_text_or_none(self) -> bool:
        """Whether it may be text or none, which is mostly a path."""
        return self.may_be_none and self.alternatives == (str,)

    @property
    def is_switch(self) -> bool:
        return self.hint is bool

    @property
    def stands_alone(self) -> bool:
        """Whether its flag without a value means true."""
        return bool in self.alternatives

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that a Literal field may be, with those of a switch if it is one too; empty for others."""
        inner = [kind for option in self.alternatives for kind in (get_args(option) if self.is_list else (option,))]
        words = [str(word) for kind in inner if get_origin(kind) is Literal for word in get_args(kind)]
        return (*TRUTH, *words) if words and self.stands_alone else tuple(words)

    @property
    def operand(self) -> str:
        """How its value is written after the flag; empty for a switch."""
        letters = {str: "TEXT", int: "N", float: "X", bool: ""}
        kind, *others = self.alternatives
        if others:
            return f"[{'|'.join(self.choices)}]"
        if not self.is_list:
            return "|".join(self.choices) or letters[kind]
        inner = get_args(kind)
        if inner[-1] is Ellipsis:
            return f"{'|'.join(self.choices) or letters[inner[0]]} ..."
        return " ".join(letters[each] for each in inner)

    @property
    def is_list(self) -> bool:
        return any(get_origin(option) is tuple for option in self.alternatives)


@cache
def settings() -> dict[str, Setting]:
    """All fields of a Recipe by name, in the order in which they are written down."""
    by_name: dict[str, Setting] = {}
    for section, kind in get_type_hints(Recipe).items():
        hints = get_type_hints(kind)
        for field in fields(kind):
            assert field.name not in by_name, f"{field.name} is in two sections"
            by_name[field.name] = Setting(section, field.name, hints[field.name], field.default)
    return by_name


@cache
def sentences() -> dict[str, str]:
    """The sentence under each field, which is its help text."""
    by_field: dict[str, str] = {}
    for section in ast.parse(Path(inspect.getfile(Recipe)).read_text(encoding="utf-8")).body:
        body = section.body if isinstance(section, ast.ClassDef) else []
        for field, below in pairwise(body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(sentence))):
                    by_field[name] = " ".join(sentence.split())  # in one line
    return by_field


# ---- building


def build(
    tree: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    where: str = "recipe",
    required: Iterable[str] = (),
    before: Iterable[str] = (),
) -> Recipe:
    """A Recipe of the flat `tree`, with `overrides` on top. Values are typed, or text as in YAML and flags.

    Raises UserError with the problems seen `before`, every unknown key, wrong type, broken rule, and every
    `required` field that is not given.
    """
    known = settings()
    values: dict[str, Any] = {}
    problems = list(before)
    given = {**tree, **(overrides or {})}
    unknown = [name for name in given if name not in known]
    for name, value in given.items():
        if name not in known:
            if name in unknown[:UNKNOWN_NAMED]:
                problems.append(f"{brief(name)[1:-1]} is no setting{nearest(name[:100], known, ALL_SETTINGS)}")
            continue
        try:
            values[name] = converted(known[name], value)
        except ValueError:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            problems.append(f"{name} is {brief(shown)}; expected {expected(known[name])}")
    if len(unknown) > UNKNOWN_NAMED:
        problems.append(f"{len(unknown) - UNKNOWN_NAMED:,} more names are no settings; is this file a recipe?")
    wrong = {line.partition(" ")[0] for line in problems}
    recipe = _assembled(values)
    problems += [line for names, line in broken_rules(recipe) if wrong.isdisjoint(names)]
    problems += [_missing(name, given) for name in required if not values.get(name)]
    refuse(where, problems)
    return recipe


def _missing(name: str, given: Mapping[str, Any]) -> str:
    if given.get(name) is None or str(given[name]).strip():  # not given, or none
        return f"{name} is missing; it has no default, so give it"
    absolute = "; where the list has absolute paths, / is it" if name == "train_data_dir" else ""
    return f"{name} is empty, as is a variable that the shell has not set; it has no default, so give it{absolute}"


def _assembled(values: Mapping[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        sections.setdefault(settings()[name].section, {})[name] = value
    kinds = get_type_hints(Recipe)
    return Recipe(**{section: kinds[section](**given) for section, given in sections.items()})


def converted(setting: Setting, value: Any) -> Any:
    """`value` in the field's type. Raises ValueError."""
    if setting.name == "train_mode" and isinstance(value, str) and value in TRAIN_MODE_ALIASES:
        notices.warning("train_mode %s means %s", value, TRAIN_MODE_ALIASES[value])
        value = TRAIN_MODE_ALIASES[value]
    if setting.may_be_none and (value is None or (isinstance(value, str) and value.lower() in NOTHING)):
        return None
    *others, kind = setting.alternatives
    for other in others:
        with suppress(ValueError):
            return _one(other, value)
    if not setting.is_list:
        return _one(kind, value)
    items = list(value) if isinstance(value, list | tuple) else [value]
    inner = get_args(kind)
    if inner[-1] is Ellipsis:
        return tuple(_one(inner[0], item) for item in items)
    return tuple(_one(each, item) for each, item in zip(inner, items, strict=True))


def _one(kind: Any, value: Any) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif isinstance(value, Path) and kind is str:
        return str(value)
    elif isinstance(value, str):
        return _read(kind, value)
    elif type(value) is kind or (kind is float and type(value) is int):
        return _read(kind, str(value))
    raise ValueError


def _read(kind: Any, text: str) -> Any:
    if kind is bool:
        if text.lower() in TRUTH:
            return TRUTH[text.lower()]
        raise ValueError
    value = kind(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def expected(setting: Setting) -> str:
    """The field's type in words."""
    words = " or ".join(_words(kind) for kind in setting.alternatives)
    return f"{words}, or none" if setting.may_be_none else words


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        words = [str(word) for word in get_args(kind)]
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return f"a list, each {_words(inner[0])}" if inner[-1] is Ellipsis else f"{len(inner)} whole numbers"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]


# ---- YAML


def read(path: str | Path) -> dict[str, Any]:
    """The settings in a recipe file, text all of it, not yet checked. Raises UserError if it is none, or no table."""
    path = Path(path)
    if not path.exists() and path.parent.is_dir():
        recipes = [beside.name for beside in path.parent.iterdir() if beside.suffix in (".yaml", ".yml")]
        close = difflib.get_close_matches(path.name, recipes, n=3)
        raise UserError(str(path), "is missing; " + (f"near are {', '.join(close)}" if close else "look at its path"))
    return read_yaml(path, "a recipe", typed=False)


def flat(recipe: Recipe) -> dict[str, Any]:
    """Every field by name."""
    return {name: getattr(getattr(recipe, each.section), name) for name, each in settings().items()}


def dump(recipe: Recipe) -> str:
    """YAML from which `read` and `build` make an equal Recipe."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flat(recipe).items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
