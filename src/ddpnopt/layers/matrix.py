# SPDX-License-Identifier: MIT
"""Layers that apply one matrix at many positions; the products are in `ddpnopt.positions`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.func import vmap

from ddpnopt.layers.base import LayerRule
from ddpnopt.positions import (
    Gain,
    Kronecker,
    bias_gram,
    diagonal,
    sample_gradients,
    total,
    weight_gram,
    weight_squares,
)
from ddpnopt.typing import Tensor


class MatrixRule(LayerRule, ABC):
    """h[b, g, t, o] = sum_i W[g, o, i] U[b, g, t, i] (+ bias[g, o])."""

    holds_weight = True
    #: The bias is the weight of a constant input (so that curvatures can treat both as one).
    joins_bias: bool = True

    @abstractmethod
    def inputs(self, module: nn.Module, x: Tensor, samples: int) -> Tensor:
        """U (b, g, t, i); rows folded into the batch become positions."""

    @abstractmethod
    def outputs(self, module: nn.Module, V: Tensor, samples: int) -> Tensor:
        """Columns (r, *h.shape) as (r, b, g, t, o)."""

    @abstractmethod
    def to_matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (g, o, i)."""

    @abstractmethod
    def from_matrix(self, module: nn.Module, W: Tensor) -> Tensor:
        """And back."""

    def width(self, module: nn.Module) -> int:
        """Number of inputs i, without the constant."""
        return self.to_matrix(module, cast(Tensor, module.weight)).shape[-1]

    def bias_columns(self, module: nn.Module, V: Tensor, samples: int) -> Tensor:
        """Columns (r, b, g, t, o) whose sum over positions is the bias's gradient."""
        return self.outputs(module, V, samples)

    def along(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        change: Mapping[str, Tensor],
        samples: int,
    ) -> Tensor:
        """One product more: (dW x + db) . V."""
        total = V.new_zeros(samples, V.shape[0])
        if "weight" in change:
            U, columns = self.inputs(module, x, samples), self.outputs(module, V, samples)
            pushed = U @ self.to_matrix(module, change["weight"]).mT
            total = total + torch.einsum("bgto,rbgto->br", pushed, columns)
        if "bias" in change:
            v = self.bias_columns(module, V, samples).sum(3)
            total = total + torch.einsum("rbgo,go->br", v, change["bias"].reshape(v.shape[2:]))
        return total

    def joined(self, module: nn.Module, gradients: Mapping[str, Tensor], bias: bool) -> Tensor:
        """The gradients of weight and bias as one matrix (g, o, i [+ 1])."""
        W = self.to_matrix(module, gradients["weight"])
        if not bias:
            return W
        return torch.cat([W, gradients["bias"].reshape(W.shape[0], -1, 1)], -1)

    def parted(self, module: nn.Module, D: Tensor, bias: bool) -> dict[str, Tensor]:
        """And back, by parameter name."""
        if not bias:
            return {"weight": self.from_matrix(module, D)}
        weight = self.from_matrix(module, D[..., :-1])
        return {"weight": weight, "bias": D[..., -1].reshape(-1)}

    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """Exact, by `positions.weight_gram`; a Kronecker gain of the weight includes the bias."""
        parts = []
        if "weight" in gain:
            P = gain["weight"]
            if diagonal(P):
                P = self.to_matrix(module, P)
            U = self.inputs(module, x, samples)
            parts.append(weight_gram(U, self.outputs(module, V, samples), P))
        if "bias" in gain:
            P = gain["bias"]
            assert not isinstance(P, Kronecker)
            columns = self.bias_columns(module, V, samples)
            P = P.reshape(columns.shape[2], -1) if diagonal(P) else P
            parts.append(bias_gram(columns, P))
        return total(parts, V, samples)

    def sample_gradients(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> dict[str, Tensor]:
        """Products over positions, formed one by one: for inspection; `gram` avoids them."""
        W = sample_gradients(self.inputs(module, x, samples), self.outputs(module, V, samples))
        to_weight = vmap(vmap(lambda one: self.from_matrix(module, one)))
        found: dict[str, Tensor] = {"weight": to_weight(W)}
        if module.bias is not None:
            columns = self.bias_columns(module, V, samples)
            found["bias"] = columns.sum(3).reshape(V.shape[0], samples, -1)
        return found

    def mixed(self, module: nn.Module, x: Tensor, dx: Tensor, V: Tensor) -> dict[str, Tensor]:
        """The weight's gradient at dx in place of x; the bias knows nothing of the state."""
        found = self.gradient(module, dx, V)
        return {name: g if name == "weight" else torch.zeros_like(g) for name, g in found.items()}

    def state_curvature(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> Tensor | None:
        """None: h is linear in x."""
        return None

    def squares(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> dict[str, Tensor]:
        """Squares of the per-sample gradients; (V^2)^T x^2 for one position."""
        columns = self.outputs(module, V[None], samples)[0]
        weight = weight_squares(self.inputs(module, x, samples), columns)
        squares = {"weight": self.from_matrix(module, weight)}
        if module.bias is not None:
            columns = self.bias_columns(module, V[None], samples)[0]
            squares["bias"] = columns.sum(2).square().sum(0).reshape(-1)
        return squares
