"""The command line. A command's own module, and torch with it, is imported once its settings are found sound.

Every field of a Recipe is a flag: --name value, --name=value; a switch may stand alone; a list takes several values.
"""

from __future__ import annotations

import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from reeltune.config.flags import flags
from reeltune.config.moved import in_its_folder, recipe_beside
from reeltune.config.parse import build, read, sentences, settings
from reeltune.config.places import places_told
from reeltune.config.recipe import Recipe
from reeltune.config.rules import shown
from reeltune.core.errors import UserError
from reeltune.core.guarded import guarded
from reeltune.core.imports import lean_imports
from reeltune.core.near import nearest, refuse_near
from reeltune.core.options import Options, a_path, number, one_of, utf8_path, whole_number, whole_numbers
from reeltune.distributed.launcher_settings import adopted
from reeltune.export.command import export_lines, import_lines
from reeltune.page.command import serve

USAGE = """\
usage: reeltune COMMAND ...

Fine-tunes video diffusion transformers, and proves what it does.

  train    fine-tune a checkpoint as a recipe says
  check    scan the data and show what training would do with it; trains nothing
  plan     estimate what a run will see, what memory it needs and how long it takes, before it starts
  control  make a control for every clip of a list: edges, depth, a camera's path, poses
  cache    encode the data once, to train from files; cache verify and cache prune look after them
  sample   make clips from a checkpoint
  report   write report.html of a run's folder
  serve    a page to look at data and runs, on this machine alone
  export   turn a checkpoint-N into a folder that the original tools, or diffusers, load; an adapter into a file
  rank     measure which rank an adapter needs to do what a full fine-tune did
  import   show what an adapter file of any tool is, and how strong it would be in each tool
  demo     make a small data set and a tiny model, and fine-tune it here in a few minutes

reeltune COMMAND --help tells more; reeltune --version tells what is installed.
"""
ABOUT = {
    "train": "Fine-tunes a checkpoint; the run's folder is output_dir.",
    "check": "Scans the data and prints what is unusable and why, the sizes that will be drawn, and the steps of an "
    "epoch. Trains nothing and loads no weights.",
    "plan": "Estimates what a run will see, what it needs in memory by part, how long it takes, whether it fits and "
    "what would make it fit. Reads measurements of the data and headers of the checkpoint, no weights; needs no GPU.",
    "cache": "Encodes what the recipe trains on into cache_folder, as far as it is not there. Any number of processes "
    "share the work. With verify before the recipe: reads all of it and sets damaged files aside. With prune: deletes "
    "what this recipe does not ask for.",
    "sample": "Makes a clip for each of validation_prompts into output_dir/samples.",
}
REQUIRED = {
    "train": ("pretrained_model_name_or_path", "train_data_dir", "train_data_meta"),
    "check": ("pretrained_model_name_or_path", "train_data_dir", "train_data_meta"),
    "plan": ("pretrained_model_name_or_path", "train_data_dir", "train_data_meta"),
    "cache": ("pretrained_model_name_or_path", "train_data_dir", "train_data_meta", "cache_folder"),
    "sample": ("pretrained_model_name_or_path", "validation_prompts"),
}
SHORT = {  # in `sample`: the words of `reeltune control`
    "--control_from": "--validation_control_from",
    "--kind": "--control_kind",
    "--detector": "--control_detector",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 2 for what the user can mend, 130 after Ctrl-C."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]

    def act() -> int:
        if command in ("-h", "--help"):
            print(USAGE, end="")
            return 0
        if command in ("-V", "--version"):
            from reeltune.core.versions import with_python  # here: importlib.metadata takes a while

            print("\n".join(f"{name} {number}" for name, number in with_python().items()))
            return 0
        if command not in COMMANDS:
            raise UserError(
                "reeltune", f"{command} is no command{nearest(command, COMMANDS)}; reeltune --help lists them"
            )
        return COMMANDS[command](rest)

    return guarded(act)


# ---- commands of a recipe


def of_recipe(command: str) -> Callable[[Sequence[str]], int]:
    def act(argv: Sequence[str]) -> int:
        if {"-h", "--help"} & set(argv):
            print(recipe_help(command), end="")
            return 0
        recipe = recipe_of(argv, command)
        with _told_of(recipe, argv):
            return RUN[command](recipe)

    return act


@contextmanager
def _told_of(recipe: Recipe, argv: Sequence[str]) -> Iterator[None]:
    """Within, what is wrong with a recipe is told of its file, where it has one, and with where its paths lead."""
    try:
        with places_told(recipe):
            yield
    except UserError as error:
        if error.where == "recipe" and argv[0].endswith((".yaml", ".yml")):
            raise UserError(argv[0], error.problems) from error
        raise


def recipe_of(argv: Sequence[str], command: str) -> Recipe:
    """[RECIPE.yaml] and flags -> Recipe. Raises UserError with everything that is wrong with them."""
    files, given, problems = flags(argv)
    tree = read(files[0]) if files else {}
    if files and "output_dir" not in given:
        tree = in_its_folder(Path(files[0]), tree)
    if command == "train":
        given = adopted({**tree, **given}) | given
    problems += [f"{word} is neither a flag nor the recipe {files[0]}; flags begin with --" for word in files[1:]]
    where = files[0] if files else "command line"
    return build(tree, given, where=where, required=REQUIRED[command], before=problems)


def recipe_help(command: str) -> str:
    """Every field by section, with its sentence and default."""
    lines = [f"usage: reeltune {command} [RECIPE.yaml] [--name value ...]", "", *_wrapped(ABOUT[command], 0)]
    lines += ["", *_wrapped("Flags win over the recipe file. Required: " + ", ".join(REQUIRED[command]) + ".", 0)]
    section = ""
    for name, setting in settings().items():
        if setting.section != section:
            section = setting.section
            lines += ["", f"{section}:"]
        lines.append(f"  --{name} {setting.operand}".rstrip())
        default = "" if setting.default == "" else f" [{shown(setting.default)}]"
        lines += _wrapped(sentences()[name] + default, 6)
    return "\n".join(lines) + "\n"


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _train(recipe: Recipe) -> int:
    with lean_imports():
        from reeltune.training.loop import train
    return train(recipe)


def _check(recipe: Recipe) -> int:
    with lean_imports():
        from reeltune.estimate.check import check
    for line in check(recipe):
        print(line)
    return 0


def _cache(recipe: Recipe) -> int:
    with lean_imports():
        from reeltune.cache.fill import fill
    return fill(recipe)


def _verify(recipe: Recipe) -> int:
    from reeltune.cache.maintenance import verify

    print(verify(recipe))
    return 0


def _prune(recipe: Recipe) -> int:
    from reeltune.cache.maintenance import prune

    print(prune(recipe))
    return 0


def _cache_command(argv: Sequence[str]) -> int:
    word = argv[0] if argv and argv[0] in MAINTENANCE else None
    if word is None or {"-h", "--help"} & set(argv):
        if argv and not Path(argv[0]).exists():
            refuse_near("cache", argv[0], MAINTENANCE, "recipe")
        return of_recipe("cache")(argv)
    recipe = recipe_of(argv[1:], "cache")
    with _told_of(recipe, argv[1:]):
        return MAINTENANCE[word](recipe)


def _split(argv: Sequence[str], command: str, parser: Options) -> tuple[Namespace, Recipe] | None:
    """(a command's own options, the recipe), None once help was asked for and given. Raises UserError."""
    if {"-h", "--help"} & set(argv):
        print(recipe_help(command) + "\n" + parser.format_help().partition("\n\n")[2], end="")
        return None
    options, rest = parser.read_known(argv)
    return options, recipe_of(rest, command)


def _sample(argv: Sequence[str]) -> int:
    flags = [word.partition("=") for word in argv]
    argv = [SHORT.get(flag, flag) + equals + value for flag, equals, value in flags]
    parser = Options("reeltune sample", add_help=False)
    parser.epilog = "Short: " + ", ".join(f"{short} for {flag}" for short, flag in SHORT.items())
    about = "adapters of any tool, or a checkpoint-N of a run that trained one; the strength is 1 if left out"
    parser.add_argument("--adapters", nargs="+", default=(), metavar="FILE:STRENGTH", help=about)
    about = "a clip for each of these strengths of all adapters, and a picture of them side by side"
    parser.add_argument("--strengths", nargs="+", type=number, default=(), metavar="X", help=about)
    about = "a clip for each, in place of --seed and those that follow it"
    parser.add_argument("--seeds", nargs="+", type=whole_number, default=(), metavar="N", help=about)
    found = _split(argv, "sample", parser)
    if found is None:
        return 0
    options, recipe = found

    with lean_imports():
        from reeltune.sampling.clips import sample_clips
    with _told_of(recipe, argv):
        for path in sample_clips(recipe, **vars(options)):
            print(path)
    return 0


def _plan(argv: Sequence[str]) -> int:
    parser = Options("reeltune plan", add_help=False)
    parser.add_argument(
        "--gpus", type=whole_number, default=1, metavar="N", help="devices, which share the work as --engine says [1]"
    )
    parser.add_argument("--device", default="80GB", metavar="NAME", help="such as H100, or its memory [80GB]")
    parser.add_argument("--throughput", type=number, metavar="TFLOPS", help="TFLOP/s that each device reaches")
    parser.add_argument("--measured", type=a_path, metavar="RUN", help="take the TFLOP/s from an earlier run's steps")
    parser.add_argument("--html", type=a_path, metavar="FILE", help="write the plan as a page with pictures, too")
    found = _split(argv, "plan", parser)
    if found is None:
        return 0
    options, recipe = found

    with lean_imports():
        from reeltune.estimate.machines import Machines
        from reeltune.estimate.page import tell
    with _told_of(recipe, argv):
        tell(recipe, Machines(options.gpus, options.device, options.throughput, options.measured), options.html)
    return 0


MAINTENANCE: Mapping[str, Callable[[Recipe], int]] = {"verify": _verify, "prune": _prune}
RUN: Mapping[str, Callable[[Recipe], int]] = {"train": _train, "check": _check, "cache": _cache}


# ---- the others

RUN_FILES = ("metrics.jsonl", "run.json", "ledger.json")  # of which a run's folder has one at least


def _report(argv: Sequence[str]) -> int:
    parser = Options("reeltune report", description="Writes report.html of a run's folder.")
    parser.add_argument("run", type=a_path, help="folder of the run (output_dir)")
    options = parser.read(argv)

    from reeltune.reporting.report import write

    if not options.run.is_dir():
        raise UserError("report", f"{str(options.run)!r} is no folder; give the output_dir of a run")
    if not any((options.run / name).exists() for name in RUN_FILES):
        raise UserError("report", f"{options.run} has no {' and no '.join(RUN_FILES)}; give the output_dir of a run")
    print(write(options.run))
    return 0


def printed(lines: Iterable[str]) -> int:
    """Prints each line as it comes. Returns the exit code."""
    for line in lines:
        print(line)
    return 0


def _control(argv: Sequence[str]) -> int:
    from reeltune.control.command import control_lines  # and numpy

    return printed(control_lines(argv))


def _rank(argv: Sequence[str]) -> int:
    parser = Options(
        "reeltune rank",
        description="Measures which rank an adapter needs to do what a full fine-tune did: takes its change apart, and "
        "gives the held-out loss at each rank beside the fine-tune's. Settings of the recipe can follow.",
    )
    parser.add_argument("checkpoint", type=utf8_path, help="a checkpoint-N folder of a run that trained the network")
    parser.add_argument("--base", metavar="MODEL", help="the model that was trained, if not where the recipe says")
    parser.add_argument("--ranks", type=whole_numbers, default="4,8,16,32,64", help="[4,8,16,32,64]")
    parser.add_argument(
        "--out", type=utf8_path, metavar="FOLDER", help="write the adapter of the smallest that is as good"
    )
    options, rest = parser.read_known(argv)
    words, given, problems = flags(rest)
    given |= {} if options.base is None else {"pretrained_model_name_or_path": options.base}
    problems += [f"{word} belongs to no flag; flags begin with --" for word in words]
    if not options.checkpoint.is_dir():
        raise UserError("rank", f"{options.checkpoint} is no folder; give a checkpoint-N folder of a run")
    file = recipe_beside(options.checkpoint)
    tree = {} if file is None else in_its_folder(file, read(file))
    recipe = build(tree, given, where="rank", required=REQUIRED["train"], before=problems)

    from reeltune.export.rank import measure_ranks

    return printed(measure_ranks(recipe, options.checkpoint, options.ranks, options.out))


DEMOS = (
    *("wan_fun", "wan2.1_t2v", "wan2.1_i2v", "wan2.2_a14b", "wan2.2_5b"),
    *("easyanimate", "hunyuan_video", "cogvideox_fun", "toy"),
)


def _demo(argv: Sequence[str]) -> int:
    about = "A small real run, on the CPU, in a few minutes."
    parser = Options("reeltune demo", description=about)
    parser.add_argument(
        "out", type=utf8_path, nargs="?", default=Path("demo_out"), help="the folder to write [demo_out]"
    )
    start = f"of the tiny model: {', '.join(DEMOS)}; all but wan_fun start from random weights [wan_fun]"
    parser.add_argument("--family", type=one_of(DEMOS), metavar="NAME", default="wan_fun", help=start)
    parser.add_argument("--adapter", action="store_true", help="train an adapter (LoRA), not the network")
    options = parser.read(argv)

    with lean_imports():
        from reeltune.demo.main import run
    return run(options.out, family=options.family, adapter=options.adapter)


COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "train": of_recipe("train"),
    "check": of_recipe("check"),
    "plan": _plan,
    "control": _control,
    "cache": _cache_command,
    "sample": _sample,
    "report": _report,
    "serve": serve,
    "export": lambda argv: printed(export_lines(argv)),
    "rank": _rank,
    "import": lambda argv: printed(import_lines(argv)),
    "demo": _demo,
}
