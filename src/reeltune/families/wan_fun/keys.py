"""Released tensor names and those of diffusers and transformers, both ways, for each network of Wan2.1, Wan2.2
and their Fun models.

Pure functions of a table of tensors. Names were read from the released files and from the libraries, 2026-11.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from reeltune.families.weights import rename

State = dict[str, Tensor]

ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"))
IMAGE_ATTENTION = (("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k"))
TRANSFORMER = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    ("blocks.{}.norm3", "blocks.{}.norm2"),  # the one norm with weights; diffusers numbers it by its place
    *((f"blocks.{{}}.self_attn.{a}", f"blocks.{{}}.attn1.{b}") for a, b in ATTENTION),
    *((f"blocks.{{}}.cross_attn.{a}", f"blocks.{{}}.attn2.{b}") for a, b in ATTENTION + IMAGE_ATTENTION),
    ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
)  # patch_embedding, ref_conv and control_adapter have one name

RESIDUAL = (
    ("residual.0", "norm1"),
    ("residual.2", "conv1"),
    ("residual.3", "norm2"),
    ("residual.6", "conv2"),
    ("shortcut", "conv_shortcut"),
)


def _vae_rows():
    yield from (("conv1", "quant_conv"), ("conv2", "post_quant_conv"))
    for side in ("encoder", "decoder"):
        yield from (
            (f"{side}.conv1", f"{side}.conv_in"),
            (f"{side}.head.0", f"{side}.norm_out"),
            (f"{side}.head.2", f"{side}.conv_out"),
        )
        for part in ("norm", "to_qkv", "proj"):
            yield f"{side}.middle.1.{part}", f"{side}.mid_block.attentions.0.{part}"
        for old, new in RESIDUAL:
            yield f"{side}.middle.0.{old}", f"{side}.mid_block.resnets.0.{new}"
            yield f"{side}.middle.2.{old}", f"{side}.mid_block.resnets.1.{new}"
    for part in ("resample.1", "time_conv"):
        yield f"encoder.downsamples.{{}}.{part}", f"encoder.down_blocks.{{}}.{part}"
    for old, new in RESIDUAL:
        yield f"encoder.downsamples.{{}}.{old}", f"encoder.down_blocks.{{}}.{new}"
    for place in range(15):  # four levels of three residual blocks, an upsampler after each level but the last
        level, block = divmod(place, 4)
        if block == 3:
            for part in ("resample.1", "time_conv"):
                yield f"decoder.upsamples.{place}.{part}", f"decoder.up_blocks.{level}.upsamplers.0.{part}"
        else:
            for old, new in RESIDUAL:
                yield f"decoder.upsamples.{place}.{old}", f"decoder.up_blocks.{level}.resnets.{block}.{new}"


VAE = tuple(_vae_rows())


def _vae_2_2_rows():
    """Rows of Wan2.2's VAE, whose levels are blocks with shortcuts: two residual blocks going down, three going up."""
    yield from (row for row in VAE if not re.match(r"(en|de)coder\.(down|up)", row[0]))
    for side, way, end in (("encoder", "down", 2), ("decoder", "up", 3)):
        level, new_level = f"{side}.{way}samples.{{}}", f"{side}.{way}_blocks.{{}}"
        for old, new in RESIDUAL:
            yield f"{level}.{way}samples.{{}}.{old}", f"{new_level}.resnets.{{}}.{new}"
        for part in ("resample.1", "time_conv"):
            yield f"{level}.{way}samples.{end}.{part}", f"{new_level}.{way}sampler.{part}"


VAE_2_2 = tuple(_vae_2_2_rows())

TEXT = (
    ("token_embedding", "shared"),
    *((f"blocks.{{}}.attn.{part}", f"encoder.block.{{}}.layer.0.SelfAttention.{part}") for part in "qkvo"),
    ("blocks.{}.pos_embedding.embedding", "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias"),
    ("blocks.{}.norm1", "encoder.block.{}.layer.0.layer_norm"),
    ("blocks.{}.ffn.gate.0", "encoder.block.{}.layer.1.DenseReluDense.wi_0"),
    ("blocks.{}.ffn.fc1", "encoder.block.{}.layer.1.DenseReluDense.wi_1"),
    ("blocks.{}.ffn.fc2", "encoder.block.{}.layer.1.DenseReluDense.wo"),
    ("blocks.{}.norm2", "encoder.block.{}.layer.1.layer_norm"),
    ("norm", "encoder.final_layer_norm"),
)
TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight

