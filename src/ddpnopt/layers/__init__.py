# SPDX-License-Identifier: MIT
"""Layer rules: one file per family, registered by module type."""

from ddpnopt.layers import bilinear, conv, elementwise, embedding, linear
from ddpnopt.layers.base import (
    FALLBACK,
    RULES,
    LayerRule,
    reason_against,
    register,
    registered,
    rule_for,
    rule_of_call,
)
from ddpnopt.layers.matrix import MatrixRule

__all__ = [
    "FALLBACK",
    "RULES",
    "LayerRule",
    "MatrixRule",
    "bilinear",
    "conv",
    "elementwise",
    "embedding",
    "linear",
    "reason_against",
    "register",
    "registered",
    "rule_for",
    "rule_of_call",
]
