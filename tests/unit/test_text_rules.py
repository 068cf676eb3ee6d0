"""Texts of a recipe: patterns, captions and paths."""

import re
from argparse import ArgumentTypeError

import pytest

from reeltune.config.parse import build, settings
from reeltune.config.text_rules import PATHS, PATTERNS
from reeltune.core.errors import UserError
from reeltune.core.options import a_path


def problems(tree, **how):
    with pytest.raises(UserError) as told:
        build(tree, **how)
    return told.value.problems


def test_letters_that_no_name_and_no_caption_can_have():
    """YAML's escapes write them, and a terminal of another encoding."""
    nul = "has a letter NUL, which no file's name and no caption can hold; leave it out"
    half = "which is not UTF-8, as weights' paths and captions are; rename it"
    assert problems({"transformer_path": "a\0", "validation_prompts": ["a", "\0"]}) == [
        f"transformer_path {nul}",
        f"validation_prompts {nul}",
    ]
    assert problems({"output_dir": "caf\udce9"}) == [f"output_dir is 'caf\\udce9', {half}"]  # as Python has byte E9
    assert problems({"negative_prompt": "\udce9"}) == [f"negative_prompt is '\\udce9', {half}"]
    assert problems({"train_data_dir": "\ud800"}) == [f"train_data_dir is '\\ud800', {half}"]
    assert build({"train_data_dir": "caf\udce9"}).data.train_data_dir == "caf\udce9"


@pytest.mark.parametrize(
    ("path", "word"),
    [("~/a", "~"), ("~you/a", "~you"), ("$HOME/a", "$HOME"), ("/data/${USER}/a", "${USER}"), ("a/$b", "$b")],
)
def test_what_only_a_shell_replaces_is_no_folder(path, word):
    """A folder of that name would be made in the working folder; bash leaves ~ alone in --output_dir=~/a."""
    rule = f"is {path}, in which only a shell replaces {word}; write that folder out"
    assert problems({"output_dir": path, "cache_folder": path, "cache_variants": 1}) == [
        f"{name} {rule}" for name in ("cache_folder", "output_dir")
    ]
    assert problems({"validation_prompts": ["a"], "validation_paths": [path]}) == [f"validation_paths {rule}"]
    with pytest.raises(ArgumentTypeError, match=re.escape(f"in which only a shell replaces {word}")):
        a_path(path)


def test_names_with_such_letters_are_paths():
    for path in ("a~b", "a/~b", "a~/b", "cost_$5/a", "a$b/c"):
        assert str(a_path(build({"output_dir": path}).output.output_dir)) == path


def test_a_tilde_is_yaml_s_null():
    assert build({"cache_folder": "~"}).cache.cache_folder is None


def test_every_path_is_looked_at():
    said = {name for name in settings() if name.endswith(("_path", "_dir", "_meta", "_folder", "_paths", "_from"))}
    assert said - set(PATHS) == {"allow_outside_paths"}


def test_empty_words_are_no_patterns_and_no_folder():
    """A pattern that is part of every name would take or skip all; an empty path is the folder of the command."""
    for name in PATTERNS:
        assert problems({name: ["ffn", ""], **({} if name.startswith("trainable") else {"rank": 4})}) == [
            f"{name} has an empty word, which is part of every name; leave it out, or write . for all"
        ]
    assert problems({"train_data_dir": ""}, required=["train_data_dir"]) == [
        "train_data_dir is empty, as is a variable that the shell has not set; it has no default, so give it; where "
        "the list has absolute paths, / is it"
    ]
    for name in ("validation_paths", "validation_control_from"):
        given = {"validation_prompts": ["a", "b"], "control_kind": "canny", name: ["a.mp4", ""]}
        assert problems(given) == [
            f"{name} has an empty word, as is a variable that the shell has not set; give paths alone"
        ]
    assert problems({"output_dir": " "}) == [
        "output_dir is empty; it must be a folder, and . is this one; give one, or leave it out"
    ]
