"""Tiny checkpoints of random weights, in the layout that their families are released in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from reeltune import families
from reeltune.families import configs, weights


@dataclass(frozen=True)
class Untrained:
    """A checkpoint by the folders of its parts."""

    networks: dict[str, Callable[[], nn.Module]]
    tokenizers: dict[str, Callable[[], PreTrainedTokenizerBase]]
    scheduler: SchedulerMixin


def write_checkpoint(folder: Path, parts: Untrained) -> Path:
    """Lays the checkpoint out in `folder` and returns it."""
    logging.disable_progress_bar()
    for name, make in parts.tokenizers.items():
        make().save_pretrained(folder / name)
    parts.scheduler.save_pretrained(folder / "scheduler")
    for seed, (name, make) in enumerate(parts.networks.items()):
        random_weights(make(), seed).save_pretrained(folder / name)
    place = folder / "transformer"
    config, state = configs.read_config(place), weights.read(place)
    families.find(folder).save(place, state, config)  # under the released names
    return folder


@torch.no_grad()
def random_weights(net: nn.Module, seed: int) -> Any:
    """Matrices that keep the size of what passes through them."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=generator)
        else:
            weight.fill_(float(name.endswith("weight")))  # norms
    return net.requires_grad_(False).eval()


def word_tokenizer(
    text: Iterable[str], *, template: str = "$A", special: tuple[str, ...], pad: str, **more: Any
) -> PreTrainedTokenizerFast:
    """One token for each word and mark of `text`, and one for all others.

    template: what is put around a caption, $A. special: tokens that are never cut. more: what else the class takes.
    """
    split = Split(Regex(PIECES), "removed", invert=True)
    words = sorted({word for line in text for word, _ in split.pre_tokenize_str(line)})
    names = list(dict.fromkeys([*special, UNKNOWN, *words]))
    made = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN))
    made.pre_tokenizer = split
    around = [(name, names.index(name)) for name in template.split() if name != "$A"]
    made.post_processor = TemplateProcessing(single=template, special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=pad, unk_token=UNKNOWN, additional_special_tokens=list(special), **more
    )


UNKNOWN = "<unk>"
PIECES = r"\n\n|behavior|\w+|[^\w\s]"  # as many as Llama 3 cuts HunyuanVideo's template into, hence the one word apart
