# SPDX-License-Identifier: MIT
"""Conv1D of Hugging Face transformers: a dense layer h = x W + b, its weight (inputs, outputs)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ddpnopt.layers.base import LayerRule, register
from ddpnopt.layers.linear import LinearRule
from ddpnopt.positions import Gain
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

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """x^T V and the sum of V over the batch."""
        x, V = x.reshape(-1, x.shape[-1]), V.reshape(-1, V.shape[-1])
        return {"weight": x.T @ V, "bias": V.sum(0)}

    def onto(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gradients: Mapping[str, Tensor],
        scale: float,
    ) -> dict[str, Tensor]:
        """The sum fused into the product."""
        x, V = x.reshape(-1, x.shape[-1]), V.reshape(-1, V.shape[-1])
        found = {}
        if "weight" in gradients:
            found["weight"] = torch.addmm(gradients["weight"], x.T, V, alpha=scale)
        if "bias" in gradients:
            found["bias"] = gradients["bias"].add(V.sum(0), alpha=scale)
        return found

    def curvature(
        self, module: nn.Module, x: Tensor, V: Tensor, gain: Mapping[str, Gain], samples: int
    ) -> Tensor:
        """`LinearRule`'s; a diagonal gain has the weight's own layout: by unit columns."""
        if isinstance(gain.get("weight"), Tensor):
            return LayerRule.curvature(self, module, x, V, gain, samples)
        return super().curvature(module, x, V, gain, samples)

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """One group of the transpose."""
        return weight.mT[None]

    def from_matrix(self, module: nn.Module, W: Tensor) -> Tensor:
        """And back."""
        return W[0].mT
