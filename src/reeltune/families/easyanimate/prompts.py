"""Captions as EasyAnimate's networks were trained on them: padded to a fixed length, the padding's features kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from reeltune.families.spec import Parts, TokenLimit
from reeltune.families.tokenizers import as_turns

LENGTH = 256  # tokens; BERT's own limit of 77 is shorter


def token_limits(tokenizers: Mapping[str, Path]) -> tuple[TokenLimit, ...]:
    """The limits at which `tokens_of` cuts captions. tokenizers: name -> folder."""
    if "tokenizer_2" not in tokenizers:
        return (TokenLimit("Qwen2-VL", tokenizers["tokenizer"], LENGTH, as_read=as_turns, or_its_own=True),)
    return tuple(
        TokenLimit(reader, tokenizers[name], LENGTH, special=False, or_its_own=True)
        for name, reader in (("tokenizer", "BERT"), ("tokenizer_2", "T5"))
    )


def tokens_of(parts: Parts, name: str, captions: Sequence[str], length: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, int B L, L = length or the tokenizer's limit.

    Of Qwen2-VL the caption is a user's turn in its chat template; a long one loses the template's end. BERT and T5
    see the caption alone, without their special tokens (measured on the reference, 2026-11).
    """
    tokenizer, chat = parts.extras[f"tokenizer{name}"], "tokenizer_2" not in parts.extras
    if chat:
        captions = as_turns(tokenizer, captions)
    return tokenizer(
        list(captions),
        padding="max_length",
        padding_side="right",
        max_length=min(length, tokenizer.model_max_length),
        truncation=True,
        add_special_tokens=chat,
        return_tensors="pt",
    )


@torch.no_grad()
def encode_text(parts: Parts, captions: Sequence[str], length: int = LENGTH) -> dict[str, Tensor]:
    """Conditions "text", and with two encoders "text_t5": float32 B L D.

    Qwen2-VL: states before its last layer, its padding masked. BERT and T5: last states, no mask (measured on the
    reference, 2026-11). Captions are encoded one by one, so that none depends on its neighbours.
    """
    if "tokenizer_2" not in parts.extras:
        return {"text": _states(parts, "text", tokens_of(parts, "", captions, length), masked=True)}
    found = {"text": "", "text_t5": "_2"}
    return {
        cond: _states(parts, f"text{name}", tokens_of(parts, name, captions, length), masked=False)
        for cond, name in found.items()
    }


def _states(parts: Parts, name: str, tokens: dict[str, Tensor], *, masked: bool) -> Tensor:
    rows = []
    with parts.borrow(name) as encoder:
        for ids, mask in zip(tokens["input_ids"], tokens["attention_mask"], strict=True):
            inputs = {"input_ids": ids[None].to(parts.device)}
            if masked:
                inputs["attention_mask"] = mask[None].to(parts.device)
                states = encoder(**inputs, output_hidden_states=True).hidden_states[-2]
            else:
                states = encoder(**inputs).last_hidden_state
            rows.append(states.float())
    return torch.cat(rows)
