# SPDX-License-Identifier: MIT
"""Products of per-sample weight gradients, for layers that apply one matrix at many positions.

A dense layer applied along a sequence and a convolution are the same thing: at each position t
of a sample, inputs ``U[b, g, t, i]`` are multiplied by the weight ``W[g, o, i]`` of their group.
A vector v in h-space pulls back to the weight gradient ``sum_t v[t, o] U[t, i]`` of that sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch

from ddpnopt.decisions import same
from ddpnopt.typing import Float, Tensor


def transformed(U: Tensor, T: Tensor) -> Tensor:
    """T u for each u along the last axis of (.., g, t, i), T (g, j, i).

    One product over all samples and positions: a broadcast one would read T for every sample.
    """
    T = T.to(U.dtype)
    if T.shape[0] == 1:
        return torch.nn.functional.linear(U, T[0])
    return torch.einsum("...gti,gji->...gtj", U, T)


def with_constant(U: Tensor) -> Tensor:
    """Inputs with a 1 behind the last."""
    return torch.cat([U, U.new_ones(*U.shape[:-1], 1)], -1)


def both(
    D: Float[Tensor, "... g o i"], A: Float[Tensor, "g j i"], G: Float[Tensor, "g p o"]
) -> Float[Tensor, "... g p j"]:
    """G D A^T of many matrices, in one product for each side."""
    return transformed(transformed(D, A).mT, G).mT


@dataclass(frozen=True, eq=False)
class Kronecker(ABC):
    """A gain P on a layer's matrix, made of a matrix for its inputs and one for its outputs.

    Attributes:
        A: (g, i, i), for the inputs.
        G: (g, o, o), for the outputs.
        scale: A number (while a step is traced a tensor without dimensions), or (g, o, i).
        bias: The last input is the constant 1, whose weights are the layer's bias.
    """

    A: Tensor
    G: Tensor
    scale: float | Tensor
    bias: bool

    @abstractmethod
    def __call__(self, D: Float[Tensor, "g o i"]) -> Float[Tensor, "g o i"]:
        """P D."""

    @abstractmethod
    def square(self, D: Float[Tensor, "g o i"]) -> Tensor:
        """D^T P D, a scalar."""

    @abstractmethod
    def halves(
        self, D: Float[Tensor, "... g o i"]
    ) -> tuple[Float[Tensor, "... g o i"], Float[Tensor, "... g o i"]]:
        """Many samples' weight gradients as L, R with D_r^T P D_s = L_r^T R_s, in their dtype."""

    @abstractmethod
    def gram(
        self,
        U: Float[Tensor, "b g t i"],
        V: Float[Tensor, "r b g t o"],
        inputs: Float[Tensor, "b g t i"],
        outputs: Float[Tensor, "r b g t o"],
    ) -> Float[Tensor, "b r r"]:
        """`weight_gram` of inputs with the constant, and of what `transform` makes of both."""

    @abstractmethod
    def transforms_samples(self, columns: int, positions: int, outputs: int, inputs: int) -> bool:
        """Whether per-sample gradients are cheaper to transform than all that they are made of."""

    def joins(self, U: Tensor) -> Tensor:
        """The inputs, the constant 1 among them if it joins."""
        return with_constant(U) if self.bias else U

    def transform(
        self, U: Float[Tensor, "b g t i"], V: Float[Tensor, "r b g t o"]
    ) -> tuple[Float[Tensor, "b g t j"], Float[Tensor, "r b g t o"]]:
        """A u of inputs that have the constant, G v of outputs."""
        return transformed(U, self.A), transformed(V, self.G)

    def times(self, factor: float | Tensor) -> Kronecker:
        """The gain times a number."""
        return self if same(factor, 1.0) else replace(self, scale=self.scale * factor)

    def _both(self, D: Float[Tensor, "g o i"]) -> Float[Tensor, "g o i"]:
        """G D A^T in the more precise dtype."""
        D = D.to(torch.promote_types(D.dtype, self.G.dtype))
        return torch.bmm(torch.bmm(self.G.to(D.dtype), D), self.A.to(D.dtype).mT)


