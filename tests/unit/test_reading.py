"""Other people's files: a value or one UserError that says what the file is, in bounded time; and what is shown."""

import json
import os
import time

import pytest

from reeltune.config.parse import build
from reeltune.core.errors import UserError
from reeltune.core.reading import (
    DEPTH,
    MOST_YAML_BYTES,
    as_user_error,
    bare_name,
    brief,
    few,
    grouped,
    json_value,
    read_json,
    read_table,
    read_yaml,
)
from reeltune.core.shown import cell, printable

BROKEN_JSON = {
    "empty": (b"", "is empty"),
    "half": (b'{"a": [1, 2', "is not JSON"),
    "deep list": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "deep table": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "just too deep": (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "nested too deeply"),
    "no UTF-8": (b'{"a": "\xff"}', "is not JSON"),
    "long number": (b"1" * 5000, "is not JSON"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>401</html>", "is a saved web page.*/resolve/"),
    "archive": (b"\x1f\x8b\x08\x00", "is a compressed archive; expected JSON; unpack it"),
    "zeros": (bytes(4096), "its beginning is zeros; expected JSON; the download did not end"),
}


@pytest.mark.parametrize("name", BROKEN_JSON)
def test_what_is_no_json_is_said(name, tmp_path):
    content, words = BROKEN_JSON[name]
    (tmp_path / "config.json").write_bytes(content)
    began = time.process_time()
    with pytest.raises(UserError, match=words) as told:
        read_json(tmp_path / "config.json")
    assert told.value.where == str(tmp_path / "config.json") and len(told.value.problems) == 1
    assert time.process_time() - began < 20


def test_json_is_read_up_to_its_bounds(tmp_path):
    deep = "[" * DEPTH + "]" * DEPTH
    (tmp_path / "a.json").write_text(f'{{"deep": {deep[1:-1]}, "é": 1e3}}', encoding="utf-8")
    assert read_table(tmp_path / "a.json")["é"] == 1000.0
    assert json_value(b"[1, 2]", most_bytes=6) == [1, 2]
    with pytest.raises(ValueError, match="more than 5 bytes"):
        json_value(b"[1, 2]", most_bytes=5)
    wide = [[i] for i in range(1000)]
    assert json_value(json.dumps(wide).encode()) == wide
    mixed = json.dumps([1, "a", {"b": [[]] * 100}]).encode()
    assert json_value(mixed)[2] == {"b": [[]] * 100}
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="is no table of settings"):
        read_table(tmp_path / "list.json")


def test_depth_is_seen_behind_a_number():
    """Where a list begins with a number, what lies deep behind it counts all the same."""
    value = "[1, " * (DEPTH + 1) + "2" + "]" * (DEPTH + 1)
    with pytest.raises(ValueError, match="nested too deeply"):
        json_value(value.encode())
    with pytest.raises(ValueError, match="nested too deeply"):
        json_value(f'{{"first": 1, "then": {value}}}'.encode())


def test_odd_places_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    for name, words in (
        ("pipe", "is no regular file"),
        ("link", "is a link to gone, which is not there"),
        ("absent", "is missing"),
        (".", "is a folder"),
    ):
        with pytest.raises(UserError, match=words):
            read_json(tmp_path / name)
    with pytest.raises(UserError, match="is no regular file"):
        read_yaml(tmp_path / "pipe", "a recipe", typed=False)


