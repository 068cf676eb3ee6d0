"""The flags of `reeltune control`; what it does is imported once these are sound.  (no torch)"""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from reeltune.control.kind import Settings
from reeltune.control.kinds import KINDS, kind_named
from reeltune.core.errors import UserError, refuse, together
from reeltune.core.near import refuse_near
from reeltune.core.options import Options, a_path, number, whole_number

PLACE = "{kind}"  # in --out
MAINTENANCE = ("verify", "prune")


def _parser() -> Options:
    parser = Options(
        "reeltune control",
        description="Makes a control for every clip and picture of a list, below control/ of the data's folder, and a "
        "new list that names them, for reeltune check and train. Any number of processes share the work; what is there "
        "is not made again. With verify before the list: reads every control and sets damaged ones aside. With prune: "
        "deletes the controls of these kinds that the list does not ask for.",
        epilog="Kinds: " + "; ".join(f"{kind.name}: {kind.about}" for kind in KINDS.values()) + ".",
    )
    parser.add_argument("list", type=a_path, help="a metadata file (.json, .jsonl, .csv)")
    parser.add_argument("--kind", nargs="+", required=True, metavar="KIND", help=", ".join(KINDS))
    about = "the folder or file of its networks; for several kinds KIND=PATH each"
    parser.add_argument("--detector", nargs="+", default=(), metavar="PATH", help=about)
    about = f"the new list; of several kinds, {PLACE} in its name stands for each"
    parser.add_argument("--out", type=a_path, metavar="NEW.json", help=about)
    about = "that paths in the list begin at [the list's own]"
    parser.add_argument("--train_data_dir", type=a_path, metavar="FOLDER", help=about)
    about = "below it a clip is left out of the new list, from 0 to 1 [by kind, docs/control.md]"
    parser.add_argument("--least_score", type=number, metavar="X", help=about)
    about = "of canny [by the clip; released tools have 100 200]"
    parser.add_argument("--canny_thresholds", nargs=2, type=number, metavar=("LOW", "HIGH"), help=about)
    parser.add_argument("--device", help="where networks run, as cuda or cuda:1 [cpu]")
    parser.add_argument("--workers", type=whole_number, metavar="N", help="processes [1]")
    return parser


def control_lines(argv: Sequence[str]) -> Iterator[str]:
    """What the command tells, line by line. Raises UserError; exits with 128 + the signal that ended it."""
    word = argv[0] if argv and argv[0] in MAINTENANCE else None
    if argv and not (word or Path(argv[0]).suffix or Path(argv[0]).exists()):
        refuse_near("control", argv[0], MAINTENANCE, "list")
    options = _parser().read(argv[1:] if word else argv)
    with together("control") as attempt:
        for name in options.kind:
            attempt(kind_named, name)
        detectors = attempt(_detectors, options.detector, options.kind)
        attempt(_check_numbers, options)
        attempt(_refuse_idle, options, word)
        outs = {} if word else attempt(_outs, options.out, options.kind)
    kinds = tuple(dict.fromkeys(options.kind))
    low_high = options.canny_thresholds
    settings = Settings(None if low_high is None else (low_high[0], low_high[1]), options.device or "cpu")

    from reeltune.control.maintenance import prune, verify
    from reeltune.control.stage import Order

    data_dir = options.train_data_dir or options.list.absolute().parent
    order = Order(options.list, data_dir, kinds, detectors, settings)
    if word == "verify":
        yield verify(order)
    elif word == "prune":
        yield from (prune(data_dir, order, kind_named(name)) for name in kinds)
    else:
        from reeltune.control.run import run

        yield from run(order, outs, options.workers or 1, options.least_score)


def _check_numbers(options: Namespace) -> None:
    if options.workers is not None and options.workers < 1:
        raise UserError("workers", f"--workers is {options.workers}; give 1 or more")
    if options.least_score is not None and not 0 <= options.least_score <= 1:
        raise UserError("least_score", f"--least_score is {options.least_score:g}; scores go from 0 to 1")


def _refuse_idle(options: Namespace, word: str | None) -> None:
    """Raises UserError for flags that would change nothing."""
    named = ", ".join(dict.fromkeys(options.kind))
    problems = []
    if options.device == "":
        problems.append(
            "--device is empty, as is a variable that the shell has not set; give cpu or cuda, or leave it out"
        )
    elif options.device is not None and not any(KINDS[kind].needs for kind in options.kind if kind in KINDS):
        problems.append(f"--device is {options.device}, and {named} run no network, but on the CPU; leave it out")
    if options.canny_thresholds is not None and "canny" not in options.kind:
        low_high = " ".join(f"{value:g}" for value in options.canny_thresholds)
        problems.append(f"--canny_thresholds is {low_high}, and --kind is {named}; it is of canny alone; leave it out")
    if word:
        of_lists = {name: getattr(options, name) for name in ("out", "workers", "least_score")}
        problems += [
            f"--{name} is {value}, and {word} makes no list; leave it out"
            for name, value in of_lists.items()
            if value is not None
        ]
    refuse("control", problems)


def _outs(out: Path | None, kinds: Sequence[str]) -> dict[str, Path]:
    """Each kind's new list."""
    if out is None:
        raise UserError("out", "--out is missing; give the new list a name, as metadata_control.json")
    if len(set(kinds)) > 1 and PLACE not in str(out):
        raise UserError(
            "out",
            f"--out {out} is one list and there are {len(set(kinds))} kinds; a clip has one control in a list, so put "
            f"{PLACE} into its name, as metadata_{PLACE}.json",
        )
    return {kind: Path(str(out).replace(PLACE, kind)) for kind in kinds}


def _detectors(given: Sequence[str], kinds: Sequence[str]) -> dict[str, Path]:
    """Paths of detectors by kind. A path without a kind is of the one kind that needs files. Raises UserError."""
    found: dict[str, Path] = {}
    needing = [kind for kind in dict.fromkeys(kinds) if kind in KINDS and KINDS[kind].needs]
    for word in given:
        name, equals, path = word.partition("=")
        if not equals or name not in KINDS:
            name, path = needing[0] if len(needing) == 1 else "", word
        if name not in needing:
            named = ", ".join(needing) or "none of these kinds"
            raise UserError(
                "detector", f"--detector {word}: files are needed by {named}; give KIND=PATH, or leave it out"
            )
        if name in found:
            raise UserError(
                "detector", f"--detector has two paths for {name}; give the folder that holds all its files"
            )
        try:
            found[name] = a_path(path)
        except ArgumentTypeError as wrong:
            raise UserError("detector", f"--detector {word} {wrong}") from wrong
    missing = [kind for kind in needing if kind not in found]
    if missing:
        told = "; ".join(f"{kind} needs {KINDS[kind].needs}" for kind in missing)
        raise UserError("detector", f"--detector is missing: {told}")
    return found
