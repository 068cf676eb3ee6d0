"""How large everything is: as released on a GPU, tiny where a CPU rehearses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reeltune.core.types import Shape

PHASES = "forward", "backward", "step"  # of a training step, as `plan` has them
CHANNELS, TEXT_TOKENS, IMAGE_TOKENS = 16, 512, 257  # of Wan2.1's latents, captions and CLIP


@dataclass(frozen=True)
class Network:
    """Of Wan2.1-Fun-V1.1-Control: https://huggingface.co/alibaba-pai/Wan2.1-Fun-V1.1-1.3B-Control, config.json."""

    heads: int
    ffn: int
    layers: int
    head_width: int = 128

    @property
    def width(self) -> int:
        return self.heads * self.head_width


@dataclass(frozen=True)
class Encoders:
    """Arguments of AutoencoderKLWan, UMT5Config and CLIPVisionConfig."""

    vae: dict[str, Any]
    text: dict[str, Any]
    image: dict[str, Any]


@dataclass(frozen=True)
class Scale:
    networks: dict[str, Network]
    encoders: Encoders
    clip: Shape
    rounds: int  # steps that are counted, after a first one
    matrix: int  # side of the square matrices that are multiplied
    copied_bytes: int
    rank: int  # of adapters
    is_rehearsal: bool = False
    note: str = field(default="")


FULL = Scale(
    networks={"1.3b": Network(12, 8960, 30), "14b_cut": Network(40, 13824, 8)},  # of 40 layers
    encoders=Encoders(
        vae={},  # diffusers' defaults are Wan2.1's
        # https://huggingface.co/google/umt5-xxl, config.json
        text={"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
        # ViT-H/14 of https://github.com/mlfoundations/open_clip
        image={"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16},
    ),
    clip=Shape(81, 480, 832),
    rounds=3,
    matrix=8192,
    copied_bytes=2**32,
    rank=32,
)
TINY = Scale(
    networks={"1.3b": Network(2, 64, 6, head_width=24), "14b_cut": Network(4, 96, 5, head_width=24)},
    encoders=Encoders(
        vae={"base_dim": 4},
        text={"vocab_size": 256, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3},
        image={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 16},
    ),
    clip=Shape(5, 32, 48),
    rounds=1,
    matrix=64,
    copied_bytes=2**16,
    rank=4,
    is_rehearsal=True,
    note="a rehearsal on a CPU at tiny sizes: NO FIGURE HERE IS A GPU'S",
)
