# SPDX-License-Identifier: MIT
"""Conv1D of Hugging Face transformers: a dense layer h = x W + b, its weight (inputs, outputs)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.linear import LinearRule
from ddpnopt.layers.registry import register
from ddpnopt.positions import Gain, diagonal
from ddpnopt.typing import Tensor


@register("transformers.pytorch_utils.Conv1D")
class Conv1DRule(LinearRule):
    """`LinearRule` with the weight's transpose as the layer's matrix."""

    def push(self, module: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
        """dx W."""
        assert isinstance(module.weight, Tensor)
        return dx @ module.weight

    def pull(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """V W^T."""
        assert isinstance(module.weight, Tensor)
        return V @ module.weight.mT

    def weight_factors(self, x: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """x^T V, the transpose of a dense layer's."""
        return x.T, V

    def curvature(
        self, module: nn.Module, x: Tensor, V: Tensor, gain: Mapping[str, Gain], samples: int
    ) -> Tensor:
        """`LinearRule`'s; a diagonal gain has the weight's own layout: by unit columns."""
        if diagonal(gain.get("weight", 0.0)):
            return LayerRule.curvature(self, module, x, V, gain, samples)
        return super().curvature(module, x, V, gain, samples)

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """One group of the transpose."""
        return weight.mT[None]

    def from_matrix(self, module: nn.Module, W: Tensor) -> Tensor:
        """And back."""
        return W[0].mT
