# SPDX-License-Identifier: MIT
"""A small DenseNet (Huang et al. 2017): every layer sees the outputs of all before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseBlock(nn.Module):
    """Convolutions of which each reads the block's input and all outputs of the earlier ones.

    Args:
        inputs: Channels of the block's input.
        growth: Channels that each convolution adds.
        layers: Number of convolutions.
    """

    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, inputs + k * growth),
                nn.ReLU(),
                nn.Conv2d(inputs + k * growth, growth, 3, padding=1),
            )
            for k in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, height, width) -> (B, inputs + layers * growth, height, width)."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNet(nn.Module):
    """A convolution, two dense blocks with a halving between them, a dense layer.

    Args:
        planes: Channels of the images.
        classes: Number of outputs.
        growth: See `DenseBlock`.
        layers: See `DenseBlock`.
    """

    def __init__(
        self, planes: int = 1, classes: int = 10, growth: int = 8, layers: int = 3
    ) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Conv2d(planes, width, 3, padding=1)
        self.first = DenseBlock(width, growth, layers)
        width += layers * growth
        self.between = nn.Sequential(nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2))
        self.second = DenseBlock(width // 2, growth, layers)
        width = width // 2 + layers * growth
        self.norm, self.head = nn.GroupNorm(1, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, planes, height, width) -> (B, classes)."""
        x = self.norm(self.second(self.between(self.first(self.stem(x)))))
        logits: Tensor = self.head(torch.relu(x).mean((2, 3)))
        return logits
