# SPDX-License-Identifier: MIT
"""Products of per-sample weight gradients, for layers that apply one matrix at many positions.

A dense layer applied along a sequence and a convolution are the same thing: at each position t
of a sample, inputs ``U[b, g, t, i]`` are multiplied by the weight ``W[g, o, i]`` of their group.
A vector v in h-space pulls back to the weight gradient ``sum_t v[t, o] U[t, i]`` of that sample.
"""

from __future__ import annotations

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


def both(
    D: Float[Tensor, "... g o i"], T_A: Float[Tensor, "g j i"], T_G: Float[Tensor, "g p o"]
) -> Float[Tensor, "... g p j"]:
    """T_G D T_A^T of many matrices, in one product for each side."""
    return transformed(transformed(D, T_A).mT, T_G).mT


@dataclass(frozen=True, eq=False)
class Kronecker:
    """A gain P = T^T diag(scale) T with T = T_G (x) T_A on a layer's matrix.

    KFAC: T_A = L_A^-1 with A = L_A L_A^T, likewise T_G, and a number as scale. EKFAC: the rows of
    T_A and T_G are the factors' eigenvectors, and scale is a diagonal.

    Attributes:
        T_A: (g, i, i) transform of the inputs.
        T_G: (g, o, o) transform of the outputs.
        scale: A number (while a step is traced a tensor without dimensions), or (g, o, i).
        bias: The last input is the constant 1, whose weights are the layer's bias.
    """

    T_A: Tensor
    T_G: Tensor
    scale: float | Tensor
    bias: bool

    @property
    def scalar(self) -> bool:
        """Whether the scale is one number for all coordinates."""
        return not diagonal(self.scale)

    def transform(
        self, U: Float[Tensor, "b g t i"], V: Float[Tensor, "r b g t o"]
    ) -> tuple[Float[Tensor, "b g t j"], Float[Tensor, "r b g t o"]]:
        """Inputs and outputs in coordinates in which P is the number or the diagonal `scale`."""
        if self.bias:
            U = torch.cat([U, U.new_ones(*U.shape[:-1], 1)], -1)
        return transformed(U, self.T_A), transformed(V, self.T_G)

    def samples(self, D: Float[Tensor, "... g o i"]) -> Float[Tensor, "... g o i"]:
        """Many samples' weight gradients in those coordinates, in their own dtype."""
        return both(D, self.T_A, self.T_G)

    def coordinates(self, D: Float[Tensor, "g o i"]) -> Float[Tensor, "g o i"]:
        """A weight gradient in those coordinates."""
        D = D.to(torch.promote_types(D.dtype, self.T_G.dtype))
        T_A, T_G = self.T_A.to(D.dtype), self.T_G.to(D.dtype)
        return torch.bmm(torch.bmm(T_G, D), T_A.mT)

    def __call__(self, D: Float[Tensor, "g o i"]) -> Float[Tensor, "g o i"]:
        """P D."""
        scaled = self.coordinates(D) * self.scale
        T_A, T_G = self.T_A.to(scaled.dtype), self.T_G.to(scaled.dtype)
        return torch.bmm(torch.bmm(T_G.mT, scaled), T_A)

    def square(self, D: Float[Tensor, "g o i"]) -> Tensor:
        """D^T P D, a scalar."""
        return (self.coordinates(D).square() * self.scale).sum()

    def times(self, factor: float | Tensor) -> Kronecker:
        """The gain times a number."""
        return self if same(factor, 1.0) else replace(self, scale=self.scale * factor)


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
    if isinstance(gain, Kronecker):
        if transforms_samples(V.shape[0], U.shape[2], V.shape[-1], U.shape[-1], gain.scalar):
            U = torch.cat([U, U.new_ones(*U.shape[:-1], 1)], -1) if gain.bias else U
            return _samples_gram(U, V, gain)
        U, V = gain.transform(U, V)
        gain = gain.scale
    _, _, positions, inputs = U.shape
    columns, outputs = V.shape[0], V.shape[-1]
    if diagonal(gain) and positions == 1:
        D = torch.einsum("bgi,goi->bgo", U[:, :, 0].square(), gain)
        v = V[:, :, :, 0]
        return torch.einsum("rbgo,sbgo->brs", v * D, v)
    pairs = positions * (inputs + columns * outputs)
    if not diagonal(gain) and pairs <= columns * inputs * outputs:
        K = U @ U.transpose(-1, -2)
        return torch.einsum("rbgto,sbgto->brs", K @ V, V) * gain
    return _samples_gram(U, V, gain)


def transforms_samples(
    columns: int, positions: int, outputs: int, inputs: int, scalar: bool
) -> bool:
    """Whether per-sample gradients are cheaper to transform than all that they are made of.

    Multiply-adds of one sample. The columns' gradients, and T_G D T_A^T of each; or T_A u and T_G v
    at all positions, and then the gradients or, with a scalar gain, products of pairs.
    """
    form = columns * positions * outputs * inputs
    matrices = form + columns * outputs * inputs * (outputs + inputs)
    pairs = positions**2 * (inputs + columns * outputs)
    vectors = positions * (inputs**2 + columns * outputs**2)
    return matrices < vectors + (min(form, pairs) if scalar else form)


def _samples_gram(
    U: Float[Tensor, "b g t i"], V: Float[Tensor, "r b g t o"], gain: Gain
) -> Float[Tensor, "b r r"]:
    """`weight_gram` by the per-sample gradients, some at a time: each is as large as the weight."""
    elements = V.shape[0] * V.shape[2] * V.shape[-1] * U.shape[-1]
    step = max(1, AT_ONCE // max(1, elements))
    parts = []
    for u, v in zip(torch.split(U, step), torch.split(V, step, 1), strict=True):
        parts.append(matrices_gram(sample_gradients(u, v), gain))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def matrices_gram(G: Float[Tensor, "r b g o i"], gain: Gain) -> Float[Tensor, "b r r"]:
    """Gram matrices of per-sample weight gradients, the constant's among them if it joins."""
    if isinstance(gain, Kronecker):
        G, gain = gain.samples(G), gain.scale
    if len(G) == 1:
        return (G[0].square() * gain).flatten(1).sum(1)[:, None, None]
    return torch.einsum("rbgoi,sbgoi->brs", G * gain, G)


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
        if transforms_samples(1, U.shape[2], V.shape[-1], U.shape[-1] + bias, scalar=False):
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
