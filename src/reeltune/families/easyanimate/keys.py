"""Names of EasyAnimate V5's tensors: the released ones, and diffusers', which differ in a few."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reeltune.families import weights

ROWS: weights.Rows = (
    *((f"attn2.to_{x}", f"attn1.add_{x}_proj") for x in "qkv"),
    ("attn2.to_out.0", "attn1.to_add_out"),
    ("attn2.norm_q", "attn1.norm_added_q"),
    ("attn2.norm_k", "attn1.norm_added_k"),
)  # released name, diffusers' name; all others are equal (measured on the reference, 2026-11)
KEYS: weights.Rows = tuple((f"transformer_blocks.{{}}.{a}", f"transformer_blocks.{{}}.{b}") for a, b in ROWS)


def to_released(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    return weights.rename(state, KEYS, back=True)


def from_released(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Names that are diffusers' already stay."""
    return weights.rename(state, KEYS)
