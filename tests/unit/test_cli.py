"""The command line: flags in all their forms, help, exit codes, and nothing heavy before it is needed."""

import io
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import pytest

from reeltune import cli
from reeltune.config.parse import sentences, settings
from reeltune.core.errors import UserError
from reeltune.core.terminal import Terminal

ROOT = Path(__file__).parents[2]
NEEDED = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--train_data_meta=d/m.json"]


def made(*argv):
    return cli.recipe_of([*argv, *NEEDED], "train")


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--seed", "3"], 3),
        (["--seed=3"], 3),
        (["--low_vram"], True),
        (["--low_vram", "false"], False),
        (["--low_vram=True"], True),
        (["--trainable_modules", "."], (".",)),
        (["--trainable_modules", "attn", "ref_conv"], ("attn", "ref_conv")),
        (["--trainable_modules=attn"], ("attn",)),
        (["--fix_sample_size", "480", "832"], (480, 832)),
        (["--logit_mean", "-0.5"], -0.5),
        (["--negative_prompt="], ""),
        (["--transformer_path", "none"], None),
        (["--validation_prompts", "a cat, running", "--validation_paths", "a.mp4"], ("a cat, running",)),
    ],
)
def test_forms_of_flags(argv, value):
    name = argv[0][2:].partition("=")[0]
    assert getattr(getattr(made(*argv), settings()[name].section), name) == value


def test_the_recipe_file_may_stand_anywhere_but_after_a_list(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("seed: 5\nenable_bucket: true\n")
    for argv in ([str(file), "--low_vram"], ["--low_vram", str(file)], ["--lr_power", "2", str(file)]):
        recipe = made(*argv, "--enable_bucket", "false")
        assert recipe.training.seed == 5 and recipe.sizes.enable_bucket is False


def test_flags_that_are_wrong_are_told_together():
    with pytest.raises(UserError) as told:
        cli.recipe_of(["--lerning_rate", "3", "--seed", "--low_vram=2", "--train_data_dir", "d"], "train")
    assert told.value.problems == [
        "seed has no value; write --seed VALUE",
        "lerning_rate is no setting; the nearest is learning_rate",
        "low_vram is '2'; expected true or false",
        "pretrained_model_name_or_path is missing; it has no default, so give it",
        "train_data_meta is missing; it has no default, so give it",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--deterministic", "yes"], "deterministic is 'yes'; expected true or false"),
        (
            ["--gradient_checkpointing", "attention"],
            "is 'attention'; expected true or false or one of attention_kept, products_kept",
        ),
    ],
)
def test_a_word_behind_a_switch_is_its_value(argv, words):
    with pytest.raises(UserError, match=words):
        made(*argv)


def test_ranks_are_numbers_of_a_checkpoint(tmp_path, capsys):
    assert cli.main(["rank", str(tmp_path), "--ranks", "4,x"]) == 2
    assert "--ranks is '4,x'; expected whole numbers, as 4,8,16" in capsys.readouterr().err
    assert cli.main(["rank", str(tmp_path / "gone")]) == 2
    assert "gone is no folder; give a checkpoint-N folder of a run" in capsys.readouterr().err


def test_what_a_cache_is_to_do_misspelt(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["cache", "verfy", "recipe.yaml"]) == 2
    assert "verfy is no recipe; the nearest of what reeltune cache does is verify" in capsys.readouterr().err


def test_words_that_are_no_flags(tmp_path):
    (tmp_path / "r.yaml").touch()
    with pytest.raises(UserError, match="extra is neither a flag nor the recipe"):
        made(str(tmp_path / "r.yaml"), "extra")


@pytest.mark.parametrize("command", ["train", "check", "sample"])
def test_help_has_every_field_once_with_its_sentence(command, capsys):
    assert cli.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    words = " ".join(said.split())
    for name, setting in settings().items():
        assert sum(line.split()[:1] == [f"--{name}"] for line in lines) == 1
        assert " ".join(sentences()[name].split()) in words
        assert f"{setting.section}:" in lines
    assert "[0.0001]" in said and "--fix_sample_size N N" in said
    assert max(map(len, lines)) <= 120


