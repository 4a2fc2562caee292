# SPDX-License-Identifier: MIT
"""Residual networks (He et al. 2016): ResNet-20 for small images, ResNet-18 and ResNet-50."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

#: Makers of what follows a convolution of that many channels.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    "gn": lambda channels: nn.GroupNorm(math.gcd(channels, 4), channels),
    "none": lambda channels: nn.Identity(),
}


def _convolution(inputs: int, outputs: int, kernel: int, norm: str, stride: int = 1) -> nn.Module:
    """Convolution that keeps the size but for the stride, and its norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=norm == "none"),
        NORMS[norm](outputs),
    )


class ResidualUnit(nn.Module):
    """relu(shortcut(x) + branch(x)); the shortcut is x where the shapes agree.

    Args:
        inputs: Channels of x.
        channels: Channels within the branch.
        stride: Of the branch's first 3 x 3 convolution.
        norm: Name in `NORMS`.
        bottleneck: 1 x 1, 3 x 3, 1 x 1 convolutions with four times as many channels at the end,
            rather than two of 3 x 3.
    """

    def __init__(
        self, inputs: int, channels: int, stride: int, norm: str, bottleneck: bool
    ) -> None:
        super().__init__()
        outputs = channels * 4 if bottleneck else channels
        if bottleneck:
            parts = [
                _convolution(inputs, channels, 1, norm),
                nn.ReLU(inplace=True),
                _convolution(channels, channels, 3, norm, stride),
                nn.ReLU(inplace=True),
                _convolution(channels, outputs, 1, norm),
            ]
        else:
            parts = [
                _convolution(inputs, channels, 3, norm, stride),
                nn.ReLU(inplace=True),
                _convolution(channels, channels, 3, norm),
            ]
        self.branch = nn.Sequential(*parts)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _convolution(inputs, outputs, 1, norm, stride)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, height, width) -> (B, outputs, height / stride, width / stride)."""
        out: Tensor = self.branch(x)
        out += self.shortcut(x)  # in place, as torchvision's are
        activated: Tensor = self.activation(out)
        return activated


class ResNet(nn.Module):
    """A stem, stages of residual units, mean over the pixels, a dense layer.

    Args:
        stem: What comes before the stages.
        width: Channels of the stem's output and of the first stage; doubled by every stage.
        units: Number of units of each stage; all stages but the first begin with a stride of 2.
        classes: Number of outputs.
        norm: Name in `NORMS`.
        bottleneck: See `ResidualUnit`.
    """

    def __init__(
        self,
        stem: nn.Module,
        width: int,
        units: Sequence[int],
        classes: int,
        norm: str,
        bottleneck: bool,
    ) -> None:
        super().__init__()
        self.stem = stem
        stages: list[nn.Module] = []
        inputs = width
        for number, count in enumerate(units):
            channels = width * 2**number
            for unit in range(count):
                stride = 2 if number and not unit else 1
                stages.append(ResidualUnit(inputs, channels, stride, norm, bottleneck))
                inputs = channels * 4 if bottleneck else channels
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, planes, height, width) -> (B, classes)."""
        logits: Tensor = self.head(self.pool(self.stages(self.stem(x))).flatten(1))
        return logits


def resnet20(
    classes: int = 10, width: int = 16, norm: str = "bn", planes: int = 3, stride: int = 1
) -> ResNet:
    """ResNet-20 for images of 32 x 32: three stages of three units of two convolutions.

    Args:
        classes: Number of outputs.
        width: Channels of the first stage.
        norm: "bn" (BatchNorm), "gn" (GroupNorm of four groups) or "none".
        planes: Channels of the images.
        stride: Of the first convolution; 2 quarters the cost.
    """
    stem = nn.Sequential(_convolution(planes, width, 3, norm, stride), nn.ReLU(inplace=True))
    return ResNet(stem, width, (3, 3, 3), classes, norm, bottleneck=False)


def _imagenet_stem(planes: int, width: int, norm: str) -> nn.Module:
    return nn.Sequential(
        _convolution(planes, width, 7, norm, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    )


def resnet18(classes: int = 1000, width: int = 64, norm: str = "bn", planes: int = 3) -> ResNet:
    """ResNet-18 in the layout for ImageNet: four stages of two units of two convolutions.

    Args:
        classes: Number of outputs.
        width: Channels of the first stage.
        norm: "bn", "gn" or "none", see `resnet20`.
        planes: Channels of the images.
    """
    stem = _imagenet_stem(planes, width, norm)
    return ResNet(stem, width, (2, 2, 2, 2), classes, norm, bottleneck=False)


def resnet50(classes: int = 1000, width: int = 64, norm: str = "bn", planes: int = 3) -> ResNet:
    """ResNet-50 in the layout for ImageNet: stages of 3, 4, 6 and 3 units with bottlenecks.

    Args:
        classes: Number of outputs.
        width: Channels of the first stage within its bottlenecks.
        norm: "bn", "gn" or "none", see `resnet20`.
        planes: Channels of the images.
    """
    stem = _imagenet_stem(planes, width, norm)
    return ResNet(stem, width, (3, 4, 6, 3), classes, norm, bottleneck=True)