BROKEN_YAML = {
    "aliases": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", r"\*a stands for another value; write that value out"),
    "deep": ("a: " + "[" * 40_000, "nested too deeply"),
    "deep maps": ("{a: " * 20_000, "nested too deeply"),
    "dashes": ("- " * 40_000, "nested too deeply"),
    "twice": ("seed: 1\nseed: 2\n", "seed written more than once"),
    "list as name": ("? [a, b]\n: c\n", "a name before a colon is one word"),
    "large": ("#" * (MOST_YAML_BYTES + 1), "more than 100,000 bytes"),
    "list": ("- a\n", "lines of `name: value`"),
    "no UTF-8": (b"a: \xff", "cannot be read as a recipe"),
    "NUL": (b"a: \0", "cannot be read as a recipe"),
    "web page": (b"<!doctype html>", "is a saved web page"),
}


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("name", BROKEN_YAML)
def test_yaml_that_is_no_table_or_would_explode(name, typed, tmp_path):
    content, words = BROKEN_YAML[name]
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.process_time()
    with pytest.raises(UserError, match=words):
        read_yaml(tmp_path / "a.yaml", "a recipe", typed=typed)
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "value", ["!!int ''", "!!timestamp x", "!!python/object:os.x {}", "1:" * 9000 + "1", "9" * 5000]
)
def test_typed_scalars_that_yaml_trips_over(value, tmp_path):
    (tmp_path / "a.yaml").write_text(f"shift: {value}\n")
    began = time.process_time()
    with pytest.raises(UserError, match="cannot be read as a model"):
        read_yaml(tmp_path / "a.yaml", "a model's yaml", typed=True)
    assert time.process_time() - began < 20


def test_yaml_types_are_asked_for(tmp_path):
    (tmp_path / "a.yaml").write_text("shift: 3.0\nvae_kwargs: {vae_subpath: no}\n")
    assert read_yaml(tmp_path / "a.yaml", "a recipe", typed=True) == {
        "shift": 3.0,
        "vae_kwargs": {"vae_subpath": False},
    }
    assert read_yaml(tmp_path / "a.yaml", "a recipe", typed=False)["vae_kwargs"] == {"vae_subpath": "no"}


def test_many_unknown_settings_are_counted():
    began = time.process_time()
    with pytest.raises(UserError, match="980 more names are no settings") as told:
        build({f"word_{i}": "x" for i in range(1000)})
    assert len(told.value.problems) == 21
    with pytest.raises(UserError, match="is no setting"):
        build({"x" * 90_000: "y"})
    with pytest.raises(UserError) as told:
        build({"seed": "y" * 90_000})
    assert len(str(told.value)) < 400 and time.process_time() - began < 20


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a\\b", "/etc/passwd", "..", ".", "", "a\0b", "x" * 256, "\ud800", 5, None, ["a"]]
)
def test_names_that_could_leave_the_folder(name):
    with pytest.raises(ValueError, match="no name of a file in this folder"):
        bare_name(name)


def test_a_bare_name_stays():
    assert bare_name("model-00001-of-00002.safetensors") == "model-00001-of-00002.safetensors"


def test_a_librarys_error_becomes_the_users():
    with (
        pytest.raises(UserError, match=r"here: 1 problem\n  - is broken \(KeyError: 'a'\); mend it"),
        as_user_error("here", "is broken", "mend it"),
    ):
        {}["a"]
    for own in (UserError("there", "is said already"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(own)) as told, as_user_error("here", "is broken"):
            raise own
        assert told.value is own


def test_few_and_brief():
    assert few(["a", "b", "c"], 2) == ["a", "b", "c"]  # one more takes no more room than its count
    assert few(["a", "b", "c", "d"], 2) == ["a", "b", "and 2 more"]
    assert brief("a" * 500) == "'" + "a" * 119 + "…" and brief([1]) == "[1]"


def test_what_is_shown_obeys_no_escape():
    hostile = "blocks\x1b[2J\r\x07\u202ereversed\ud800"
    error = UserError(f"file {hostile}", [f"unexpected: {hostile}", "two\nlines"])
    assert str(error).replace("\n", "").isprintable()
    assert "blocks\\x1b[2J\\r\\x07\\u202ereversed\\ud800" in error.problems[0]
    assert error.problems[1] == "two\nlines" and printable("é 日本 🎬") == "é 日本 🎬"


@pytest.mark.parametrize("begin", ["=", "+", "-", "@"])
def test_a_cell_is_no_formula(begin):
    assert cell(f"{begin}cmd()") == f"'{begin}cmd()"
    assert cell("clips/a=b.mp4") == "clips/a=b.mp4"


def test_what_is_wrong_with_many_is_told_once():
    problems = [("a", "is 0"), ("", "has nothing"), ("b", "is 0"), ("c", "is 1"), ("d", "is 0")]
    assert grouped(problems) == ["a (and 2 more) is 0", "has nothing", "c is 1"]
