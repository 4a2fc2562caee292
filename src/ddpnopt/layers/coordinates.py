# SPDX-License-Identifier: MIT
"""A layer's per-sample gradients in the coordinates of a Kronecker-factored curvature.

With a gain P = T^T S T, T = T_G (x) T_A, the sums of re-weighted samples that a step needs are
products of transformed inputs and outputs. Where the samples' positions are fewer than the matrix
has rows, that is far cheaper than transforming the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ddpnopt.decisions import holds
from ddpnopt.positions import Kronecker, transformed
from ddpnopt.typing import Float, Tensor

#: The golden angle: multiples of it never repeat.
GOLDEN = 2.399963229728653


@dataclass(frozen=True, eq=False)
class Coordinates:
    """One pass of a layer; all of it for one column, the plain gradient g.

    Attributes:
        U: (b, g, t, i) inputs at each position, the constant 1 among them if it joins.
        V: (b, g, t, o) gradients at each position.
        inputs: U in the coordinates of the gain.
        outputs: V in them.
        bias: The constant is among the inputs.
    """

    U: Float[Tensor, "b g t i"]
    V: Float[Tensor, "b g t o"]
    inputs: Float[Tensor, "b g t j"]
    outputs: Float[Tensor, "b g t p"]
    bias: bool

    @staticmethod
    def of(
        U: Float[Tensor, "b g t i"], V: Float[Tensor, "b g t o"], gain: Kronecker
    ) -> Coordinates:
        """The coordinates of a gain, whose own U has no constant yet."""
        inputs, outputs = gain.transform(U, V[None])
        if gain.bias:
            U = torch.cat([U, U.new_ones(*U.shape[:-1], 1)], -1)
        return Coordinates(U, V, inputs, outputs[0], gain.bias)

    @staticmethod
    def pays(V: Float[Tensor, "b g t o"], inputs: int) -> bool:
        """Whether vectors are fewer than the rows and columns of the matrix."""
        rows = V.shape[0] * V.shape[2]
        return 2 * rows <= min(inputs, V.shape[-1]) * 3

    def plain(self) -> Float[Tensor, "g o i"]:
        """The batch's plain gradient."""
        return _product(self.V, self.U)

    def differs(self, D: Float[Tensor, "g o i"], scale: float, tolerance: float) -> bool:
        """Whether a matrix is another one than the plain gradient times a number.

        Both are tried on one vector (Freivalds 1977), for a product of vectors in place of one of
        matrices. What is not orthogonal to it by design is seen at its own length.

        Args:
            D: The matrix.
            scale: The number.
            tolerance: As a share of D: less is rounding.
        """
        places = torch.arange(1, D.shape[-1] + 1, dtype=D.dtype, device=D.device)
        r = (places * GOLDEN).sin() * 2**0.5
        rows = torch.einsum("bgto,bgt->go", self.V, self.U @ r.to(self.U.dtype))
        off, whole = torch._foreach_norm([D @ r - rows * scale, D])
        return holds(off > tolerance * whole)

    def length(self, gain: Kronecker, weight: Float[Tensor, " b"] | None = None) -> Tensor:
        """d^T P d of d = sum_i weight_i g_u,i; the plain gradient where no weight is given."""
        outputs = self.outputs
        if weight is not None:
            outputs = outputs * weight.to(outputs.dtype)[:, None, None, None]
        if not gain.scalar:
            return (_product(outputs, self.inputs).square() * gain.scale).sum()
        U, V = (one.transpose(0, 1).flatten(1, 2) for one in (self.inputs, outputs))
        return ((U @ U.mT) * (V @ V.mT)).sum() * gain.scale

    def direction(self, gain: Kronecker, weight: Float[Tensor, " b"]) -> Float[Tensor, "g o i"]:
        """P sum_i weight_i g_u,i."""
        outputs = self.outputs * weight.to(self.outputs.dtype)[:, None, None, None]
        if not gain.scalar:
            T_A, T_G = gain.T_A.to(outputs.dtype), gain.T_G.to(outputs.dtype)
            return T_G.mT @ (_product(outputs, self.inputs) * gain.scale) @ T_A
        back = transformed(outputs, gain.T_G.mT), transformed(self.inputs, gain.T_A.mT)
        return _product(*back) * gain.scale


def _product(V: Float[Tensor, "b g t o"], U: Float[Tensor, "b g t i"]) -> Float[Tensor, "g o i"]:
    """Sum over samples and positions of v u^T, by group."""
    rows, columns = (one.transpose(0, 1).flatten(1, 2) for one in (V, U))
    return rows.mT @ columns


def unlike(
    D: Float[Tensor, "g o i"], plain: Float[Tensor, "g o i"], tolerance: float
) -> Float[Tensor, "g o i"] | None:
    """What D holds besides the plain gradient; None where that is its rounding alone."""
    rest = D - plain
    size, whole = torch._foreach_norm([rest, D])
    return rest if holds(size > tolerance * whole) else None
