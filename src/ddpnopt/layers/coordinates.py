# SPDX-License-Identifier: MIT
"""A layer's per-sample gradients in the coordinates of a Kronecker-factored curvature.

The sums of re-weighted samples that a step needs are products of transformed inputs and outputs:
of A^-1 u and G^-1 v under KFAC, of coordinates in the eigenbasis under EKFAC. Where the samples'
positions are fewer than the matrix has rows, that is far cheaper than transforming the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ddpnopt.decisions import holds
from ddpnopt.layers.base import Kept
from ddpnopt.positions import (
    Diagonal,
    Kronecker,
    Product,
    transformed,
    weight_squares,
    with_constant,
)
from ddpnopt.typing import Float, Tensor

#: The golden angle: multiples of it never repeat.
GOLDEN = 2.399963229728653


@dataclass(frozen=True, eq=False)
class Rotated:
    """The samples' weight gradients of one pass, formed to measure an eigenbasis's diagonal.

    Attributes:
        kept: They, to be summed again with other weights.
        D: (b, g, o, i) T_G D T_A^T of each.
        basis: T_A, T_G.
    """

    kept: Kept
    D: Float[Tensor, "b g o i"]
    basis: tuple[Tensor, Tensor]

    def squares(self) -> Float[Tensor, "g o i"]:
        """Their sum over the samples, squared."""
        return self.D.square().sum(0)

    def lengths(self, gain: Kronecker) -> Float[Tensor, " b"]:
        """g_u^T P g_u of each sample."""
        assert isinstance(gain, Diagonal) and (gain.A is self.basis[0] and gain.G is self.basis[1])
        return (self.D.square() * gain.scale).flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Coordinates:
    """One pass of a layer; all of it for one column, the plain gradient g.

    Attributes:
        U: (b, g, t, i) inputs at each position, the constant 1 among them if it joins.
        V: (b, g, t, o) gradients at each position.
        inputs: A U of the gain's A.
        outputs: G V.
        bias: The constant is among the inputs.
        basis: That A and G.
    """

    U: Float[Tensor, "b g t i"]
    V: Float[Tensor, "b g t o"]
    inputs: Float[Tensor, "b g t j"]
    outputs: Float[Tensor, "b g t p"]
    bias: bool
    basis: tuple[Tensor, Tensor]

    @staticmethod
    def of(
        U: Float[Tensor, "b g t i"],
        V: Float[Tensor, "b g t o"],
        basis: tuple[Tensor, Tensor],
        bias: bool,
    ) -> Coordinates:
        """The coordinates of a gain of that A and G; U has no constant yet."""
        A, G = basis
        U = with_constant(U) if bias else U
        return Coordinates(U, V, transformed(U, A), transformed(V, G), bias, basis)

    def fits(self, gain: Kronecker) -> bool:
        """Whether they are a gain's."""
        return gain.A is self.basis[0] and gain.G is self.basis[1]

    def squares(self) -> Float[Tensor, "g o i"]:
        """Sum over the samples of their squared weight gradients, in an eigenbasis."""
        return weight_squares(self.inputs, self.outputs)

    @staticmethod
    def pays(V: Float[Tensor, "b g t o"], inputs: int) -> bool:
        """Whether vectors are fewer than the rows and columns of the matrix."""
        rows = V.shape[0] * V.shape[2]
        return 2 * rows <= min(inputs, V.shape[-1]) * 3

    def plain(self) -> Float[Tensor, "g o i"]:
        """The batch's plain gradient."""
        return _product(self.V, self.U)

    def differs(
        self,
        weight: Float[Tensor, "g o w"],
        bias: Float[Tensor, "g o"] | None,
        scale: float,
        tolerance: float,
    ) -> bool:
        """Whether a matrix is another one than the plain gradient times a number.

        Both are tried on one vector (Freivalds 1977), for a product of vectors in place of one of
        matrices. What is not orthogonal to it by design is seen at its own length.

        Args:
            weight: The matrix, without the column of the constant.
            bias: That column, if the constant is among the inputs.
            scale: The number.
            tolerance: As a share of the matrix: less is rounding.
        """
        width = weight.shape[-1]
        places = torch.arange(1, self.U.shape[-1] + 1, dtype=weight.dtype, device=weight.device)
        r = (places * GOLDEN).sin() * 2**0.5
        rows = torch.einsum("bgto,bgt->go", self.V, self.U @ r.to(self.U.dtype))
        own, parts = weight @ r[:width], [weight]
        if bias is not None:
            own, parts = own + bias * r[width], [weight, bias]
        off, *sizes = torch._foreach_norm([own - rows * scale, *parts])
        return holds(off > tolerance * torch.linalg.vector_norm(torch.stack(sizes)))

    def lengths(self, gain: Kronecker) -> Float[Tensor, " b"]:
        """g_u^T P g_u of each sample."""
        return gain.gram(self.U, self.V[None], self.inputs, self.outputs[None])[:, 0, 0]

    @cached_property
    def pairs(self) -> Float[Tensor, "n n"]:
        """(u_i^T A^-1 u_j) (v_i^T G^-1 v_j) of all samples and positions, under KFAC."""
        U, A_U, V, G_V = (_rows(one) for one in (self.U, self.inputs, self.V, self.outputs))
        found = (A_U @ U.mT) * (G_V @ V.mT)
        return found[0] if len(found) == 1 else found.sum(0)

    def length(self, gain: Kronecker, weight: Float[Tensor, " b"] | None = None) -> Tensor:
        """d^T P d of d = sum_i weight_i g_u,i; the plain gradient where no weight is given."""
        if isinstance(gain, Product):
            if weight is None:
                return self.pairs.sum().clamp(min=0) * gain.scale
            w = weight.to(self.pairs)[:, None].expand(-1, self.V.shape[2]).reshape(-1)
            return ((self.pairs @ w) @ w).clamp(min=0) * gain.scale
        return (_product(self._weighted(weight), self.inputs).square() * gain.scale).sum()

    def direction(self, gain: Kronecker, weight: Float[Tensor, " b"]) -> Float[Tensor, "g o i"]:
        """P sum_i weight_i g_u,i."""
        found = _product(self._weighted(weight), self.inputs) * gain.scale
        if isinstance(gain, Product):
            return found
        return gain.G.to(found.dtype).mT @ found @ gain.A.to(found.dtype)

    def _weighted(self, weight: Float[Tensor, " b"] | None) -> Float[Tensor, "b g t p"]:
        if weight is None:
            return self.outputs
        return self.outputs * weight.to(self.outputs.dtype)[:, None, None, None]


def _rows(one: Float[Tensor, "b g t i"]) -> Float[Tensor, "g n i"]:
    """All samples' positions."""
    return one.transpose(0, 1).flatten(1, 2)


def _product(V: Float[Tensor, "b g t o"], U: Float[Tensor, "b g t i"]) -> Float[Tensor, "g o i"]:
    """Sum over samples and positions of v u^T, by group."""
    return _rows(V).mT @ _rows(U)


def unlike(
    D: Float[Tensor, "g o i"], plain: Float[Tensor, "g o i"], tolerance: float
) -> Float[Tensor, "g o i"] | None:
    """What D holds besides the plain gradient; None where that is its rounding alone."""
    rest = D - plain
    size, whole = torch._foreach_norm([rest, D])
    return rest if holds(size > tolerance * whole) else None
