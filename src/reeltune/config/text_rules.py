"""What the texts of a Recipe may be: patterns, captions and paths.  (no torch)"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reeltune.core.files import is_utf8, shell_word

PATTERNS = ("trainable_modules", "trainable_modules_low_learning_rate", "target_name", "lora_skip_name", "train_whole")
PATHS = (
    *("pretrained_model_name_or_path", "config_path", "transformer_path", "other_expert_path", "other_expert_adapter"),
    *("adapter_path", "train_data_dir", "train_data_meta", "validation_data_meta", "cache_folder", "output_dir"),
    *("resume_from_checkpoint", "control_detector", "validation_paths", "validation_control_from"),
)
ANY_BYTES = (  # paths of clips and lists, which may be of another time; safetensors and tokenizers take UTF-8 alone
    *("train_data_dir", "train_data_meta", "validation_data_meta"),
    *("validation_paths", "validation_control_from"),
)


def text_rules(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The fields and the sentence of each rule that words break, as `broken_rules` has them."""
    yield from _empty_words(values)
    yield from _unwritable(values)
    yield from _shell_words(values)


def _empty_words(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """An empty word comes of a variable that a shell had not set: as a pattern it would match every name, as a path it
    would be this folder."""
    for name in PATTERNS:
        if not all(word.strip() for word in values[name]):
            yield (name,), f"{name} has an empty word, which is part of every name; leave it out, or write . for all"
    for name in ("validation_paths", "validation_control_from"):
        if not all(path.strip() for path in values[name]):
            yield (name,), f"{name} has an empty word, as is a variable that the shell has not set; give paths alone"
    if not values["output_dir"].strip():
        yield ("output_dir",), "output_dir is empty; it must be a folder, and . is this one; give one, or leave it out"


def _shell_words(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for name in PATHS:
        for path in values[name] if isinstance(values[name], tuple) else (values[name] or "",):
            if word := shell_word(path):
                yield (name,), f"{name} is {path}, in which only a shell replaces {word}; write that folder out"


def _unwritable(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What YAML's escapes and a terminal of another encoding can write, and no file's name or caption can hold."""
    for name, value in values.items():
        for text in value if isinstance(value, tuple) else (value,):
            if not isinstance(text, str):
                continue
            if "\0" in text:
                yield (name,), f"{name} has a letter NUL, which no file's name and no caption can hold; leave it out"
            elif not is_utf8(text, any_bytes=name in ANY_BYTES):
                yield (name,), f"{name} is {text!a}, which is not UTF-8, as weights' paths and captions are; rename it"
