# SPDX-License-Identifier: MIT
"""Dense layers h = W x + b, with any number of leading dimensions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt.decisions import is_zero
from ddpnopt.layers.matrix import MatrixRule
from ddpnopt.layers.registry import register
from ddpnopt.positions import Diagonal, Gain, Kronecker, Product, diagonal, scalar
from ddpnopt.typing import Tensor


@register(nn.Linear)
class LinearRule(MatrixRule):
    """g_x^T v = W^T v, g_u^T v = (v x^T, v), positions are all dimensions between B and d."""

    positionwise = adds_in_place = True

    def push(self, module: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
        """W dx."""
        assert isinstance(module.weight, Tensor)
        return F.linear(dx, module.weight)

    def pull(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """W^T V."""
        assert isinstance(module.weight, Tensor)
        return V @ module.weight

    def weight_factors(self, x: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is the weight's gradient, in its own layout."""
        return V.T, x

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """V^T x and the sum of V over the batch."""
        x, V = x.reshape(-1, x.shape[-1]), V.reshape(-1, V.shape[-1])
        left, right = self.weight_factors(x, V)
        gradient = {"weight": left @ right}
        if module.bias is not None:
            gradient["bias"] = V.sum(0)
        return gradient

    def onto(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gradients: Mapping[str, Tensor],
        scale: float,
    ) -> dict[str, Tensor]:
        """The sum fused into the product."""
        if x.dim() != 2:
            x, V = x.reshape(-1, x.shape[-1]), V.reshape(-1, V.shape[-1])
        found = {}
        if "weight" in gradients:
            left, right = self.weight_factors(x, V)
            found["weight"] = torch.addmm(gradients["weight"], left, right, alpha=scale)
        if "bias" in gradients:
            found["bias"] = gradients["bias"].add(V.sum(0), alpha=scale)
        return found

    def add(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        parameters: Mapping[str, Tensor],
        scale: float,
    ) -> None:
        """The sum fused into the product, in place."""
        x, V = x.reshape(-1, x.shape[-1]), V.reshape(-1, V.shape[-1])
        if "weight" in parameters:
            left, right = self.weight_factors(x, V)
            W = parameters["weight"]
            torch.addmm(W, left, right, alpha=scale, out=W)  # `addmm_` is not counted as a product
        if "bias" in parameters:
            parameters["bias"].add_(V.sum(0), alpha=scale)

    def lengths(
        self,
        module: nn.Module,
        x: Tensor,
        v: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """At one position: (P_W |x|^2 + P_b) |v|^2, or v^2 . (P_W x^2 + P_b)."""
        if x.dim() == 2 and x.shape[0] == samples:
            P_W, P_b = gain.get("weight", 0.0), gain.get("bias", 0.0)
            if scalar(P_W) and scalar(P_b):
                return v.square().sum(1).mul_(x.square().sum(1).mul_(P_W).add_(P_b))
            if diagonal(P_W) and (diagonal(P_b) or "bias" not in gain):
                D = F.linear(x.square(), P_W, P_b if diagonal(P_b) else None)
                return D.mul_(v).mul_(v).sum(1)
        return super().lengths(module, x, v, gain, samples, sketch)

    def curvature(
        self, module: nn.Module, x: Tensor, V: Tensor, gain: Mapping[str, Gain], samples: int
    ) -> Tensor:
        """At one position: (P_W |x|^2 + P_b) I, diag(P_W x^2 + P_b), or (x^T A^-1 x) G^-1."""
        P_W, P_b = gain.get("weight", 0.0), gain.get("bias", 0.0)
        if x.dim() != 2 or x.shape[0] != samples or isinstance(P_b, Kronecker):
            return super().curvature(module, x, V, gain, samples)
        if isinstance(P_W, Kronecker):
            found = _kronecker_curvature(P_W, x)
        elif diagonal(P_W):
            found = torch.diag_embed(x.square() @ P_W.mT)
        else:
            scale = x.square().sum(1).mul_(P_W)
            if not diagonal(P_b):
                scale.add_(P_b)
                P_b = 0.0
            found = torch.diag_embed(scale[:, None].expand(-1, V.shape[1]))
        if not is_zero(P_b):
            found.diagonal(dim1=1, dim2=2).add_(P_b)
        return found

    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """x itself."""
        return x.reshape(samples, 1, -1, x.shape[-1])

    def outputs(self, module: nn.Module, V: Tensor, samples: int) -> Tensor:
        """V itself."""
        return V.reshape(V.shape[0], samples, 1, -1, V.shape[-1])

    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """One group."""
        return weight[None]

    def from_matrix(self, module: nn.Module, W: Tensor) -> Tensor:
        """One group."""
        return W[0]


def _kronecker_curvature(P: Kronecker, x: Tensor) -> Tensor:
    """(x^T A^-1 x) G^-1 for each sample, or T_G^T diag_o(sum_j scale_oj (T_A x)_j^2) T_G."""
    x = P.joins(x)
    image, G = x @ P.A[0].to(x.dtype).mT, P.G[0].to(x.dtype)
    if isinstance(P, Product):
        return ((image * x).sum(1) * P.scale)[:, None, None] * G
    assert isinstance(P, Diagonal)
    rows = image.square() @ P.scale[0].to(x.dtype).mT
    return G.mT @ (rows[:, :, None] * G)