IMAGE = (
    ("visual.cls_embedding", "embeddings.class_embedding"),
    ("visual.pos_embedding", "embeddings.position_embedding.weight"),
    ("visual.patch_embedding", "embeddings.patch_embedding"),
    ("visual.pre_norm", "pre_layrnorm"),
    ("visual.post_norm", "post_layernorm"),
    *((f"visual.transformer.{{}}.norm{i}", f"encoder.layers.{{}}.layer_norm{i}") for i in (1, 2)),
    ("visual.transformer.{}.attn.proj", "encoder.layers.{}.self_attn.out_proj"),
    ("visual.transformer.{}.mlp.0", "encoder.layers.{}.mlp.fc1"),
    ("visual.transformer.{}.mlp.2", "encoder.layers.{}.mlp.fc2"),
)
QKV = ("q_proj", "k_proj", "v_proj")
IMAGE_LEFT = ("textual.", "log_scale", "visual.head")  # of the whole CLIP: Wan uses the picture tower before its head


def to_released(state: State, config: dict[str, Any] | None = None) -> State:
    """The transformer's tensors, the very same ones, under the released names. Config is not needed."""
    return rename(state, TRANSFORMER, back=True)


def from_released(state: State, config: dict[str, Any] | None = None) -> State:
    """The inverse of `to_released`."""
    return rename(state, TRANSFORMER)


def is_vae_2_2(state: State) -> bool:
    """Whether a state dict is of Wan2.2's VAE, by names of either form."""
    return any(
        name.startswith(("encoder.downsamples.0.downsamples.", "encoder.down_blocks.0.resnets.")) for name in state
    )


def vae_from_released(state: State) -> State:
    return rename(state, VAE_2_2 if is_vae_2_2(state) else VAE)


def vae_to_released(state: State) -> State:
    return rename(state, VAE_2_2 if is_vae_2_2(state) else VAE, back=True)


def text_from_released(state: State) -> State:
    ours = rename(state, TEXT)
    return ours | {TIED: ours["shared.weight"]} if "shared.weight" in ours else ours


def text_to_released(state: State) -> State:
    return rename({name: tensor for name, tensor in state.items() if name != TIED}, TEXT, back=True)


def image_from_released(state: State) -> State:
    """What `IMAGE_LEFT` names is left out; fused query-key-value tensors are split, embeddings lose unit axes."""
    split: State = {}
    for name, tensor in state.items():
        if name.startswith(IMAGE_LEFT):
            continue
        if name.count(".attn.to_qkv.") == 1 and tensor.ndim and tensor.shape[0] % 3 == 0 < tensor.shape[0]:
            layer, kind = name.removeprefix("visual.transformer.").split(".attn.to_qkv.")
            parts = zip(QKV, tensor.chunk(3), strict=True)
            split |= {f"encoder.layers.{layer}.self_attn.{part}.{kind}": piece for part, piece in parts}
        elif name == "visual.cls_embedding":
            split[name] = tensor.reshape(-1)
        else:
            split[name] = tensor[0] if name == "visual.pos_embedding" and tensor.ndim == 3 else tensor
    return rename(split, IMAGE)


def image_to_released(state: State) -> State:
    """The picture tower; the parts that `IMAGE_LEFT` names are not in it."""
    fused: State = {}
    for name, tensor in rename(state, IMAGE, back=True).items():
        if ".self_attn.q_proj." in name:
            pieces = [state[name.replace("q_proj", part)] for part in QKV]
            layer, kind = name.removeprefix("encoder.layers.").split(".self_attn.q_proj.")
            fused[f"visual.transformer.{layer}.attn.to_qkv.{kind}"] = torch.cat(pieces)
        elif name == "visual.cls_embedding":
            fused[name] = tensor.reshape(1, 1, -1)
        elif not name.startswith("encoder.layers."):
            fused[name] = tensor[None] if name == "visual.pos_embedding" else tensor
    return fused