def test_help_of_the_program(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert cli.main([]) == 0 and capsys.readouterr().out == listed
    assert all(f"\n  {command} " in listed for command in cli.COMMANDS)


def test_the_version_is_what_a_run_writes_of_itself(capsys):
    assert cli.main(["--version"]) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert told == {"python": platform.python_version()} | {name: version(name) for name in told.keys() - {"python"}}
    assert {"python", "reeltune", "torch", "transformers"} < told.keys()


def test_a_command_that_there_is_not(capsys):
    assert cli.main(["trian"]) == 2
    assert "trian is no command; the nearest is train" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"], ["train", "--seed", "x"]])
def test_answers_come_without_torch_and_numpy(argv):
    code = (
        "import sys; from reeltune.cli import main; main(sys.argv[1:]);"
        "print(*{'torch', 'numpy', 'diffusers'} & {name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines()[-1] == ""


def test_help_takes_less_than_0_3_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "reeltune", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3  # of a processor: others may run


def test_python_dash_m_is_the_same_command(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "reeltune", "train", "--seed", "x"], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("command line: 4 problems\n  - seed is 'x'; expected a whole number\n")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("command", "module", "name", "given", "code"),
    [
        ("train", "training.loop", "train", 143, 143),
        ("check", "estimate.check", "check", ["a line"], 0),
        ("sample", "sampling.clips", "sample_clips", ["a.mp4"], 0),
    ],
)
def test_commands_of_a_recipe_hand_it_on(monkeypatch, capsys, command, module, name, given, code):
    seen = []
    stand_in = types.ModuleType(f"reeltune.{module}")
    setattr(stand_in, name, lambda recipe, **options: seen.append(recipe) or given)
    monkeypatch.setitem(sys.modules, f"reeltune.{module}", stand_in)
    assert cli.main([command, *NEEDED, "--validation_prompts", "a", "--seed", "9"]) == code
    assert [recipe.training.seed for recipe in seen] == [9]
    assert capsys.readouterr().out.splitlines() == (given if isinstance(given, list) else [])


def test_a_sample_takes_the_words_of_control(monkeypatch):
    seen = []
    stand_in = types.ModuleType("reeltune.sampling.clips")
    stand_in.sample_clips = lambda recipe, **options: seen.append(recipe.validation) or []
    monkeypatch.setitem(sys.modules, "reeltune.sampling.clips", stand_in)
    words = ["--validation_prompts", "a", "--control_from", "a.mp4", "--kind=canny", "--detector", "nets"]
    assert cli.main(["sample", *NEEDED, *words]) == 0
    found = seen[0].validation_control_from, seen[0].control_kind, seen[0].control_detector
    assert found == (("a.mp4",), "canny", "nets")


def test_a_recipe_that_does_not_suit_is_named_by_its_file(monkeypatch, capsys, tmp_path):
    def refuses(recipe):
        raise UserError("recipe", "one")

    stand_in = types.ModuleType("reeltune.training.loop")
    stand_in.train = refuses
    monkeypatch.setitem(sys.modules, "reeltune.training.loop", stand_in)
    (tmp_path / "mine.yaml").write_text("seed: 1")
    assert cli.main(["train", str(tmp_path / "mine.yaml"), *NEEDED]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'mine.yaml'}: 1 problem\n  - one\n"


def failing(error):
    def act():
        raise error

    return act


def test_what_the_user_can_mend_has_no_traceback(capsys):
    assert cli.guarded(failing(UserError("recipe", ["one", "two"]))) == 2
    assert capsys.readouterr().err == "recipe: 2 problems\n  - one\n  - two\n"
    assert cli.guarded(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", b"\xe9 \\u732b"), ("ascii", b"\\xe9 \\u732b")])
def test_letters_that_a_terminal_has_not_are_written_out(encoding, shown, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.guarded(lambda: print("é 猫") or 0) == 0
    Terminal().print("é 猫")  # which notices of a run go through
    stream.flush()
    assert stream.buffer.getvalue().split(b"\n") == [shown, shown, b""]


def test_a_working_folder_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["check", "recipe.yaml"]) == 2
    assert "has been removed; cd to one that is there" in capsys.readouterr().err


def test_no_place_for_temporary_files(monkeypatch, capsys):
    """Without one, torch's libraries end in a traceback when they are read."""

    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert cli.main(["check", "recipe.yaml"]) == 2
    assert "no temporary file can be made in TMPDIR, /tmp or /var/tmp; set TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    "act",
    [lambda: print("a line") or 0, lambda: Terminal().print("a line") or 0, lambda: cli.main(["control", "--help"])],
)
def test_who_reads_may_stop_reading(act, monkeypatch):
    """As `| head` does: no traceback, not even when Python ends."""
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.guarded(act) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "argv",
    [["train"], ["check", "--seed=1"], ["report"], ["export", "a"], ["import"], ["demo"], ["serve"], ["control"]],
)
def test_a_name_that_no_file_can_have(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["control", "--kind=canny", "--out=a.json"] if argv == ["control"] else argv
    assert cli.main([*argv, "n" * 256 + ".yaml"]) == 2
    assert "File name too long" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [["report"], ["export", "a"], ["import"], ["demo"], ["serve"], ["control"]])
