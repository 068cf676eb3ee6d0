"""Files that others wrote: JSON, YAML, and what a file is that should have been something else.  (no torch)

Whatever they hold, what comes out is a value or one UserError, in bounded time and memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from reeltune.core.errors import UserError, lacks_memory, refuse

MOST_JSON_BYTES = 64 * 2**20  # the largest tokenizer.json of an encoder here has 17 MB
MOST_YAML_BYTES = 100_000  # the densest take PyYAML two seconds (measured, 2026-11)
MOST_NAME_BYTES = 255  # of a file's, on any file system
DEPTH = 64  # lists and tables within each other; no file of a checkpoint or a recipe has ten
AGAIN = "download it again"


class as_user_error:
    """Within, whatever a library raises about a file becomes a UserError: `where`, `problem`, and the library's reason.

    For readers of other people's files alone, whose libraries raise anything: for our own code it would hide mistakes.
    UserError and lack of memory pass through.
    """

    def __init__(self, where: str | Path, problem: str, remedy: str = AGAIN):
        self.where, self.problem, self.remedy = str(where), problem, remedy

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, UserError) or lacks_memory(error):
            return
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":  # of libraries in Rust
            raise UserError(self.where, f"{self.problem} ({reason_of(error)}); {self.remedy}") from error


def reason_of(error: BaseException) -> str:
    """The error's first line, or its kind where that says nothing."""
    lines = str(error).strip().splitlines() or [""]
    first = " ".join(" ".join(lines).split()) if isinstance(error, yaml.YAMLError) else lines[0]
    plain = first and isinstance(error, OSError | ValueError | yaml.YAMLError)
    return first[:300] if plain else f"{type(error).__name__}: {first[:300]}"


# ---- what a file is


def foreign(head: bytes) -> tuple[str, str] | None:
    """(what a file is that begins so, the remedy), for what is often found in a downloaded file's place."""
    start = head[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself", "run `git lfs pull` there, or download the file"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return (
            "a saved web page",
            "download the file itself: the address of a page has /blob/ where its file's has /resolve/",
        )
    if head.startswith(b"GGUF"):
        return "a GGUF file, quantised for inference", "give the released safetensors files"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"Rar!")):
        return "a compressed archive", "unpack it, and give what is in it"
    if head and not head.strip(b"\0"):
        return "empty: its beginning is zeros", "the download did not end; " + AGAIN
    return None


def beginning(path: Path, count: int = 512) -> bytes:
    """Raises UserError for what is no file or cannot be opened."""
    refuse_absent(path)
    with as_user_error(path, "cannot be read", "look at its rights, and at the disk"), path.open("rb") as file:
        return file.read(count)


def absent(path: Path) -> str:
    """Why there is no file at `path`, with the remedy."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which is not there; {AGAIN}, or copy what the link names"
    if path.is_dir():
        return "is a folder, not a file"
    return (
        "is no regular file" if path.exists() else "is missing (No such file); look at its path, or download it again"
    )


def refuse_absent(path: Path) -> None:
    """Raises UserError for what is something else than a file."""
    if not path.is_file():
        raise UserError(str(path), absent(path))


def refuse_foreign(path: Path, expected: str, remedy: str = AGAIN) -> None:
    """Raises UserError if the file is empty, or plainly something else than `expected`."""
    head = beginning(path)
    if not head:
        raise UserError(str(path), f"is empty, not {expected}; {remedy}")
    if known := foreign(head):
        raise UserError(str(path), f"is {known[0]}; expected {expected}; {known[1]}")


def few(items: Sequence[str], most: int = 8) -> list[str]:
    """The first of them, and a count of the others."""
    more = len(items) - most
    return [*items[:most], f"and {more:,} more"] if more > 1 else list(items)


def grouped(problems: Iterable[tuple[str, str]]) -> list[str]:
    """(what, its rule) each, or ("", all of it): one line for each rule, with the first that breaks it."""
    by_rule: dict[str, list[str]] = {}
    for what, rule in problems:
        by_rule.setdefault(rule, []).append(what)
    return [
        f"{whats[0]}{f' (and {len(whats) - 1:,} more)' if len(whats) > 1 else ''} {rule}".lstrip()
        for rule, whats in by_rule.items()
    ]


def brief(value: Any, most: int = 120) -> str:
    """A value as Python writes it, cut to `most` characters."""
    text = repr(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}…"


def bare_name(name: Any) -> str:
    """A file's name as another file gives it. Raises ValueError for what could lead out of the folder."""
    plain = isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name)
    if not plain or name in ("", ".", "..") or len(name.encode()) > MOST_NAME_BYTES:
        raise ValueError(f"{str(name)[:80]!r} is no name of a file in this folder")
    return name