@dataclass(frozen=True, eq=False)
class Product(Kronecker):
    """P = scale G (x) A of symmetric matrices, scale a number: KFAC, with the factors' inverses."""

    def __call__(self, D: Float[Tensor, "g o i"]) -> Float[Tensor, "g o i"]:
        """Two products."""
        return self._both(D) * self.scale

    def square(self, D: Float[Tensor, "g o i"]) -> Tensor:
        """D . P D, which rounding alone makes negative."""
        return (self._both(D) * D).sum().clamp(min=0) * self.scale

    def halves(
        self, D: Float[Tensor, "... g o i"]
    ) -> tuple[Float[Tensor, "... g o i"], Float[Tensor, "... g o i"]]:
        """P D, and D itself."""
        return both(D, self.A, self.G) * self.scale, D

    def gram(
        self,
        U: Float[Tensor, "b g t i"],
        V: Float[Tensor, "r b g t o"],
        inputs: Float[Tensor, "b g t i"],
        outputs: Float[Tensor, "r b g t o"],
    ) -> Float[Tensor, "b r r"]:
        """Pairs of positions, (U A U^T) . (V G V^T), or the samples' gradients."""
        columns, positions = V.shape[0], U.shape[2]
        form = columns * positions * V.shape[-1] * U.shape[-1]
        if pairs_of(columns, positions, V.shape[-1], U.shape[-1]) <= 2 * form:
            K = inputs @ U.mT
            found = torch.einsum("rbgto,sbgto->brs", K @ V, outputs) * self.scale
            # Of ill-conditioned factors rounding may make a square negative.
            return found.clamp(min=0) if columns == 1 else found
        return _samples_gram(U, V, self.scale, (inputs, outputs))

    def transforms_samples(self, columns: int, positions: int, outputs: int, inputs: int) -> bool:
        """G D A of each; or A u and G v, and then pairs of positions, or both kinds of matrices."""
        form = columns * positions * outputs * inputs
        pairs = pairs_of(columns, positions, outputs, inputs)
        return transforms_samples(columns, positions, outputs, inputs, min(2 * form, pairs))


@dataclass(frozen=True, eq=False)
class Diagonal(Kronecker):
    """P = T^T diag(scale) T, T = G (x) A, scale (g, o, i): EKFAC, in the factors' eigenbases."""

    scale: Tensor

    def __call__(self, D: Float[Tensor, "g o i"]) -> Float[Tensor, "g o i"]:
        """There and back."""
        scaled = self._both(D) * self.scale
        return torch.bmm(torch.bmm(self.G.to(scaled.dtype).mT, scaled), self.A.to(scaled.dtype))

    def square(self, D: Float[Tensor, "g o i"]) -> Tensor:
        """Of the coordinates."""
        return (self._both(D).square() * self.scale).sum()

    def halves(
        self, D: Float[Tensor, "... g o i"]
    ) -> tuple[Float[Tensor, "... g o i"], Float[Tensor, "... g o i"]]:
        """The coordinates, scaled and as they are."""
        found = both(D, self.A, self.G)
        return found * self.scale, found

    def gram(
        self,
        U: Float[Tensor, "b g t i"],
        V: Float[Tensor, "r b g t o"],
        inputs: Float[Tensor, "b g t i"],
        outputs: Float[Tensor, "r b g t o"],
    ) -> Float[Tensor, "b r r"]:
        """That of a diagonal gain, in the coordinates."""
        return weight_gram(inputs, outputs, self.scale)

    def transforms_samples(self, columns: int, positions: int, outputs: int, inputs: int) -> bool:
        """T_G D T_A^T of each; or T_A u and T_G v, and the gradients of those."""
        form = columns * positions * outputs * inputs
        return transforms_samples(columns, positions, outputs, inputs, form)


#: Elements of per-sample gradients that are formed together.
AT_ONCE = 2**21

#: A gain P = eta M^-1: a number for M = I (while a step is traced a tensor without dimensions), a
#: tensor of the parameter's shape for a diagonal M.
Gain = float | Tensor | Kronecker


def diagonal(P: Gain) -> TypeGuard[Tensor]:
    """Whether a gain has an entry for each of the parameter's."""
    return isinstance(P, Tensor) and P.dim() > 0


def scalar(P: Gain | None) -> TypeGuard[float | Tensor]:
    """Whether a gain is one number."""
    return isinstance(P, float | int) or (isinstance(P, Tensor) and P.dim() == 0)


def sample_gradients(
    U: Float[Tensor, "b g t i"], V: Float[Tensor, "r b g t o"]
) -> Float[Tensor, "r b g o i"]:
    """Weight gradients of every sample and column."""
    return torch.einsum("bgti,rbgto->rbgoi", U, V)


def weight_gram(
    U: Float[Tensor, "b g t i"], V: Float[Tensor, "r b g t o"], gain: Gain
) -> Float[Tensor, "b r r"]:
    """Gram matrices V_u^T P V_u of r columns pulled back to the weight, per sample.

    Three exact ways, the cheapest is taken: with one position the per-sample gradient is an
    outer product and never formed; with few positions and a scalar gain, (U U^T) . (V V^T) over
    pairs of positions; else the per-sample gradients themselves. A Kronecker product transforms
    the inputs and columns of all positions, or the per-sample gradients where that is cheaper.

    Args:
        U: Inputs at each position.
        V: Columns in h-space.
        gain: P, a number, a tensor of shape (g, o, i), or a Kronecker product.
    """
    columns, positions, outputs, inputs = V.shape[0], U.shape[2], V.shape[-1], U.shape[-1]
    if isinstance(gain, Kronecker):
        samples = gain.transforms_samples(columns, positions, outputs, inputs)
        U = gain.joins(U)
        return _samples_gram(U, V, gain) if samples else gain.gram(U, V, *gain.transform(U, V))
    if diagonal(gain) and positions == 1:
        D = torch.einsum("bgi,goi->bgo", U[:, :, 0].square(), gain)
        v = V[:, :, :, 0]
        return torch.einsum("rbgo,sbgo->brs", v * D, v)
    pairs = pairs_of(columns, positions, outputs, inputs)
    if not diagonal(gain) and pairs <= columns * positions * inputs * outputs:
        K = U @ U.transpose(-1, -2)
        return torch.einsum("rbgto,sbgto->brs", K @ V, V) * gain
    return _samples_gram(U, V, gain)


