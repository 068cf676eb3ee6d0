"""What is wrong with the words behind a command that no recipe has is told as all else is: no usage, no exit of
argparse's."""

import pytest

from reeltune import cli, compat
from reeltune.core.options import Options, tell_repeated

EXPORT = ["export", "checkpoint-1", "out"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["export"], "the following arguments are required: checkpoint, out; reeltune export --help tells"),
        (
            [*EXPORT, "--dtype", "bf17"],
            "--dtype is 'bf17'; expected one of as_stored, bf16, fp16, fp32: is bf16 meant?",
        ),
        ([*EXPORT, "--max_shard_size", "5gb"], "--max_shard_size is '5gb'; expected a size, as 500MB or 5GB"),
        ([*EXPORT, "--max_shard_size", "0GB"], "--max_shard_size is '0GB'; expected a size"),
        ([*EXPORT, "--diffuser"], "--diffuser is no flag of reeltune export; the nearest is --diffusers"),
        ([*EXPORT, "--quick", "3"], "--quick is no flag of reeltune export; reeltune export --help lists all"),
        ([*EXPORT, "third"], "'third' is a word too many"),
        ([*EXPORT, "--for"], "--for expected one argument"),
        (["import", "a.safetensors", "--alpha", "nan"], "--alpha is 'nan'; expected a number"),
        (["control", "list.json"], "the following arguments are required: --kind"),
        (["control", "list.json", "--kind", "canny", "--workers", "x"], "--workers is 'x'; expected a whole number"),
        (
            ["control", "verfy", "a.json", "--kind", "canny"],
            "verfy is no list; the nearest of what reeltune control does",
        ),
        (["control", "a.json", "--kind", "canny", "--out", ""], "--out is empty; expected a path"),
        (["control", "a.json", "--kind", "canny", "--out", "~/b.json"], "in which only a shell replaces ~"),
        (
            ["control", "a.json", "--kind", "hed", "--out", "b.json", "--detector", ""],
            "--detector  is empty; expected a path",
        ),
        (
            ["control", "a.json", "--kind", "hed", "--out", "b.json", "--detector", "hed=$M"],
            "in which only a shell replaces $M",
        ),
        (
            ["control", "a.json", "--kind", "hed", "--out", "b.json", "--detector", "x", "--device", ""],
            "--device is empty",
        ),
        ([*EXPORT, "--pretrained_model_name_or_path", ""], "--pretrained_model_name_or_path is empty; expected a path"),
        ([*EXPORT, "--trigger_words", "\udcff"], "--trigger_words is '\\udcff', which is not UTF-8"),
        (
            [*EXPORT, "--pretrained_model_name_or_path", "/nope"],
            "is '/nope', which is no folder; give that of the model",
        ),
        (["import", "a", "--pretrained_model_name_or_path", "/nope"], "which is no folder; give that of the model"),
        (["import", "a", "--pretrained_model_name_or_path", "~/m"], "in which only a shell replaces ~"),
        (["serve", "--port", "80.5"], "--port is '80.5'; expected a whole number"),
        (["serve", "--open=yes"], "--open ignored explicit argument 'yes'"),
        (["demo", "--family", "wann_fun"], "toy: is wan_fun meant?"),
        (["report", "a", "b"], "'b' is a word too many"),
        (["rank", "checkpoint-1", "--ranks", "4;8"], "--ranks is '4;8'; expected whole numbers"),
        (["sample", "--strengths", "inf"], "--strengths is 'inf'; expected a number"),
        (["plan", "--gpus", "two"], "--gpus is 'two'; expected a whole number"),
    ],
)
def test_every_command_tells_it_in_words(argv, words, capsys):
    assert cli.main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"{argv[0]}: 1 problem\n  - ") and words in told and "usage" not in told


def test_the_original_tools_script_too(capsys):
    assert compat.zero_to_bf16(["checkpoint-1"]) == 2
    assert "required: output_dir; zero_to_bf16.py --help tells what it takes" in capsys.readouterr().err


def test_help_still_ends_well(capsys):
    with pytest.raises(SystemExit) as ended:
        Options("reeltune export", "Writes.").read(["--help"])
    assert ended.value.code == 0 and "Writes." in capsys.readouterr().out


def test_a_flag_that_is_given_again_is_told_of(caplog):
    tell_repeated(
        ["--a", "1", "--b", "--a=2", "--b", "--c", "x", "y", "--c", "x", "y", "--d=1", "--d=2"], ("--a", "--b", "--c")
    )
    assert caplog.messages == ["--a is given with 2 values; the last counts"]
    cli.recipe_of(["--seed", "1", "--seed=2", *(f"--{name}=x" for name in cli.REQUIRED["train"])], "train")
    assert caplog.messages[1:] == ["--seed is given with 2 values; the last counts"]
