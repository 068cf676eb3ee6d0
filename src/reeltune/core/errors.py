"""One exception for everything a user can mend. It says what is wrong, the rule, and the remedy.  (no torch)"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from reeltune.core.shown import printable

MOST_LETTERS = 4000  # of a problem, which may hold what a file holds


class UserError(Exception):
    """A bad recipe, file or flag. The command line prints it without a traceback and exits with 2.

    Raise it once with every problem found, never once per run.
    """

    def __init__(self, where: str, problems: Sequence[str] | str):
        self.where = printable(where)
        told = map(printable, [problems] if isinstance(problems, str) else problems)
        self.problems = [line if len(line) <= MOST_LETTERS else f"{line[:MOST_LETTERS]}…" for line in told]
        count = len(self.problems)
        head = f"{self.where}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self):  # from a worker process to the one it works for
        return UserError, (self.where, self.problems)


OUT_OF_MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory"),
    "Unable to allocate",  # numpy's, as torch's DataLoader passes it on from a worker
)


def lacks_memory(error: BaseException) -> bool:
    """Whether the host or the device has too little: Python and torch have an error for that, torch's allocator on the
    CPU and the libraries in Rust only words (torch 2.9's, safetensors 0.6's, and the system's own)."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def refuse(where: str, problems: Sequence[str]) -> None:
    """Raise UserError if there is any problem."""
    if problems:
        raise UserError(where, problems)


def first_words(error: BaseException) -> str:
    """Of what the system or a library says of it, the first sentence, in a line."""
    return (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0][:200]


@contextmanager
def named_by(setting: str, path: str) -> Iterator[None]:
    """Within, what is wrong with a file is told of the recipe's setting that names it."""
    try:
        yield
    except UserError as error:
        inside = "" if error.where == path or "/" not in error.where else f"{error.where}: "
        raise UserError("recipe", [f"{setting} is {path!r}: {inside}{line}" for line in error.problems]) from error


@contextmanager
def together(where: str) -> Iterator[Callable[..., Any]]:
    """Gives `attempt(f, *args)`: f(*args), or None where it raised UserError. At the end all problems are raised, each
    once."""
    problems: list[str] = []

    def attempt(act: Callable[..., Any], *args: Any) -> Any:
        try:
            return act(*args)
        except UserError as error:
            problems.extend(error.problems)

    yield attempt
    refuse(where, list(dict.fromkeys(problems)))
