"""M-LSD's large network (Gu et al., arXiv:2106.00186), over stages of MobileNetV2 (arXiv:1801.04381).

Names and shapes of weights are those of mlsd_large_512_fp32.pth, a port of the released TFLite file, whose padding its
convolutions of stride 2 have: a column at the right and a row below, and none before.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of MobileNetV2 (its table 2): how far a stage widens within, its channels, its blocks, the first one's stride.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
STEM = 32
INPUTS = 4  # red, green, blue, and a plane of ones
WIDTH = 64  # of what is joined on the way up
OUTPUTS = 16
MAPS = 9  # the last of these: of line centres, both ends' places, and four that training alone needs


def _normed(came: int, goes: int, size: int = 1, *, groups: int = 1, stride: int = 1) -> list[nn.Module]:
    """A convolution without a bias, and its norm."""
    pad = 0 if stride == 2 else size // 2
    return [nn.Conv2d(came, goes, size, stride, pad, groups=groups, bias=False), nn.BatchNorm2d(goes)]


def _cut_off(came: int, goes: int, size: int = 1, *, groups: int = 1, stride: int = 1) -> nn.Sequential:
    """The same between 0 and 6; padded, where its stride is 2, as TFLite does."""
    layers = [*_normed(came, goes, size, groups=groups, stride=stride), nn.ReLU6()]
    named = {str(place): layer for place, layer in enumerate(layers)}  # as the release names them
    return nn.Sequential(OrderedDict({"pad": nn.ZeroPad2d((0, 1, 0, 1)), **named} if stride == 2 else named))


def _lit(came: int, goes: int, size: int = 1, *, dilation: int = 1) -> nn.Sequential:
    """A convolution with a bias, its norm, and nothing below 0."""
    conv = nn.Conv2d(came, goes, size, padding=dilation * (size // 2), dilation=dilation)
    return nn.Sequential(conv, nn.BatchNorm2d(goes), nn.ReLU())


class Inverted(nn.Module):
    """MobileNetV2's block: wider, each channel by itself, narrow again; added to what came where it can be."""

    def __init__(self, came: int, goes: int, stride: int, widening: int):
        super().__init__()
        inner = came * widening
        widen = [_cut_off(came, inner)] if widening > 1 else []
        alone = _cut_off(inner, inner, 3, groups=inner, stride=stride)
        self.conv = nn.Sequential(*widen, alone, *_normed(inner, goes))
        self.adds = stride == 1 and came == goes

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv(x_BCHW)
        return x_BCHW + y_BCHW if self.adds else y_BCHW


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_cut_off(INPUTS, STEM, 3, stride=2)]
        came = STEM
        for widening, goes, count, stride in STAGES:
            for place in range(count):
                blocks.append(Inverted(came, goes, 1 if place else stride, widening))
                came = goes
        self.features = nn.Sequential(*blocks)

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """What each stage ends in."""
        last, ends = 0, []
        for _, _, count, _ in STAGES:
            x_BCHW = self.features[last + 1 : last + 1 + count](x_BCHW if last else self.features[0](x_BCHW))
            last += count
            ends.append(x_BCHW)
        return ends


class Join(nn.Module):
    """Joins a finer stage and a coarser one along the channels, at the finer one's size."""

    def __init__(self, finer: int, coarser: int):
        super().__init__()
        self.conv1 = _lit(coarser, WIDTH)
        self.conv2 = _lit(finer, WIDTH)

    def forward(self, finer_BCHW: Tensor, coarser_BCHW: Tensor) -> Tensor:
        fine_BCHW, coarse_BCHW = self.conv2(finer_BCHW), self.conv1(coarser_BCHW)
        size = fine_BCHW.shape[2:]
        if coarse_BCHW.shape[2:] != size:
            coarse_BCHW = F.interpolate(coarse_BCHW, size, mode="bilinear", align_corners=True)
        return torch.cat([fine_BCHW, coarse_BCHW], 1)


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _lit(2 * WIDTH, 2 * WIDTH, 3)
        self.conv2 = _lit(2 * WIDTH, WIDTH, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv2(x_BCHW + self.conv1(x_BCHW))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = _lit(WIDTH, WIDTH, 3, dilation=5)
        self.conv2 = _lit(WIDTH, WIDTH, 3)
        self.conv3 = nn.Conv2d(WIDTH, OUTPUTS, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x_BCHW)))


class Mlsd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        *finer, coarser = (channels for _, channels, _, _ in STAGES)
        for step, channels in enumerate(reversed(finer)):
            self.add_module(f"block{15 + 2 * step}", Join(channels, WIDTH if step else coarser))
            self.add_module(f"block{16 + 2 * step}", Narrow())
        self.block23 = Head()

    def forward(self, rgb_BCHW: Tensor) -> Tensor:
        """float B 9 H/2 W/2 of RGB from 0 to 255: a line's centre as a logit, then x and y from there to each of its
        ends, in cells."""
        ones_B1HW = torch.ones_like(rgb_BCHW[:, :1])
        *finer, x_BCHW = self.backbone(torch.cat([rgb_BCHW, ones_B1HW], 1) / 127.5 - 1)
        for step, fine_BCHW in enumerate(reversed(finer)):
            joined_BCHW = self.get_submodule(f"block{15 + 2 * step}")(fine_BCHW, x_BCHW)
            x_BCHW = self.get_submodule(f"block{16 + 2 * step}")(joined_BCHW)
        return self.block23(x_BCHW)[:, -MAPS:]
