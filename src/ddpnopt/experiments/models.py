# SPDX-License-Identifier: MIT
"""The networks of the experiments, addressed by short names such as `mlp-20x4-tanh`."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import prod

from torch import nn

from ddpnopt.experiments.names import lookup

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
}

ARCHITECTURE_HELP = (
    "mlp-WIDTHxDEPTH-ACTIVATION (such as mlp-20x4-tanh; mlp alone is that one), "
    "cnn-CHANNELS (cnn alone is cnn-16), linear; activations: " + ", ".join(sorted(ACTIVATIONS))
)

_MLP = re.compile(r"mlp-(\d+)x(\d+)-([a-z]+)")
_CNN = re.compile(r"cnn-(\d+)")
_SHORT = {"mlp": "mlp-20x4-tanh", "cnn": "cnn-16"}


def mlp(
    inputs: int, classes: int, width: int = 20, depth: int = 4, activation: str = "tanh"
) -> nn.Sequential:
    """Fully connected network inputs-width x depth-classes, PyTorch's default initialisation.

    Args:
        inputs: Number of input features.
        classes: Number of outputs.
        width: Units of every hidden layer.
        depth: Number of hidden layers; depth + 1 parametrised layers.
        activation: Name in `ACTIVATIONS`.

    Returns:
        The network, (B, inputs) -> (B, classes).

    Raises:
        ValueError: Unknown activation.
    """
    make = lookup(ACTIVATIONS, activation, "activation")
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), make()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def cnn(input_shape: tuple[int, ...], classes: int, channels: int = 16) -> nn.Sequential:
    """Small convolutional network: four 3 x 3 convolutions, two dense layers, ReLU.

    Convolutions keep the size (padding 1); one max-pooling by 2 follows the second. On 8 x 8
    inputs the dense part sees channels x 4 x 4 features and has one hidden layer of
    4 * channels units. PyTorch's default initialisation.

    Args:
        input_shape: (planes, height, width) of one sample, sides even.
        classes: Number of outputs.
        channels: Channels of every convolution.

    Returns:
        The network, (B, *input_shape) -> (B, classes).

    Raises:
        ValueError: The input is not an image with even sides.
    """
    if len(input_shape) != 3 or input_shape[1] % 2 or input_shape[2] % 2:
        raise ValueError(f"cnn needs images with even sides, got shape {input_shape}")
    planes, height, width = input_shape
    features = channels * (height // 2) * (width // 2)
    return nn.Sequential(
        nn.Conv2d(planes, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 4 * channels),
        nn.ReLU(),
        nn.Linear(4 * channels, classes),
    )


def wants_images(name: str) -> bool:
    """Say whether the architecture `name` takes images rather than flat features."""
    return name.startswith("cnn")


def build_model(name: str, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build the network that `name` describes.

    Args:
        name: See `ARCHITECTURE_HELP`.
        input_shape: Shape of one sample.
        classes: Number of outputs.

    Returns:
        A freshly initialised network (torch's global generator is used).

    Raises:
        ValueError: The name follows none of the patterns (the message lists them), a size is
            zero, or the network can't take such inputs.
    """
    full = _SHORT.get(name, name)
    if full == "linear":
        return nn.Linear(prod(input_shape), classes)
    if (match := _MLP.fullmatch(full)) and int(match[1]) > 0:
        return mlp(prod(input_shape), classes, int(match[1]), int(match[2]), match[3])
    if (match := _CNN.fullmatch(full)) and int(match[1]) > 0:
        return cnn(input_shape, classes, int(match[1]))
    raise ValueError(f"unknown architecture {name!r}; known: {ARCHITECTURE_HELP}.")
