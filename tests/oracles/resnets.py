# SPDX-License-Identifier: MIT
"""Residual nets as vision libraries write them: sums and ReLU in place, projections run last."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.Module:
    """Two groups."""
    return nn.GroupNorm(2, channels)


class Block(nn.Module):
    """A residual block; with a bottleneck, of three convolutions."""

    def __init__(
        self, inside: int, width: int, stride: int, norm: Norm, wide: int, in_place: bool
    ) -> None:
        """``wide`` is the factor of the output's width: 1 for two convolutions."""
        super().__init__()
        self.in_place, out = in_place, width * wide
        if wide == 1:
            shapes = [(inside, width, 3, stride), (width, out, 3, 1)]
        else:
            shapes = [(inside, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        for k, (i, o, size, step) in enumerate(shapes, 1):
            conv = nn.Conv2d(i, o, size, step, size // 2, bias=False)
            self.add_module(f"conv{k}", conv)
            self.add_module(f"bn{k}", norm(o))
        self.count = len(shapes)
        self.relu = nn.ReLU(inplace=in_place)
        self.downsample: nn.Module | None = None
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, out, 1, stride, bias=False), norm(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's own way to add."""
        identity = out = x
        for k in range(1, self.count + 1):
            out = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(out))
            if k < self.count:
                out = self.relu(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        if self.in_place:
            out += identity
        else:
            out = out + identity
        made: Tensor = self.relu(out)
        return made


class ResNet(nn.Module):
    """Four stages of blocks.

    Args:
        depths: Blocks of each stage: 2, 2, 2, 2 for 18 layers; 3, 4, 6, 3 for 50.
        wide: 1, or 4 for bottlenecks.
        norm: Of so many channels.
        in_place: As libraries write it.
        width: Channels of the first stage.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        wide: int,
        norm: Norm,
        in_place: bool = True,
        width: int = 4,
        classes: int = 3,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1, self.relu = norm(width), nn.ReLU(inplace=in_place)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks, inside = [], width
        for k, depth in enumerate(depths):
            for number in range(depth):
                stride = 2 if k and not number else 1
                blocks.append(Block(inside, width << k, stride, norm, wide, in_place))
                inside = (width << k) * wide
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Stem, blocks, mean, head."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        made: Tensor = self.fc(self.blocks(x).mean((2, 3)))
        return made


def twins(depths: tuple[int, ...], wide: int, norm: Norm) -> tuple[ResNet, ResNet]:
    """In place and on copies, of the same weights, in float64."""
    torch.manual_seed(0)
    first = ResNet(depths, wide, norm).double()
    second = ResNet(depths, wide, norm, in_place=False).double()
    second.load_state_dict(first.state_dict())
    return first, second
