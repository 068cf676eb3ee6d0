"""Captions to text features, as families with T5-like encoders share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def embed(tokenizer: Any, encoder: nn.Module, text: Sequence[str], length: int) -> Tensor:
    """text_BLD in float32, L = length: features of the caption's own tokens (end token included), zeros after them.

    Each caption is cut to `length` tokens and encoded alone at its own length: the features of a masked, padded
    batch, without its padding's cost, and the same whatever its neighbours are.
    """
    device = next(encoder.parameters()).device
    rows = []
    for caption in text:
        ids = tokenizer(caption, truncation=True, max_length=length, return_tensors="pt").input_ids.to(device)
        hidden_LD = encoder(input_ids=ids).last_hidden_state[0].float()
        rows.append(F.pad(hidden_LD, (0, 0, 0, length - len(hidden_LD))))
    return torch.stack(rows)


@torch.no_grad()
def embed_padded(tokenizer: Any, encoder: nn.Module, text: Sequence[str], length: int) -> Tensor:
    """text_BLD in float32, L = length: captions cut or padded to it, the padding read as text and its features kept.

    Captions are encoded one by one, so that none depends on its neighbours.
    """
    device = next(encoder.parameters()).device
    tokens = tokenizer(list(text), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return torch.cat([encoder(input_ids=ids[None].to(device)).last_hidden_state.float() for ids in tokens.input_ids])
