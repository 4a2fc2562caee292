# SPDX-License-Identifier: MIT
"""Dense layers h = W x + b, with any number of leading dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt.layers.base import LayerRule, register
from ddpnopt.layers.positions import Gain, bias_gram, total, weight_gram, weight_squares
from ddpnopt.typing import Tensor


@register(nn.Linear)
class LinearRule(LayerRule):
    """g_x^T v = W^T v, g_u^T v = (v x^T, v), positions are all dimensions between B and d."""

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        """W x."""
        return F.linear(x, cast(nn.Linear, module).weight)

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """V^T x and the sum of V over the batch."""
        x, V = x.reshape(-1, x.shape[-1]), V.reshape(-1, V.shape[-1])
        gradient = {"weight": V.T @ x}
        if module.bias is not None:
            gradient["bias"] = V.sum(0)
        return gradient

    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """|x|^2 V^T V for one position and M = I; see positions.py for the rest."""
        U = x.reshape(samples, 1, -1, x.shape[-1])
        V = V.reshape(V.shape[0], samples, 1, -1, V.shape[-1])
        parts = []
        if "weight" in gain:
            P = gain["weight"]
            parts.append(weight_gram(U, V, P[None] if isinstance(P, Tensor) else P))
        if "bias" in gain:
            parts.append(bias_gram(V, gain["bias"]))
        return total(parts, V, samples)

    def squares(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> dict[str, Tensor]:
        """(V^2)^T x^2 for one position."""
        U = x.reshape(samples, 1, -1, x.shape[-1])
        V = V.reshape(samples, 1, -1, V.shape[-1])
        squares = {"weight": weight_squares(U, V)[0]}
        if module.bias is not None:
            squares["bias"] = V.sum((1, 2)).square().sum(0)
        return squares
