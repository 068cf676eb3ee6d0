"""A run's recipe means the folder that it lies in."""

import pytest

from reeltune import cli
from reeltune.core.errors import UserError


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run that was begun here with --output_dir runs/first."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/first"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    needed = "pretrained_model_name_or_path: a\ntrain_data_dir: b\ntrain_data_meta: c\n"
    (folder / "recipe.yaml").write_text(needed + "output_dir: runs/first\n")
    return folder


def output_dir(*argv):
    return cli.recipe_of([str(word) for word in argv], "train").output.output_dir


def test_where_it_was_begun(run):
    assert output_dir("runs/first/recipe.yaml") == "runs/first"


def test_after_a_move_and_from_another_working_directory(run, tmp_path, monkeypatch):
    moved = run.rename(tmp_path / "runs/second")
    assert output_dir("runs/second/recipe.yaml") == "runs/second"
    monkeypatch.chdir(moved)
    assert output_dir("recipe.yaml") == "."


def test_a_flag_wins(run, tmp_path):
    run.rename(tmp_path / "runs/second")
    assert output_dir("runs/second/recipe.yaml", "--output_dir", "runs/third") == "runs/third"


def test_a_copy_beside_the_first_is_asked_about(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("run.json", "recipe.yaml"):
        (copy / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UserError, match="say which is meant with --output_dir"):
        output_dir(copy / "recipe.yaml")


def test_a_recipe_that_no_run_has_written_is_taken_at_its_word(run):
    (run / "run.json").unlink()
    (run / "recipe.yaml").rename(run.parent / "mine.yaml")
    assert output_dir("runs/mine.yaml") == "runs/first"
