"""HunyuanVideo, text to video: blocks for text and clip apart, then for both together."""

from __future__ import annotations

from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from reeltune.demo.clips import vocabulary
from reeltune.demo.untrained import Untrained, word_tokenizer
from reeltune.families.hunyuan_video.prompts import POOLED_LENGTH, TEMPLATE

TEXT_WIDTH, POOLED_WIDTH = 64, 32
SPECIAL = ("<pad>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
SPECIAL_2 = ("<|startoftext|>", "<|endoftext|>")


def transformer() -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        rope_axes_dim=(8, 12, 12),
    )


def vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 16, 16),  # pyright: ignore[reportArgumentType]  diffusers writes tuple[int]
        norm_num_groups=4,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*vocabulary(), TEMPLATE, "."]
    return word_tokenizer(words, template=f"{SPECIAL[1]} $A", special=SPECIAL, pad=SPECIAL[0])


def text_encoder() -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer()),
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )


def tokenizer_2() -> PreTrainedTokenizerFast:
    start, end = SPECIAL_2
    return word_tokenizer([*vocabulary(), "."], template=f"{start} $A {end}", special=SPECIAL_2, pad=end)


def text_encoder_2() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer_2()),
            hidden_size=POOLED_WIDTH,
            intermediate_size=2 * POOLED_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POOLED_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


CHECKPOINT = Untrained(
    networks={
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    },
    tokenizers={"tokenizer": tokenizer, "tokenizer_2": tokenizer_2},
    scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
)
