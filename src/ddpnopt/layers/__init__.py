# SPDX-License-Identifier: MIT
"""Layer rules: one file per family, registered by module type."""

from ddpnopt.layers import conv, elementwise, linear
from ddpnopt.layers.base import (
    FALLBACK,
    RULES,
    LayerRule,
    reason_against,
    register,
    registered,
    rule_for,
)
from ddpnopt.layers.matrix import MatrixRule

__all__ = [
    "FALLBACK",
    "RULES",
    "LayerRule",
    "MatrixRule",
    "conv",
    "elementwise",
    "linear",
    "reason_against",
    "register",
    "registered",
    "rule_for",
]
