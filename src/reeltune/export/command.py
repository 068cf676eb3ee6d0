"""The flags of `reeltune export` and `import`; what they do, and torch with it, is imported once these are sound.
(no torch)"""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError
from reeltune.core.options import Options, model_path, number, one_of, utf8_path, utf8_text

DIALECTS = ("comfyui", "diffusers", "videox_fun", "musubi")
DTYPES = ("as_stored", "bf16", "fp16", "fp32")


def export_lines(argv: Sequence[str]) -> Iterator[str]:
    """What the command does, line by line as it is done."""
    parser = Options(
        "reeltune export",
        description="Writes a checkpoint's weights into a folder of their own, whichever engine saved them, and proves "
        "the copy: every tensor is read back, and a forward pass made. With --adapter: writes an adapter into a file "
        "that another tool loads, and proves that the tool applies what was trained. With --merge: puts adapters into "
        "the whole weights of their base, and proves that base + change is what was written.",
    )
    parser.add_argument("checkpoint", type=utf8_path, help="a checkpoint-N folder; with --adapter any tool's file, too")
    parser.add_argument("out", type=utf8_path, help="the folder to write; with --adapter the file")
    parser.add_argument(
        "--dtype",
        type=one_of(DTYPES),
        metavar="TYPE",
        help=f"of the weights: {', '.join(DTYPES)} [bf16; as_stored with --adapter]",
    )
    parser.add_argument("--max_shard_size", type=size, metavar="SIZE", help="one file up to this, else shards [80GB]")
    parser.add_argument(
        "--diffusers", action="store_true", default=None, help="names that diffusers loads, not the original tools"
    )
    parser.add_argument("--ema", action="store_true", help="the moving average of the weights instead")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        type=model_path,
        help="the model that was trained, if not where the recipe says",
    )
    parser.add_argument("--adapter", action="store_true", help="the adapter alone, in the form of one tool")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="put the checkpoint's adapter, or --adapters, into the whole weights",
    )
    parser.add_argument("--adapters", nargs="+", metavar="FILE:STRENGTH", help="of any tool, to merge; strength 1")
    _take_tool(parser, "the tool, needed with --adapter")
    about = "written into the adapter's file, for UIs to show"
    parser.add_argument("--trigger_words", type=utf8_text, metavar="TEXT", help=about)
    options = vars(parser.read(argv))
    given = {name: value for name, value in options.items() if value is not None}
    _refuse_lost_model("export", given.get("pretrained_model_name_or_path"))
    alone, merges = given.pop("adapter"), given.pop("merge")
    if alone and merges:
        raise UserError("export", "--adapter writes an adapter alone, --merge whole weights; leave one of the two out")
    if not alone:
        _refuse_beside("", {"dialect": "--for", "trigger_words": "--trigger_words"}, given, "go with --adapter alone")
    if merges:
        from reeltune.export.merge import export_merged

        return export_merged(given.pop("checkpoint"), given.pop("out"), **given)
    _refuse_beside("", {"adapters": "--adapters"}, given, "goes with --merge alone")
    if not alone:
        return exported(**given)
    weights = {"max_shard_size": "--max_shard_size", "diffusers": "--diffusers"}
    _refuse_beside("--adapter", weights, given, "are of whole models; leave them out")
    if "dialect" not in given:
        raise UserError("export", f"--adapter needs --for and a tool: {', '.join(DIALECTS)}")

    from reeltune.export.adapter import export_adapter

    return export_adapter(given.pop("checkpoint"), given.pop("out"), given.pop("dialect"), **given)


def _refuse_lost_model(command: str, model: str | None) -> None:
    """Raises UserError for a model that is given and is not there; the run's own may be gone."""
    if model is not None and not Path(model).is_dir():
        rule = "which is no folder; give that of the model, or leave it out"
        raise UserError(command, f"--pretrained_model_name_or_path is {model!r}, {rule}")


def _refuse_beside(flag: str, others: Mapping[str, str], given: Mapping[str, Any], words: str) -> None:
    found = [shown_flag for name, shown_flag in others.items() if name in given]
    if found:
        raise UserError("export", f"{' and '.join(found)} {words}" + (f", or {flag} out" if flag else ""))


def _take_tool(parser: Options, about: str) -> None:
    about = f"{about}: {', '.join(DIALECTS)}"
    parser.add_argument("--for", dest="dialect", type=one_of(DIALECTS), metavar="TOOL", help=about)


def import_lines(argv: Sequence[str]) -> Iterator[str]:
    """What the command tells, line by line."""
    parser = Options(
        "reeltune import",
        description="Tells what an adapter is: of which tool and model, its rank, alpha and layers, and how strong it "
        "would be in each tool. Reads the file's header and alphas alone. With --out: writes it anew.",
    )
    parser.add_argument(
        "file", type=utf8_path, help="a .safetensors file, a folder that PEFT wrote, or a checkpoint-N folder"
    )
    about = "the model that it is to fit, to its names and sizes"
    parser.add_argument("--pretrained_model_name_or_path", type=model_path, help=about)
    parser.add_argument("--alpha", type=number, metavar="N", help="what it was trained with, if the file does not say")
    parser.add_argument(
        "--out", type=utf8_path, metavar="FILE", help="write it with its scale in B, so that none is needed"
    )
    _take_tool(parser, "the tool to write it for, needed with --out")
    options = parser.read(argv)
    if (options.out is None) != (options.dialect is None):
        raise UserError("import", "--out and --for go together: the file to write, and the tool to write it for")

    _refuse_lost_model("import", options.pretrained_model_name_or_path)

    from reeltune.export.adapter import export_adapter, tell

    settings = {"alpha": options.alpha, "pretrained_model_name_or_path": options.pretrained_model_name_or_path}
    if options.out is not None:
        return export_adapter(options.file, options.out, options.dialect, **settings)
    return tell(options.file, **settings)


def exported(checkpoint: Path, out: Path, **settings: Any) -> Iterator[str]:
    """What `export.main.export` does, which is imported here as it needs torch."""
    from reeltune.export.main import export

    return export(checkpoint, out, **settings)


def size(text: str) -> str:
    if not re.fullmatch(r"0*[1-9]\d*[KMGT]B", text, re.ASCII):
        raise ArgumentTypeError(f"is {text!r}; expected a size, as 500MB or 5GB")
    return text
