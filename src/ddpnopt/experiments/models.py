# SPDX-License-Identifier: MIT
"""The networks of the experiments, addressed by short names such as `mlp-20x4-tanh`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from math import prod

from torch import Tensor, nn
from torch.nn import init

from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.nets import NET_HELP, build_net, takes_images

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
}

#: Makers of a norm over `features` channels, for flat features and for images.
FLAT_NORMS: dict[str, Callable[[int], nn.Module]] = {"bn": nn.BatchNorm1d, "ln": nn.LayerNorm}
IMAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm2d,
    # One group normalises each sample by itself, over channels and pixels.
    "gn": lambda channels: nn.GroupNorm(1, channels),
}

ARCHITECTURE_HELP = (
    "mlp-WIDTHxDEPTH-ACTIVATION (such as mlp-20x4-tanh; mlp alone is that one), "
    "cnn-CHANNELS (cnn alone is cnn-16), conv4-CHANNELS (the paper's), "
    "resnet-CHANNELSxBLOCKS (resnet alone is resnet-16x2), "
    + NET_HELP
    + " (transformer alone is transformer-32x2), "
    "linear; a norm before every activation: mlp-...-bn or -ln, cnn-...-bn or -gn, resnet-...-bn "
    "or -gn; activations: " + ", ".join(sorted(ACTIVATIONS))
)

_MLP = re.compile(r"mlp-(\d+)x(\d+)-([a-z]+)(?:-(bn|ln))?")
_CNN = re.compile(r"cnn-(\d+)(?:-(bn|gn))?")
_CONV4 = re.compile(r"conv4-(\d+)")
_RESNET = re.compile(r"resnet-(\d+)x(\d+)(?:-(bn|gn))?")
_SHORT = {
    "mlp": "mlp-20x4-tanh",
    "cnn": "cnn-16",
    "resnet": "resnet-16x2",
    "transformer": "transformer-32x2",
}


def mlp(
    inputs: int,
    classes: int,
    width: int = 20,
    depth: int = 4,
    activation: str = "tanh",
    norm: str | None = None,
) -> nn.Sequential:
    """Fully connected network inputs-width x depth-classes, PyTorch's default initialisation.

    Args:
        inputs: Number of input features.
        classes: Number of outputs.
        width: Units of every hidden layer.
        depth: Number of hidden layers; depth + 1 parametrised layers.
        activation: Name in `ACTIVATIONS`.
        norm: Name in `FLAT_NORMS` of what stands before every activation; None: nothing.

    Returns:
        The network, (B, inputs) -> (B, classes).

    Raises:
        ValueError: Unknown activation or norm.
    """
    make = lookup(ACTIVATIONS, activation, "activation")
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), *_norm(FLAT_NORMS, norm, width), make()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def _norm(
    norms: dict[str, Callable[[int], nn.Module]], name: str | None, features: int
) -> list[nn.Module]:
    return [] if name is None else [lookup(norms, name, "norm")(features)]


def _convolution(inputs: int, channels: int, norm: str | None) -> list[nn.Module]:
    """3 x 3 convolution that keeps the size, and the norm behind it."""
    return [nn.Conv2d(inputs, channels, 3, padding=1), *_norm(IMAGE_NORMS, norm, channels)]


def cnn(
    input_shape: tuple[int, ...], classes: int, channels: int = 16, norm: str | None = None
) -> nn.Sequential:
    """Small convolutional network: four 3 x 3 convolutions, two dense layers, ReLU.

    Convolutions keep the size (padding 1); one max-pooling by 2 follows the second. On 8 x 8
    inputs the dense part sees channels x 4 x 4 features and has one hidden layer of
    4 * channels units. PyTorch's default initialisation.

    Args:
        input_shape: (planes, height, width) of one sample, sides even.
        classes: Number of outputs.
        channels: Channels of every convolution.
        norm: Name in `IMAGE_NORMS` of what follows every convolution; None: nothing.

    Returns:
        The network, (B, *input_shape) -> (B, classes).

    Raises:
        ValueError: The input is not an image with even sides, or unknown norm.
    """
    if len(input_shape) != 3 or input_shape[1] % 2 or input_shape[2] % 2:
        raise ValueError(f"cnn needs images with even sides, got shape {input_shape}")
    planes, height, width = input_shape
    features = channels * (height // 2) * (width // 2)
    return nn.Sequential(
        *_convolution(planes, channels, norm),
        nn.ReLU(),
        *_convolution(channels, channels, norm),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *_convolution(channels, channels, norm),
        nn.ReLU(),
        *_convolution(channels, channels, norm),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 4 * channels),
        nn.ReLU(),
        nn.Linear(4 * channels, classes),
    )


def conv4(input_shape: tuple[int, ...], classes: int, channels: int = 32) -> nn.Sequential:
    """The paper's convolutional network: four 3 x 3 convolutions, two dense layers, ReLU.

    The paper says no more than that. Here the convolutions keep the size (padding 1), a
    max-pooling by 2 follows the first and the third, and the hidden dense layer has 2 * channels
    units, so that EKFAC's factors stay small enough to be decomposed. PyTorch's default
    initialisation.

    Args:
        input_shape: (planes, height, width) of one sample, sides divisible by 4.
        classes: Number of outputs.
        channels: Channels of every convolution.

    Returns:
        The network, (B, *input_shape) -> (B, classes).

    Raises:
        ValueError: The input is not an image with such sides.
    """
    if len(input_shape) != 3 or input_shape[1] % 4 or input_shape[2] % 4:
        raise ValueError(f"conv4 needs images with sides divisible by 4, got shape {input_shape}")
    planes, height, width = input_shape
    layers: list[nn.Module] = []
    for number in range(4):
        layers += [*_convolution(channels if number else planes, channels, None), nn.ReLU()]
        if number in (0, 2):
            layers.append(nn.MaxPool2d(2))
    features = channels * (height // 4) * (width // 4)
    dense = [nn.Linear(features, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, classes)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


class ResidualBlock(nn.Module):
    """relu(x + f(x)), f = convolution, ReLU, convolution, each with its norm.

    Args:
        channels: Channels of input and output.
        norm: Name in `IMAGE_NORMS`; None: no norm.
    """

    def __init__(self, channels: int, norm: str | None = None) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_convolution(channels, channels, norm),
            nn.ReLU(),
            *_convolution(channels, channels, norm),
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, height, width) to the same shape."""
        activated: Tensor = self.activation(x + self.branch(x))
        return activated


