# SPDX-License-Identifier: MIT
"""Layer rules: one file per family, registered by module type."""

from ddpnopt.layers import (
    bilinear,
    cells,
    conv,
    elementwise,
    embedding,
    huggingface,
    linear,
    tied,
    transposed,
)
from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.calls import reason_against, rule_of_call
from ddpnopt.layers.matrix import MatrixRule
from ddpnopt.layers.registry import FALLBACK, RULES, register, registered, rule_for

__all__ = [
    "FALLBACK",
    "RULES",
    "LayerRule",
    "MatrixRule",
    "bilinear",
    "cells",
    "conv",
    "elementwise",
    "embedding",
    "huggingface",
    "linear",
    "reason_against",
    "register",
    "registered",
    "rule_for",
    "rule_of_call",
    "tied",
    "transposed",
]
