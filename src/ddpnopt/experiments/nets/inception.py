# SPDX-License-Identifier: MIT
"""A small Inception network (Szegedy et al. 2015): parallel branches, joined by concatenation.

With GroupNorm behind every convolution, where the second version has BatchNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.GroupNorm(1, outputs),
        nn.ReLU(),
    )


class InceptionBlock(nn.Module):
    """Four branches side by side: 1 x 1; 3 x 3; two of 3 x 3; pooling and 1 x 1.

    Args:
        inputs: Channels of the input.
        width: Channels of each branch; the output has four times as many.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.point = _convolution(inputs, width, 1)
        self.near = nn.Sequential(_convolution(inputs, width, 1), _convolution(width, width, 3))
        self.far = nn.Sequential(
            _convolution(inputs, width, 1),
            _convolution(width, width, 3),
            _convolution(width, width, 3),
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _convolution(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, height, width) -> (B, 4 * width, height, width)."""
        return torch.cat([self.point(x), self.near(x), self.far(x), self.pooled(x)], 1)


class Inception(nn.Module):
    """A convolution, two blocks with a pooling between them, mean over the pixels, a dense layer.

    Args:
        planes: Channels of the images.
        classes: Number of outputs.
        width: Channels of each branch.
    """

    def __init__(self, planes: int = 1, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.stem = _convolution(planes, 2 * width, 3)
        self.first = InceptionBlock(2 * width, width)
        self.pool = nn.MaxPool2d(2)
        self.second = InceptionBlock(4 * width, width)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, planes, height, width) -> (B, classes)."""
        x = self.second(self.pool(self.first(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
