# SPDX-License-Identifier: MIT
"""Layer rules: one file per family, registered by module type."""

from ddpnopt.layers import conv, linear
from ddpnopt.layers.base import RULES, LayerRule, register, rule_for
from ddpnopt.layers.positions import Gain

__all__ = ["RULES", "Gain", "LayerRule", "conv", "linear", "register", "rule_for"]
