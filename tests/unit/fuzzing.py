"""Files as accidents and strangers leave them, each a function of its number alone, and how an answer is judged."""

import json
import os
import time
from random import Random

from reeltune.core.errors import UserError
from tests.unit.test_reading import BROKEN_JSON

TRIES = int(os.environ.get("REELTUNE_FUZZ", "150"))
LIMIT_S = 2
HOSTILE = (  # values in any place of a JSON file
    None, True, -1, 0, 1.5, 10**9, 10**30, -(10**30), float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "\0",
    "\x1b[2J", "\ud800", "=cmd()", "x" * 5000, "..", "C:\\x", "é\u0301\u202e", "\u2028", " ", "1", "nan",
    [], {}, [1], ["a"], {"a": 1}, [[[[[[1]]]]]], [0] * 1000,
)  # fmt: skip
PIECES = (
    b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\", b"\n", b"\0", b"\xff", b"*a", b"&a ", b"- ", b"? ", b"!!int ",
    b"1e999", b"NaN", b"-Infinity", b"\r\n", b"\r", b'"step": -4, "cursor": 9999,', b"\\ud800", b"\\u0000", b"\xfe\xff",
    b"\xc3", b"\x1b]0;x\x07", b"a: &a [*a]", b"<<: *a", b"!!python/object/apply:os.system [x]",
    b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"<html>", b"version https://git-lfs", b"\xef\xbb\xbf",
)  # fmt: skip


def changed(value, random: Random):
    """The same JSON value with one place in it made hostile, removed or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        name = random.choice(list(value))
        match random.randrange(8):
            case 0:
                return {key: entry for key, entry in value.items() if key != name}
            case 1:
                return {**value, random.choice(["", "x", "a/b", "\x1b", "x" * 3000]): random.choice(HOSTILE)}
            case _:
                return {**value, name: changed(value[name], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        place = random.randrange(len(value))
        return [*value[:place], changed(value[place], random), *value[place + 1 :]]
    return random.choice(HOSTILE)


def spoilt(data: bytes, random: Random, longest: int = 2**20) -> bytes:
    """The same file after up to four accidents. longest: bytes of a piece that comes into it."""
    for _ in range(random.randint(1, 4)):
        place = random.randint(0, len(data))
        match random.randrange(6):
            case 0:
                data = data[:place]
            case 1:
                data = data[:place] + random.choice(PIECES)[:longest] + data[place:]
            case 2:
                data = data[:place] + random.choice(PIECES)[:longest] + data[place + random.randint(1, 9) :]
            case 3:
                data = data[:place] + bytes([random.randrange(256)]) + data[place + 1 :]
            case 4:
                data = data[:place] + data[random.randint(0, len(data)) :]
            case 5:
                data = data + data[place:]
    return data[: 2**20]


def broken(sound, known, random: Random) -> bytes:
    """sound: JSON values. known: files that are broken already."""
    if known and random.random() < 0.1:
        data = random.choice(known)
    else:
        value = random.choice(sound)
        for _ in range(random.randint(1, 3)):
            value = changed(value, random)
        data = json.dumps(value).encode()
    return spoilt(data, random) if random.random() < 0.4 else data


def tried(act, what):
    """act(), whose only error may be UserError. Returns whether it gave one."""
    began = time.process_time()
    try:
        act()
        refused = False
    except UserError as error:
        refused = True
        assert error.problems and str(error).replace("\n", "").isprintable(), what
        assert all(len(line) < 5000 for line in error.problems), what
    assert time.process_time() - began < LIMIT_S, what
    return refused


KNOWN_JSON = [content for content, _ in BROKEN_JSON.values()]


def inputs_of(cases, pattern) -> list[bytes]:
    """Of the inputs that were once answered wrongly."""
    return [] if cases is None else [path.read_bytes() for path in sorted(cases.glob(pattern))]
