"""The EasyAnimate V5 transformer: diffusers' class with the two things put right in which it differs.

diffusers 0.42 (https://github.com/huggingface/diffusers, transformer_easyanimate.py) differs from the released code:
a block without weights of its own for text leaves out the output projection of the text's half of its attention,
and the rotary grid of positions is stretched wherever it does not start at 0.
"""

from __future__ import annotations

from typing import Any

from reeltune.core.imports import lean_imports
from reeltune.families.rope import open_grid

with lean_imports():
    from diffusers import EasyAnimateTransformer3DModel
    from diffusers.models.transformers.transformer_easyanimate import (
        EasyAnimateAttnProcessor2_0,
        EasyAnimateRotaryPosEmbed,
    )


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
