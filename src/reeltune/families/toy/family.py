"""A family small enough to read in a minute and to train in a test. Copy this folder to add one.

Its checkpoint is any folder with a file toy.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, interpolate, silu

from reeltune.core.rng import seed_of
from reeltune.core.types import Batch, Described, Encoded, Geometry, Posterior, SizeLaw
from reeltune.diffusion.objective import Flow
from reeltune.families import weights
from reeltune.families.spec import Family, Loading, Parts, needed

GEOMETRY = Geometry(time_stride=4, space_stride=8, patch=2, channels=3)
TEXT = 16  # width of a text vector


class ToyBlock(nn.Module):
    def __init__(self, D: int):
        super().__init__()
        # No kernel over time: its bf16 gradients on the CPU are wrong (torch 2.13, measured 2026-11-21).
        self.mix = nn.Conv3d(D, D, (1, 3, 3), padding=(0, 1, 1))
        self.time, self.text = nn.Linear(1, D), nn.Linear(TEXT, D)

    def forward(self, x: Tensor, timestep_B: Tensor, text_BD: Tensor) -> Tensor:
        shift = self.time(timestep_B[:, None] / 1000) + self.text(text_BD)
        return x + silu(self.mix(x) + shift[:, :, None, None, None])


class ToyNet(nn.Module):
    def __init__(self, D: int = 16):
        super().__init__()
        self.inp, self.out = nn.Conv3d(2 * GEOMETRY.channels, D, 1), nn.Conv3d(D, GEOMETRY.channels, 1)
        self.blocks = nn.ModuleList(ToyBlock(D) for _ in range(2))

    def forward(self, x: Tensor, timestep_B: Tensor, text_BD: Tensor, control: Tensor) -> Tensor:
        x = self.inp(torch.cat([x, control], 1))
        for block in self.blocks:
            x = block(x, timestep_B, text_BD)
        return self.out(x)


def read(folder: Path, family: Family, how: Loading) -> Parts:
    """The same small random weights at every call, or those saved in how.transformer_path."""
    with torch.device("meta"):
        net = ToyNet()
    net.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(0, 0.1, generator=generator)
    if how.transformer_path is not None:
        source = weights.saved_transformer(how.transformer_path)
        weights.fit(net, from_released(weights.read(source, how.fake), {}), str(source))
    return Parts(weights.fit(net, net.state_dict(), str(folder), how.dtype, how.device, how.quantisation))


def embed(text: list[str]) -> Tensor:
    """text_BD: the mean of one hashed vector of signs per word, after a start token."""

    def word(name: str) -> list[int]:
        bits = seed_of(0, "word", name)
        return [2 * (bits >> i & 1) - 1 for i in range(TEXT)]

    return torch.stack([torch.tensor([word(w) for w in ["<s>", *line.split()]]).float().mean(0) for line in text])


def shrink(pixels_BFCHW: Tensor) -> Tensor:
    """The toy VAE's mean: the last frame of each group of time_stride, averaged over space_stride."""
    frames = pixels_BFCHW[:, :: GEOMETRY.time_stride].transpose(1, 2)
    return avg_pool3d(frames, (1, GEOMETRY.space_stride, GEOMETRY.space_stride))


def describe(parts: Parts, captions: list[str], picture_BCHW: Tensor | None = None) -> Described:
    return Described({"text": embed(captions).to(parts.device)})


def encode_clips(parts: Parts, batch: Batch, mode: str, options: dict[str, Any]) -> Encoded:
    def posterior(pixels_BFCHW: Tensor) -> Posterior:
        mean = shrink(pixels_BFCHW)
        return Posterior(mean, torch.full_like(mean, -6.0))

    x0 = posterior(batch.pixels_BFCHW)
    control = posterior(needed(batch.control_BFCHW)) if mode == "control" else torch.zeros_like(x0.mean)
    return Encoded(x0, {"control": control})


def denoise(net: nn.Module, x_BCThw: Tensor, timestep_B: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return net(x_BCThw, timestep_B, cond["text"], cond["control"])


def decode(parts: Parts, x0_BCThw: Tensor) -> Tensor:
    pixels = interpolate(x0_BCThw, scale_factor=(1, GEOMETRY.space_stride, GEOMETRY.space_stride))
    pixels = pixels.repeat_interleave(GEOMETRY.time_stride, 2)[:, :, GEOMETRY.time_stride - 1 :]
    return pixels.transpose(1, 2).clamp(-1, 1)


RENAMED = (("inp", "patch_embedding"), ("out", "head"))  # ours, released


def to_released(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    return weights.rename(state, RENAMED)


def from_released(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    return weights.rename(state, RENAMED, back=True)


def save(folder: Path, state: dict[str, Tensor], config: dict[str, Any], *, diffusers: bool = False) -> None:
    weights.write_component(folder, to_released(state, config), config)


FAMILY = Family(
    name="toy",
    source="made up for tests",
    geometry=GEOMETRY,
    objective=Flow(shift=3.0),
    modes=("control", "normal"),
    needs={"control": ("control",), "normal": ()},
    drop={"control": 0.1},
    blocks=("ToyBlock",),
    size_law=SizeLaw(),
    read=read,
    encode_clips=encode_clips,
    describe=describe,
    denoise=denoise,
    decode=decode,
    to_released=to_released,
    from_released=from_released,
    save=save,
    vae_tiles=False,
)


def find(folder: Path, settings: dict[str, Any]) -> Family | None:
    return FAMILY if (folder / "toy.json").is_file() else None
