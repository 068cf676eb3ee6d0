"""Tokenizers and image processors from a checkpoint's files, which may hold anything."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from reeltune.core.errors import UserError, refuse
from reeltune.core.reading import AGAIN, as_user_error, brief, refuse_foreign
from reeltune.families.configs import from_files, read_config

MOST = 10_000  # of a number in tokenizer_config.json: so many tokens of its own T5's may make
TEMPLATE_S = 10  # of processor time, which a chat template may take for one caption; the slowest released takes 0.01
TEMPLATE_BYTES = 2**30
RENDER = """
import resource, sys, time
from jinja2.sandbox import ImmutableSandboxedEnvironment
most_s = int(time.process_time() + {most_s}) + 1
resource.setrlimit(resource.RLIMIT_CPU, (most_s, most_s))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, ({most_bytes}, {most_bytes}))
how = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
environment = ImmutableSandboxedEnvironment(**how)
turns = [dict(role="user", content=[dict(type="text", text="a cat")])]
try:
    environment.from_string(sys.stdin.read()).render(messages=turns, add_generation_prompt=True)
except MemoryError:
    raise
except Exception:
    pass
"""  # what is wrong with a template otherwise is told where it is used


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, of the class that its files name. Raises UserError if they are not whole, or name code
    of their own."""
    import transformers  # slow, and not every family has such encoders

    for file in sorted(folder.glob("*")):  # some of which the library reads as far as they go
        if file.suffix == ".json":
            read_config(folder, file.name)
        elif file.is_file():
            refuse_foreign(file, "a part of a tokenizer")
    settings = read_config(folder, "tokenizer_config.json")
    kind, longest = settings.get("tokenizer_class"), settings.get("model_max_length", 1)
    problems = []
    if not isinstance(kind, str | None):
        problems.append(f"tokenizer_class is {brief(kind)}; expected a name")
    elif "auto_map" in settings and not hasattr(transformers, kind or ""):
        problems.append(
            f"names code of its own ({brief(settings['auto_map'])}), which is not run; give the released one"
        )
    if type(longest) not in (int, float) or not longest >= 1:
        problems.append(f"model_max_length is {brief(longest)}; expected a number")
    problems += [
        f"{name} is {brief(value)}; expected at most {MOST:,}"
        for name, value in settings.items()
        if type(value) is int and name != "model_max_length" and abs(value) > MOST
    ]
    refuse(str(folder / "tokenizer_config.json"), problems)
    # Those of HunyuanVideo call themselves LlamaTokenizer, which transformers before 5.22 then cut by Llama 2's rules:
    # other ids for every caption (measured, 2026-11-26, 5.17 and 5.20).
    as_its_file_says = "Llama" in (kind or "") and _by_bytes(folder)
    with as_user_error(folder, "is no tokenizer"):
        tokenizer = from_files(
            transformers.PreTrainedTokenizerFast if as_its_file_says else transformers.AutoTokenizer, folder
        )
        tokenizer("a cat", truncation=True, max_length=8)
    return tokenizer


def _by_bytes(folder: Path) -> bool:
    """Whether tokenizer.json cuts text into bytes, as Llama 3 does and Llama 2 does not."""
    cut = read_config(folder, "tokenizer.json").get("pre_tokenizer")
    several = cut.get("pretokenizers") if isinstance(cut, dict) else None
    parts = [cut, *several] if isinstance(several, list) else [cut]
    return any(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in parts)


def check_vocabulary(tokenizer: Any, encoder: Any) -> None:
    """Raises UserError for a tokenizer that makes ids for which the encoder's table of embeddings has no row."""
    rows = encoder.get_input_embeddings().num_embeddings
    highest = max(tokenizer.vocab_size - 1, *tokenizer("a cat").input_ids)  # marks around a caption may lie behind
    if highest >= rows:
        raise UserError(
            str(tokenizer.name_or_path),
            f"its ids go up to {highest:,}, and the table of embeddings of its encoder has {rows:,} rows; the two are "
            "not of one release: download both again",
        )


def check_chat_template(tokenizer: Any, folder: Path) -> None:
    """Raises UserError for a template that cannot make a user's turn of a caption in bounded time and memory."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise UserError(str(folder), f"its tokenizer has no chat_template; {AGAIN}")
    if not _ends(template):
        raise UserError(str(folder), f"its chat_template does not come to an end; {AGAIN}")
    with as_user_error(folder, "its chat_template cannot be used"):
        as_turns(tokenizer, ["a cat"])


def as_turns(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """Each caption as a user's turn, and the beginning of the answer."""
    turns = [[{"role": "user", "content": [{"type": "text", "text": caption}]}] for caption in captions]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


@cache
def _ends(template: str) -> bool:
    """Reads it in a process of its own, because neither its loops nor its powers can be interrupted."""
    code = RENDER.format(most_bytes=TEMPLATE_BYTES, most_s=TEMPLATE_S)
    done = subprocess.run([sys.executable, "-I", "-c", code], input=template.encode(), capture_output=True)
    return done.returncode == 0


def load_image_processor(cls: Any, folder: Path) -> Any:
    """The image processor in a folder. cls: of transformers. Raises UserError if its settings are not there or not
    whole."""
    settings = read_config(folder, "preprocessor_config.json")
    if not settings:
        raise UserError(str(folder), "no preprocessor_config.json; download it")
    with as_user_error(folder / "preprocessor_config.json", f"is no {cls.__name__}"):
        return cls.from_dict(settings)