# ---- JSON


def json_value(data: bytes, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Raises ValueError for what is not JSON, too large, or nested too deeply."""
    if len(data) > most_bytes:
        raise ValueError(f"more than {most_bytes:,} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if data.count(b"[") + data.count(b"{") > DEPTH and _is_deep(value):
        raise ValueError("nested too deeply")
    return value


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, dict | list)]
    return bool(level)


def read_json(path: Path, remedy: str = AGAIN, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Raises UserError for a file that is not there, or holds something else."""
    refuse_foreign(path, "JSON", remedy)
    data = beginning(path, most_bytes + 1)
    try:
        return json_value(data, most_bytes)
    except ValueError as broken:
        raise UserError(str(path), f"is not JSON ({reason_of(broken)}); {remedy}") from broken


def read_table(path: Path, remedy: str = AGAIN, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """What `read_json` gives, of a file that must hold a JSON object."""
    table = read_json(path, remedy, most_bytes)
    if not isinstance(table, dict):
        raise UserError(str(path), f"is no table of settings; {remedy}")
    return table


# ---- fields of a table


@dataclass(frozen=True)
class Kind:
    """What a field may be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    words: str

    def many(self, count: int | None = None) -> Kind:
        """A list of it, of any length or of that one."""
        words = f"a list of {'' if count is None else f'{count:,} '}entries, each {self.words}"
        return Kind(
            lambda value: isinstance(value, list) and count in (None, len(value)) and all(map(self.holds, value)), words
        )

    def or_none(self) -> Kind:
        return Kind(lambda value: value is None or self.holds(value), f"{self.words}, or null")


WHOLE = Kind(lambda value: type(value) is int and 0 <= value < 2**62, "a whole number from 0")
NUMBER = Kind(lambda value: type(value) in (int, float) and abs(value) < 1e300, "a number")  # finite, and no NaN
REAL = Kind(lambda value: type(value) is float or NUMBER.holds(value), "a number")  # NaN and infinity, too
TEXT = Kind(lambda value: isinstance(value, str), "text")


def require_fields(table: Mapping[str, Any], kinds: Mapping[str, Kind], where: str | Path, remedy: str) -> None:
    """Raises UserError that names every field of `kinds` which is missing or of another kind."""
    problems = [f"has no {name}; expected {kind.words}; {remedy}" for name, kind in kinds.items() if name not in table]
    problems += [
        f"{name} is {brief(table[name])}; expected {kind.words}; {remedy}"
        for name, kind in kinds.items()
        if name in table and not kind.holds(table[name])
    ]
    refuse(str(where), problems)


# ---- YAML


class _Bounded(yaml.BaseLoader):
    """No aliases, which can stand for more than memory holds; nothing deep; no key twice. Every scalar stays text."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"*{self.peek_event().anchor} stands for another value; write that value out")
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.YAMLError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        if any(not isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise yaml.YAMLError("a name before a colon is one word")
        counts = Counter(key.value for key, _ in node.value)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice[:8])} written more than once")
        return super().construct_mapping(node, deep=deep)


class _Typed(_Bounded, yaml.SafeLoader):
    """Scalars become numbers, truths and dates."""

    def construct_scalar(self, node):
        if node.tag in NUMBERS and len(node.value) > MOST_DIGITS:
            raise yaml.YAMLError(f"a number of {len(node.value)} digits")
        return super().construct_scalar(node)


NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
MOST_DIGITS = 40  # of a number; PyYAML takes minutes for long ones


def read_yaml(path: Path, what: str, *, typed: bool) -> dict[str, Any]:
    """A file of lines `name: value`; empty is a table too. Scalars stay text unless `typed`.

    what: "a recipe". Raises UserError for a file that is not there, is no such table, or uses anchors.
    """
    data = beginning(path, MOST_YAML_BYTES + 1)
    if known := foreign(data):
        raise UserError(str(path), f"is {known[0]}; expected {what} in YAML; {known[1]}")
    if len(data) > MOST_YAML_BYTES:
        raise UserError(str(path), f"has more than {MOST_YAML_BYTES:,} bytes; {what} has a few thousand")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8"
        raise UserError(str(path), f"cannot be read as {what} ({where}); save the file as UTF-8") from None
    with as_user_error(path, f"cannot be read as {what}", "mend it, as the files in recipes/ are written"):
        tree = yaml.load(text, Loader=_Typed if typed else _Bounded)
    if not isinstance(tree, dict | None):
        raise UserError(str(path), f"{what} is lines of `name: value`, as the files in recipes/ are")
    return tree or {}
