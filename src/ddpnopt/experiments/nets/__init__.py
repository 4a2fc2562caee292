# SPDX-License-Identifier: MIT
"""Networks that are no chains, in plain torch: nothing in them knows of ddpnopt.

They need torch alone, and serve the examples, the study of `any_network` and the tests.
"""

from ddpnopt.experiments.nets.densenet import DenseNet
from ddpnopt.experiments.nets.graph import GraphNet
from ddpnopt.experiments.nets.inception import Inception
from ddpnopt.experiments.nets.language import LanguageModel, TextClassifier
from ddpnopt.experiments.nets.names import NET_HELP, build_net, takes_images
from ddpnopt.experiments.nets.recurrent import Recurrent
from ddpnopt.experiments.nets.resnet import ResNet, resnet18, resnet20, resnet50
from ddpnopt.experiments.nets.transformer import SelfAttention, Transformer, TransformerBlock
from ddpnopt.experiments.nets.vae import VAE, negative_elbo

__all__ = [
    "NET_HELP",
    "VAE",
    "DenseNet",
    "GraphNet",
    "Inception",
    "LanguageModel",
    "Recurrent",
    "ResNet",
    "SelfAttention",
    "TextClassifier",
    "Transformer",
    "TransformerBlock",
    "build_net",
    "negative_elbo",
    "resnet18",
    "resnet20",
    "resnet50",
    "takes_images",
]
