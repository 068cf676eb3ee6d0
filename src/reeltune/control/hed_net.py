"""HED's network (Xie and Tu, arXiv:1504.06375), as ControlNet's release has it: five stages of VGG, each of which tells
edges of its own size.

Names and shapes of weights are those of ControlNetHED.pth. It takes RGB from 0 to 255, less a colour of its own.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions and channels of VGG-16 (arXiv:1409.1556)


class Stage(nn.Module):
    def __init__(self, before: int, channels: int, count: int):
        super().__init__()
        widths = [before] + [channels] * count
        self.convs = nn.ModuleList(nn.Conv2d(came, goes, 3, padding=1) for came, goes in pairwise(widths))
        self.projection = nn.Conv2d(channels, 1, 1)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(features, logits of its edges)."""
        for conv in self.convs:
            x_BCHW = F.relu(conv(x_BCHW))
        return x_BCHW, self.projection(x_BCHW)


class Hed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(1, 3, 1, 1))
        before = 3
        for place, (count, channels) in enumerate(STAGES, 1):
            self.add_module(f"block{place}", Stage(before, channels, count))
            before = channels

    def forward(self, rgb_BCHW: Tensor) -> Tensor:
        """float B 1 H W: the mean of all stages' logits, each brought to the picture's size."""
        x_BCHW, told = rgb_BCHW - self.norm, []
        for place, stage in enumerate(self.children()):
            x_BCHW, edges_B1HW = stage(F.max_pool2d(x_BCHW, 2) if place else x_BCHW)
            told.append(F.interpolate(edges_B1HW, rgb_BCHW.shape[2:], mode="bilinear"))
        return torch.stack(told).mean(0)
