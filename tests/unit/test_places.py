"""Relative paths that are not there are told with the place that was looked at."""

import pytest

from reeltune import cli, compat
from reeltune.config.parse import build
from reeltune.config.places import places_told
from reeltune.config.text_rules import PATHS
from reeltune.core.errors import UserError
from reeltune.estimate.machines import Machines
from reeltune.page import planned

BESIDE = {  # what a setting needs
    "adapter_path": {"rank": 4},
    "cache_folder": {"cache_variants": 1},
    "other_expert_path": {"expert": "high"},
    "validation_paths": {"validation_prompts": ["a"]},
    "validation_control_from": {"validation_prompts": ["a"], "control_kind": "canny"},
}
LOOKED = "is looked up from the working folder, as"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(where: str, *lines: str, **settings: object) -> list[str]:
    with pytest.raises(UserError) as error, places_told(build(settings)):
        raise UserError(where, list(lines))
    assert error.value.where == where
    return error.value.problems


@pytest.mark.parametrize("name", [name for name in PATHS if name != "output_dir"])
def test_each_path_that_is_not_there_is_told_with_its_place(name, here):
    settings = {**BESIDE.get(name, {}), name: "no/where"}
    line = f"{name} is 'no/where', which is not there"
    assert told("recipe", "a", line, line, **settings) == ["a", f"{line}; no/where {LOOKED} {here / 'no/where'}", line]
    whole = str(here / "no/where")
    assert told("recipe", f"{whole} is not there", **{**settings, name: whole}) == [f"{whole} is not there"]
    (here / "no").mkdir()
    (here / "no/where").touch()
    assert told("recipe", line, **settings) == [line]


@pytest.mark.parametrize(
    ("where", "line", "is_told"),
    [
        ("no/where", "is missing", True),
        ("no/where/config.json", "is missing", True),
        ("recipe", "./no/where is missing", True),
        ("recipe", "no/where.txt is missing", False),
        ("recipe", "/else/no/where is missing", False),
        ("recipe", "{here}/no/where/a is missing, and no/where too", False),
        ("recipe", "seed is -1", False),
    ],
)
def test_only_what_names_the_path_is(where, line, is_told, here):
    line = line.format(here=here)
    (said,) = told(where, line, transformer_path="no/where")
    assert said == (f"{line}; no/where {LOOKED} {here / 'no/where'}" if is_told else line)


@pytest.mark.parametrize(
    ("where", "line", "is_told"),
    [
        ("data", "is missing", True),
        ("data/a.json", "is missing", True),
        ("recipe", "data is missing", True),
        ("recipe", "train_data_dir is data, which is missing", True),
        ("recipe", "'data' is missing", True),
        ("recipe", "of data/a.json there is none", True),
        ("memory", "the device is full in reading data of step 3", False),
        ("recipe", "this is data of another run", False),
    ],
)
def test_a_path_of_one_word_is_told_from_a_word(where, line, is_told, here):
    (said,) = told(where, line, train_data_dir="data")
    assert said == (f"{line}; data {LOOKED} {here / 'data'}" if is_told else line)


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-1", "checkpoint-2"])
def test_what_is_meant_in_another_way_is_not(wanted, here):
    (here / "out/checkpoint-1").mkdir(parents=True)
    settings = {"resume_from_checkpoint": wanted, "output_dir": "out"}
    assert told("resume", f"{wanted} is damaged, and anew too", **settings) == [f"{wanted} is damaged, and anew too"]
    assert told("resume", "anew is full", output_dir="anew") == ["anew is full"]


MODEL = ["--pretrained_model_name_or_path", "no/where"]
DATA = ["--train_data_dir", "d", "--train_data_meta", "d/a.json"]
COMMANDS = {
    "train": [*MODEL, *DATA],
    "check": [*MODEL, *DATA],
    "plan": [*MODEL, *DATA],
    "cache": [*MODEL, *DATA, "--cache_folder", "c", "--cache_variants", "1"],
    "cache verify": [*MODEL, *DATA, "--cache_folder", "c", "--cache_variants", "1"],
    "cache prune": [*MODEL, *DATA, "--cache_folder", "c", "--cache_variants", "1"],
    "sample": [*MODEL, "--validation_prompts", "a"],
    "scripts/wan2.1/train.py": [*MODEL, *DATA],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_a_recipe_tells_it_once(command, here, capfd):
    if command.startswith("scripts/"):
        assert compat.train(command.removeprefix("scripts/"), COMMANDS[command]) == 2
    else:
        assert cli.main([*command.split(), *COMMANDS[command]]) == 2
    name = "c" if command == "cache prune" else "no/where"  # which looks for the cache first
    error = capfd.readouterr().err
    assert error.count(f"; {name} {LOOKED} {here / name}\n") == error.count(str(here)) == 1


def test_the_page_tells_it_too(here):
    recipe = build({"pretrained_model_name_or_path": "no/where", "train_data_dir": "d", "train_data_meta": "d/a.json"})
    with pytest.raises(UserError) as error:
        planned.told(recipe, Machines(), here / "store")
    assert str(error.value).endswith(f"; no/where {LOOKED} {here / 'no/where'}")
