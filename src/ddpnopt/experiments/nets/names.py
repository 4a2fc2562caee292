# SPDX-License-Identifier: MIT
"""Short names of the networks of this package, such as `resnet20-8s2-gn`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import nn

from ddpnopt.experiments.nets.densenet import DenseNet
from ddpnopt.experiments.nets.graph import GraphNet
from ddpnopt.experiments.nets.inception import Inception
from ddpnopt.experiments.nets.language import LanguageModel, TextClassifier
from ddpnopt.experiments.nets.recurrent import Recurrent
from ddpnopt.experiments.nets.resnet import resnet18, resnet20, resnet50
from ddpnopt.experiments.nets.transformer import Transformer
from ddpnopt.experiments.nets.vae import VAE
from ddpnopt.experiments.tasks import ALPHABET

Shape = tuple[int, ...]

NET_HELP = (
    "resnet20-WIDTH-NORM, resnet18-WIDTH-NORM and resnet50-WIDTH-NORM (norm bn, gn or none; "
    "resnet20-8s2-gn begins with a stride of 2), inception-WIDTH, densenet-GROWTH, "
    "transformer-WIDTHxBLOCKS, encoder-WIDTHxBLOCKS (the same with attention of dense layers), "
    "gru-WIDTH and lstm-WIDTH, gpt-WIDTHxBLOCKS and text-WIDTHxBLOCKS (text), vae-WIDTH, "
    "graphnet-WIDTH (graphs)"
)


@dataclass(frozen=True)
class _Kind:
    """One pattern of names.

    Attributes:
        pattern: Of the whole name; its first group is the width.
        build: Makes the network from the input's shape, the number of classes and the groups.
        images: It takes images, (planes, height, width).
    """

    pattern: str
    build: Callable[[Shape, int, tuple[str, ...]], nn.Module]
    images: bool = True


_KINDS = (
    _Kind(
        r"resnet20-(\d+)(?:s(\d))?-(bn|gn|none)",
        lambda shape, classes, g: resnet20(classes, int(g[0]), g[2], shape[0], int(g[1] or 1)),
    ),
    _Kind(
        r"resnet18-(\d+)-(bn|gn|none)",
        lambda shape, classes, g: resnet18(classes, int(g[0]), g[1], shape[0]),
    ),
    _Kind(
        r"resnet50-(\d+)-(bn|gn|none)",
        lambda shape, classes, g: resnet50(classes, int(g[0]), g[1], shape[0]),
    ),
    _Kind(r"inception-(\d+)", lambda shape, classes, g: Inception(shape[0], classes, int(g[0]))),
    _Kind(r"densenet-(\d+)", lambda shape, classes, g: DenseNet(shape[0], classes, int(g[0]))),
    _Kind(
        r"transformer-(\d+)x(\d+)",
        lambda shape, classes, g: Transformer(shape, classes, int(g[0]), int(g[1])),
    ),
    _Kind(
        r"encoder-(\d+)x(\d+)",
        lambda shape, classes, g: Transformer(shape, classes, int(g[0]), int(g[1]), own=True),
    ),
    _Kind(
        r"gru-(\d+)",
        lambda shape, classes, g: Recurrent(shape[0] * shape[2], classes, int(g[0])),
    ),
    _Kind(
        r"lstm-(\d+)",
        lambda shape, classes, g: Recurrent(shape[0] * shape[2], classes, int(g[0]), lstm=True),
    ),
    _Kind(
        r"gpt-(\d+)x(\d+)",
        lambda shape, classes, g: LanguageModel(classes, shape[0], int(g[0]), int(g[1])),
        images=False,
    ),
    _Kind(
        r"text-(\d+)x(\d+)",
        lambda shape, classes, g: TextClassifier(
            len(ALPHABET), shape[0], classes, int(g[0]), int(g[1])
        ),
        images=False,
    ),
    _Kind(r"vae-(\d+)", lambda shape, _, g: VAE(prod(shape), int(g[0])), images=False),
    _Kind(
        r"graphnet-(\d+)",
        lambda shape, classes, g: GraphNet(shape[1] - shape[0], classes, int(g[0])),
        images=False,
    ),
)


def _find(name: str) -> tuple[_Kind, tuple[str, ...]] | None:
    for kind in _KINDS:
        match = re.fullmatch(kind.pattern, name)
        if match and int(match[1]) > 0:
            return kind, match.groups()
    return None


def takes_images(name: str) -> bool:
    """Say whether `name` is a network of this package that takes images."""
    found = _find(name)
    return found is not None and found[0].images


def build_net(name: str, input_shape: Shape, classes: int) -> nn.Module | None:
    """Build the network that `name` describes.

    Args:
        name: See `NET_HELP`.
        input_shape: Shape of one sample.
        classes: Number of outputs.

    Returns:
        A freshly initialised network; None for a name of no network of this package.

    Raises:
        ValueError: The network needs images and the inputs are none.
    """
    found = _find(name)
    if found is None:
        return None
    kind, groups = found
    if kind.images and len(input_shape) != 3:
        raise ValueError(f"{name.partition('-')[0]} needs images, got shape {input_shape}")
    return kind.build(input_shape, classes, groups)