def pairs_of(columns: int, positions: int, outputs: int, inputs: int) -> int:
    """Multiply-adds of one sample by pairs of positions, under a gain that is a number."""
    return positions**2 * (inputs + columns * outputs)


def transforms_samples(
    columns: int, positions: int, outputs: int, inputs: int, afterwards: int
) -> bool:
    """Whether per-sample gradients are cheaper to transform than all that they are made of.

    Multiply-adds of one sample: the columns' gradients, and two products with each; or one for
    each input and each output, and what is made of these afterwards.
    """
    form = columns * positions * outputs * inputs
    matrices = form + columns * outputs * inputs * (outputs + inputs)
    return matrices < positions * (inputs**2 + columns * outputs**2) + afterwards


def _samples_gram(
    U: Float[Tensor, "b g t i"],
    V: Float[Tensor, "r b g t o"],
    gain: Gain,
    other: tuple[Float[Tensor, "b g t i"], Float[Tensor, "r b g t o"]] | None = None,
) -> Float[Tensor, "b r r"]:
    """`weight_gram` by the per-sample gradients, some at a time: each is as large as the weight.

    With other inputs and outputs the products are of theirs and these.
    """
    elements = V.shape[0] * V.shape[2] * V.shape[-1] * U.shape[-1]
    step = max(1, AT_ONCE // max(1, elements))
    ways = [(U, V)] if other is None else [(U, V), other]
    split = [zip(torch.split(u, step), torch.split(v, step, 1), strict=True) for u, v in ways]
    parts = []
    for some in zip(*split, strict=True):
        parts.append(matrices_gram(*(sample_gradients(u, v) for u, v in some), gain=gain))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def matrices_gram(
    G: Float[Tensor, "r b g o i"], other: Float[Tensor, "r b g o i"] | None = None, *, gain: Gain
) -> Float[Tensor, "b r r"]:
    """Gram matrices of per-sample weight gradients, the constant's among them if it joins."""
    left, right = (G, G) if other is None else (other, G)
    if isinstance(gain, Kronecker):
        (left, right), gain = gain.halves(G), 1.0
    elif diagonal(gain):
        left, gain = left * gain, 1.0
    if len(G) == 1:
        found = (left[0] * right[0]).flatten(1).sum(1)[:, None, None].clamp(min=0)
    else:
        found = torch.einsum("rbgoi,sbgoi->brs", left, right)
    return found if same(gain, 1.0) else found * gain


def bias_gram(V: Float[Tensor, "r b g t o"], gain: float | Tensor) -> Float[Tensor, "b r r"]:
    """The same for the bias, whose gradient is the sum over positions; ``gain`` (g, o)."""
    v = V.sum(3)
    return torch.einsum("rbgo,sbgo->brs", v * gain, v)


def weight_squares(
    U: Float[Tensor, "b g t i"],
    V: Float[Tensor, "b g t o"],
    basis: tuple[Float[Tensor, "g j j"], Float[Tensor, "g o o"]] | None = None,
    bias: bool = False,
) -> Float[Tensor, "g o j"]:
    """Sum over samples of the squared weight gradient, maybe in the basis (T_A, T_G).

    Args:
        U: Inputs at each position.
        V: Gradients at each position.
        basis: T_A, T_G; without it j is i.
        bias: The inputs have a constant 1 besides; with a basis only.
    """
    if basis is not None:
        T_A, T_G = (T.to(U.dtype) for T in basis)
        sizes = U.shape[2], V.shape[-1], U.shape[-1] + bias
        if transforms_samples(1, *sizes, math.prod(sizes)):
            D = sample_gradients(U, V[None])[0]
            D = torch.cat([D, V.sum(2)[..., None]], -1) if bias else D
            return both(D, T_A, T_G).square().sum(0)
        constant = T_A[:, None, :, -1] if bias else 0.0
        U = transformed(U, T_A[..., : U.shape[-1]]) + constant
        V = transformed(V, T_G)
    if U.shape[2] == 1:  # (g, o, b) and (g, b, i)
        return torch.bmm(V[:, :, 0].square().permute(1, 2, 0), U[:, :, 0].square().transpose(0, 1))
    return sample_gradients(U, V[None])[0].square().sum(0)


def total(parts: list[Tensor], V: Tensor, samples: int) -> Tensor:
    """Sum of a layer's Gram matrices (B, r, r); zero where all its parameters are fixed."""
    if not parts:
        return V.new_zeros(samples, V.shape[0], V.shape[0])
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
