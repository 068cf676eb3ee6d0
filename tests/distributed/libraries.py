"""What the families' networks are made of, for a process from which others fork: they need not import it each."""

# ruff: noqa: F401 - they are only to be there

from reeltune.core.imports import lean_imports

with lean_imports():
    import diffusers.models.autoencoders
    import diffusers.models.transformers
    import diffusers.optimization
    import peft
    from transformers import (
        BertModel,
        CLIPTextModel,
        CLIPVisionModel,
        LlamaModel,
        LlavaForConditionalGeneration,
        Qwen2VLForConditionalGeneration,
        T5EncoderModel,
        UMT5EncoderModel,
    )
