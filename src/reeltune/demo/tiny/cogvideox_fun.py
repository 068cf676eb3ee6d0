"""CogVideoX-Fun-5b-InP: inpainting."""

from __future__ import annotations

from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, DDIMScheduler
from transformers import T5Config, T5EncoderModel

from reeltune.demo.checkpoint import tokenizer
from reeltune.demo.untrained import Untrained

TEXT_WIDTH = 64


def transformer() -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        in_channels=33,  # noisy latents, mask, kept clip
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=32,
        time_embed_dim=128,
        num_layers=4,
        text_embed_dim=TEXT_WIDTH,
        use_rotary_positional_embeddings=True,
    )


def vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 16, 16),  # pyright: ignore[reportArgumentType]  diffusers writes tuple[int]
        norm_num_groups=4,
        scaling_factor=0.7,
    )


def text_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer()),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


CHECKPOINT = Untrained(
    networks={"transformer": transformer, "vae": vae, "text_encoder": text_encoder},
    tokenizers={"tokenizer": tokenizer},
    scheduler=DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    ),
)
