"""EasyAnimate V5.1 with control clip and reference picture: half its blocks have weights of their own for text."""

from __future__ import annotations

from diffusers import AutoencoderKLMagvit, EasyAnimateTransformer3DModel, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from reeltune.demo.clips import vocabulary
from reeltune.demo.untrained import Untrained, word_tokenizer

TEXT_WIDTH = 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SYSTEM = "You are a helpful assistant."  # Qwen2-VL's, which its template puts before the caption
CHAT = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n"
    "{% for part in turn.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def transformer() -> EasyAnimateTransformer3DModel:
    return EasyAnimateTransformer3DModel(
        in_channels=48,  # noisy latents, control, reference: 16 each
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        mmdit_layers=2,
        patch_size=2,
        text_embed_dim=TEXT_WIDTH,
        add_norm_text_encoder=True,
    )


def vae() -> AutoencoderKLMagvit:
    down = ("SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3)
    return AutoencoderKLMagvit(
        latent_channels=16,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in down),
        norm_num_groups=4,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*vocabulary(), SYSTEM, "system user assistant", "."]
    return word_tokenizer(words, special=SPECIAL, pad=SPECIAL[0], chat_template=CHAT, model_max_length=32768)


def text_encoder() -> Qwen2VLForConditionalGeneration:
    sizes = {
        "vocab_size": len(tokenizer()),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": SPECIAL.index("<|endoftext|>"),
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    eyes = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": TEXT_WIDTH}  # of a picture; captions need none
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=sizes, vision_config=eyes))


CHECKPOINT = Untrained(
    networks={"transformer": transformer, "vae": vae, "text_encoder": text_encoder},
    tokenizers={"tokenizer": tokenizer},
    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
)