def resnet(
    input_shape: tuple[int, ...],
    classes: int,
    channels: int = 16,
    blocks: int = 2,
    norm: str | None = None,
) -> nn.Sequential:
    """Small residual network: a convolution, residual blocks, mean over the pixels, a dense layer.

    Args:
        input_shape: (planes, height, width) of one sample.
        classes: Number of outputs.
        channels: Channels of every convolution.
        blocks: Number of residual blocks of two convolutions.
        norm: Name in `IMAGE_NORMS` of what follows every convolution; None: nothing.

    Returns:
        The network, (B, *input_shape) -> (B, classes).

    Raises:
        ValueError: The input is not an image, or unknown norm.
    """
    if len(input_shape) != 3:
        raise ValueError(f"resnet needs images, got shape {input_shape}")
    return nn.Sequential(
        *_convolution(input_shape[0], channels, norm),
        nn.ReLU(),
        *[ResidualBlock(channels, norm) for _ in range(blocks)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )


def wants_images(name: str) -> bool:
    """Say whether the architecture `name` takes images rather than flat features."""
    full = _SHORT.get(name, name)
    return full.startswith(("cnn", "conv4", "resnet")) or takes_images(full)


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
        return mlp(prod(input_shape), classes, int(match[1]), int(match[2]), match[3], match[4])
    if (match := _CNN.fullmatch(full)) and int(match[1]) > 0:
        return cnn(input_shape, classes, int(match[1]), match[2])
    if (match := _CONV4.fullmatch(full)) and int(match[1]) > 0:
        return conv4(input_shape, classes, int(match[1]))
    if (match := _RESNET.fullmatch(full)) and int(match[1]) > 0:
        return resnet(input_shape, classes, int(match[1]), int(match[2]), match[3])
    if (net := build_net(full, input_shape, classes)) is not None:
        return net
    raise ValueError(f"unknown architecture {name!r}; known: {ARCHITECTURE_HELP}.")


#: Rules for the weights of dense and convolutional layers; "torch" leaves PyTorch's own.
INITIALISATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "torch": None,
    "xavier": init.xavier_uniform_,
    "xavier-normal": init.xavier_normal_,
    # The gain that keeps the variance through tanh.
    "xavier-tanh": partial(init.xavier_uniform_, gain=5 / 3),
    "he": partial(init.kaiming_normal_, nonlinearity="relu"),
    "he-uniform": partial(init.kaiming_uniform_, nonlinearity="relu"),
    "lecun": partial(init.kaiming_normal_, nonlinearity="linear"),
    "lecun-uniform": partial(init.kaiming_uniform_, nonlinearity="linear"),
    "orthogonal": init.orthogonal_,
    "orthogonal-relu": partial(init.orthogonal_, gain=math.sqrt(2)),
    "normal-0.01": partial(init.normal_, std=0.01),
    "normal-0.1": partial(init.normal_, std=0.1),
}
_ZERO_BIAS = "-zero-bias"
INITIALISATION_HELP = (
    ", ".join(INITIALISATIONS) + f"; each also with {_ZERO_BIAS} behind it (xavier{_ZERO_BIAS})"
)


def initialise(model: nn.Module, name: str) -> None:
    """Draw the weights of all dense and convolutional layers anew, in place.

    Args:
        model: The network.
        name: A name in `INITIALISATIONS`; with "-zero-bias" behind it the biases of these layers
            become zero, else they stay as they are.

    Raises:
        ValueError: Unknown name (the message lists the known ones).
    """
    rule = lookup(INITIALISATIONS, name.removesuffix(_ZERO_BIAS), "initialisation")
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        if rule is not None:
            rule(module.weight)
        if name.endswith(_ZERO_BIAS) and module.bias is not None:
            init.zeros_(module.bias)
