"""The words behind a command that no recipe has: argparse, whose complaints are our errors.  (no torch)"""

from __future__ import annotations

import argparse
import difflib
import logging
import math
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NoReturn

from reeltune.core.errors import UserError, refuse
from reeltune.core.files import is_utf8, shell_word
from reeltune.core.near import nearest

notices = logging.getLogger(__name__)  # without a handler, Python prints its warnings bare on stderr


class Options(argparse.ArgumentParser):
    """A command's own options. prog: as the user calls it. What is wrong with the words is a UserError; --help still
    prints and ends."""

    def __init__(self, prog: str, description: str = "", **settings: Any):
        self.flags: list[str] = []
        super().__init__(prog, description=description, allow_abbrev=False, exit_on_error=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        self.flags += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **settings)

    def print_help(self, file: Any = None) -> None:
        """argparse passes over what cannot be written."""
        print(self.format_help(), end="", file=file, flush=True)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Raises UserError, also for words that belong to no option."""
        options, rest = self.read_known(argv)
        refuse(self._where, self._unknown(rest))
        return options

    def read_known(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the words that belong to none. Raises UserError."""
        tell_repeated(argv or (), self.flags)
        try:
            return self.parse_known_args(argv)
        except argparse.ArgumentError as wrong:
            self.error(f"{wrong.argument_name} {wrong.message}" if wrong.argument_name else wrong.message)

    def error(self, message: str) -> NoReturn:
        raise UserError(self._where, f"{message}; {self.prog} --help tells what it takes")

    @property
    def _where(self) -> str:
        return self.prog.rpartition(" ")[2]

    def _unknown(self, rest: Sequence[str]) -> list[str]:
        """What is wrong with words that belong to no option: of flags alone, where there are any, as a word behind one
        may be its value."""
        flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
        listed = f"; {self.prog} --help lists all"
        return [f"{flag} is no flag of {self.prog}{nearest(flag, self.flags, listed)}" for flag in flags] or [
            f"{word!r} is a word too many; {self.prog} --help tells what it takes" for word in rest
        ]


def tell_repeated(argv: Sequence[str], flags: Container[str]) -> None:
    """Says of each of these flags that is given again with other words that the last counts."""
    given: dict[str, set[str]] = {}
    flag, words = "", []
    for word in [*argv, "--"]:
        if not word.startswith("--"):
            words.append(word)
            continue
        given.setdefault(flag, set()).add(" ".join(words))
        flag, equals, value = word.partition("=")
        words = [value] if equals else []
    for flag, values in given.items():
        if flag in flags and len(values) > 1:
            notices.warning("%s is given with %d values; the last counts", flag, len(values))


# ---- types, for add_argument


def a_path(text: str) -> Path:
    """A path of a flag. Empty is a variable that a shell had not set, and would be this folder: it is refused."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; expected a path, and . is this folder")
    if word := shell_word(text):
        raise argparse.ArgumentTypeError(f"is {text!r}, in which only a shell replaces {word}; write that folder out")
    return Path(text)


def utf8_path(text: str) -> Path:
    """safetensors takes names in UTF-8 alone."""
    if not is_utf8(text):
        raise argparse.ArgumentTypeError(f"is {text!a}, which is not UTF-8, as paths of weights are")
    return a_path(text)


def model_path(text: str) -> str:
    """A model's folder in a flag, as a recipe has it: text."""
    return str(utf8_path(text))


def utf8_text(text: str) -> str:
    """Words of a flag that are written into files whose text is UTF-8: others are refused."""
    if not is_utf8(text):
        raise argparse.ArgumentTypeError(f"is {text!a}, which is not UTF-8, as text in such files is")
    return text


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected a whole number") from None


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected whole numbers, as 4,8,16") from None


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"is {text!r}; expected a number")
    return value


def one_of(words: Sequence[str]) -> Callable[[str], str]:
    def word(text: str) -> str:
        if text in words:
            return text
        close = difflib.get_close_matches(text, words, 1)
        hint = f": is {close[0]} meant?" if close else ""
        raise argparse.ArgumentTypeError(f"is {text!r}; expected one of {', '.join(words)}{hint}")

    return word
