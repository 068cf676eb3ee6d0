"""The EasyAnimate V5 transformer: diffusers' class with the two things put right in which it differs.

diffusers 0.42 (https://github.com/huggingface/diffusers, transformer_easyanimate.py) differs from the released code:
a block without weights of its own for text leaves out the output projection of the text's half of its attention,
and the rotary grid of positions is stretched wherever it does not start at 0.
"""

from __future__ import annotations

from typing import Any

from diffusers import EasyAnimateTransformer3DModel
from diffusers.models.transformers.transformer_easyanimate import (
    EasyAnimateAttnProcessor2_0,
    EasyAnimateRotaryPosEmbed,
)
from torch import Tensor

from reeltune.families import weights
from reeltune.families.rope import open_grid

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


class JointProjection(EasyAnimateAttnProcessor2_0):
    """Text and clip share one output projection, as they share those of queries, keys and values."""

    # diffusers reads the names of the arguments; its type of the answer is one tensor, and it returns two.
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, attn: Any, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None
    ):
        clip, text = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return clip, attn.to_out[0](text)


class OpenGrid(EasyAnimateRotaryPosEmbed):
    def get_resize_crop_region_for_grid(self, src, tgt_width, tgt_height) -> Any:  # whole cells in its type alone
        return open_grid(*super().get_resize_crop_region_for_grid(src, tgt_width, tgt_height), src)


def corrected(net: EasyAnimateTransformer3DModel) -> EasyAnimateTransformer3DModel:
    """The same network, its answers those of the released code."""
    net.rope_embedding = OpenGrid(net.rope_embedding.patch_size, net.rope_embedding.rope_dim)
    blocks: Any = net.transformer_blocks
    for block in blocks:
        if block.attn1.add_q_proj is None:
            block.attn1.set_processor(JointProjection())
    return net