def test_a_variable_that_the_shell_had_not_set(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*argv, ""]) == 2
    assert "is empty; expected a path, and . is this folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name, setting in settings().items() if setting.is_text_or_none])
@pytest.mark.parametrize("words", [["--{}", ""], ["--{}="], ["--{}", " "]])
def test_a_path_that_is_empty_is_not_none(name, words):
    with pytest.raises(UserError) as told:
        made(*(word.format(name) for word in words))
    rule = "is empty, as is a variable that the shell has not set; give it, leave it out, or write none"
    assert told.value.problems == [f"{name} {rule}"]


def test_weights_under_a_name_that_is_not_utf_8(capsys):
    """safetensors reads none there."""
    for argv in (["export", "a"], ["demo"], ["rank"]):
        assert cli.main([*argv, os.fsdecode(b"caf\xe9")]) == 2
        assert "is 'caf\\udce9', which is not UTF-8, as paths of weights are" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["control", "--help"]])
def test_a_full_disk_behind_what_is_printed(argv):
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-m", "reeltune", *argv], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[1:] == [
        "  - what it prints cannot be written (No space left on device); make room there"
    ]


CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background is born without
module = sys.argv.pop(1)

class Presses:
    def find_spec(self, name, path, target=None):
        if name == module:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Presses())
"""
DOORS = {
    "reeltune": "from reeltune.__main__ import main; sys.exit(main())",
    "a script": "import runpy; sys.argv[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__')",
}


@pytest.mark.parametrize("module", ["yaml", "reeltune.config.recipe", "reeltune.estimate.check"])
@pytest.mark.parametrize("door", DOORS)
def test_ctrl_c_while_a_command_is_imported(module, door, tmp_path):
    script = [] if door == "reeltune" else [str(ROOT / "scripts/wan2.1_fun/train_control.py")]
    words = ["check", *NEEDED] if door == "reeltune" else NEEDED
    module = "reeltune.training.loop" if script and module == "reeltune.estimate.check" else module
    ran = subprocess.run(
        [sys.executable, "-c", CTRL_C + DOORS[door], module, *script, *words], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (130, "stopped by Ctrl-C\n")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 // 0)


def test_report_needs_a_run(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path)]) == 2  # as that of the data, where a page would be left
    assert "has no metrics.jsonl and no run.json and no ledger.json; give the output_dir" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
