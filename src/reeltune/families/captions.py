"""Captions that are longer than an encoder reads: found with the tokenizer alone, before any weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from reeltune.core.reading import few
from reeltune.families.spec import Family, TokenLimit
from reeltune.families.tokenizers import load_tokenizer

AT_ONCE = 1000  # captions tokenised together
SPARE = 2  # tokens that a tokenizer may add to an ASCII caption beside what it makes of an empty one


def cut_captions(family: Family, captions: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each of the family's encoders that cuts captions, with the first of them and their tokens over.

    captions: (name, text), such as ("entry 4", "a cat"). Raises UserError if a tokenizer cannot be read.
    """
    lines = []
    for limit, most, found in _longer(family, captions):
        over = [f"{name} ({tokens} over)" for name, tokens in found]
        if over:
            count = "1 caption is" if len(over) == 1 else f"{len(over):,} captions are"
            reads = f"the {most} tokens that {limit.reader} reads"
            lines.append(f"{count} longer than {reads}, and cut there: {', '.join(few(over))}")
    return lines


def names_of_cut(family: Family, captions: Iterable[tuple[str, str]]) -> set[str]:
    """The names of those that an encoder of the family cuts. Raises as cut_captions."""
    return {name for _, _, found in _longer(family, captions) for name, _ in found}


def _longer(
    family: Family, captions: Iterable[tuple[str, str]]
) -> Iterator[tuple[TokenLimit, int, list[tuple[str, int]]]]:
    """(encoder's limit, tokens that it reads, (name, tokens over) of each longer caption)."""
    everything = list(captions) if family.token_limits else []
    for limit in family.token_limits:
        tokenizer = load_tokenizer(limit.tokenizer)
        most = min(limit.tokens, tokenizer.model_max_length) if limit.or_its_own else limit.tokens
        yield limit, most, list(_over(limit, tokenizer, most, everything))


def _over(limit: TokenLimit, tokenizer: Any, most: int, captions: list[tuple[str, str]]) -> Iterator[tuple[str, int]]:
    (empty,) = _counts(tokenizer, limit, [""])
    short = most - empty - SPARE  # characters of ASCII, each a token at most
    long = [(name, text) for name, text in captions if not (text.isascii() and len(text) <= short)]
    for start in range(0, len(long), AT_ONCE):
        some = long[start : start + AT_ONCE]
        counts = _counts(tokenizer, limit, [text for _, text in some])
        yield from ((name, count - most) for (name, _), count in zip(some, counts, strict=True) if count > most)


def _counts(tokenizer: Any, limit: TokenLimit, texts: list[str]) -> list[int]:
    read = limit.as_read(tokenizer, texts)
    ids = tokenizer(read, add_special_tokens=limit.special, verbose=False).input_ids
    return [len(row) for row in ids]
