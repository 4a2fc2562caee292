# SPDX-License-Identifier: MIT
"""Layers that apply one matrix at many positions; the products are in `ddpnopt.positions`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.func import vmap

from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.coordinates import Rotated
from ddpnopt.positions import (
    AT_ONCE,
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

    def input_products(self, module: nn.Module, x: Tensor, samples: int, bias: bool) -> Tensor:
        """Sum over samples and positions of u u^T (g, i, i), u with the constant 1 if it joins."""
        parts = self._some_samples(module, samples, x)
        return _summed(_products(self.inputs(module, x, n), bias) for n, x in parts)

    def output_products(self, module: nn.Module, V: Tensor, samples: int) -> tuple[Tensor, int]:
        """Sum over samples and positions of v v^T (g, o, o), and how many v there are."""
        columns = self.outputs(module, V[None], samples)[0]
        return _products(columns, False), columns.shape[0] * columns.shape[2]

    def rotated(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        samples: int,
        basis: tuple[Tensor, Tensor],
        bias: bool,
    ) -> Rotated | None:
        """The samples' gradients in an eigenbasis, where the rule will form them anyway."""
        return None

    def rotated_squares(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        samples: int,
        basis: tuple[Tensor, Tensor],
        bias: bool,
    ) -> Tensor:
        """Sum over samples of the squares of T_G D T_A^T (g, o, i), (T_A, T_G) the basis."""
        parts = self._some_samples(module, samples, x, V)
        return _summed(
            weight_squares(
                self.inputs(module, x, n), self.outputs(module, V[None], n)[0], basis, bias
            )
            for n, x, V in parts
        )

    def _some_samples(
        self, module: nn.Module, samples: int, *tensors: Tensor
    ) -> Iterator[tuple[Any, ...]]:
        """Some samples after the others: how many, and their rows of each tensor.

        The inputs of a convolution are as many times its states as its kernel has places: unfolded
        for a whole batch they leave every cache.
        """
        x = tensors[0]
        elements = self.unfolded(module, x)
        step = max(1, samples * AT_ONCE // max(1, elements))
        if step >= samples or any(len(t) % samples for t in tensors):
            yield samples, *tensors
            return
        for at in range(0, samples, step):
            n = min(step, samples - at)
            rows = [len(t) // samples for t in tensors]
            yield n, *(t.narrow(0, at * r, n * r) for t, r in zip(tensors, rows, strict=True))

    def unfolded(self, module: nn.Module, x: Tensor) -> int:
        """Number of entries of `inputs`."""
        return x.numel()

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


def _summed(parts: Iterable[Tensor]) -> Tensor:
    """In place of the first."""
    total, *others = parts
    for one in others:
        total.add_(one)
    return total


def _products(U: Tensor, constant: bool) -> Tensor:
    """Sum over samples and positions of u u^T, or of (u, 1) (u, 1)^T, by group."""
    if U.shape[2] == 1 or U.is_contiguous():
        rows = U.transpose(0, 1).flatten(1, 2)
        if constant:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        return torch.bmm(rows.mT, rows)
    # Unfolded: positions are the last axis in memory, and a column of ones would copy it all.
    found = (U.mT @ U).sum(0)
    if not constant:
        return found
    sums, count = U.sum((0, 2))[..., None], U.new_full((U.shape[1], 1, 1), U.shape[0] * U.shape[2])
    return torch.cat([torch.cat([found, sums], 2), torch.cat([sums.mT, count], 2)], 1)
