# SPDX-License-Identifier: MIT
"""One weight that is looked up and multiplied by: embeddings tied to dense heads.

Such a weight is one control. A sample's gradient is the sum over all uses, so its Gram matrices
have, beside each use's own, the products of the lookups with the heads. These are gathered at the
rows that were looked up: gradients of the weight's size are not formed sample by sample.

All uses together are one layer, whose state and output are packed to be read without anything
else but the weight (V, D): passes of different lengths may follow one another in a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import nn

from ddpnopt import positions
from ddpnopt.layers.base import LayerRule
from ddpnopt.layers.embedding import EMPTY, LookupRule
from ddpnopt.layers.linear import LinearRule
from ddpnopt.layers.registry import registered
from ddpnopt.parameters import identity
from ddpnopt.positions import Gain, Kronecker, diagonal
from ddpnopt.rows import chunk_size
from ddpnopt.typing import Tensor

#: Indices up to here are exact in the floating-point state that holds them.
LARGEST = 2**24
#: Fewer rows of the weight at a time would not be worth a product.
FEWEST = 64


@runtime_checkable
class Part(Protocol):
    """One use of the weight, as a recorded stage has it; dimension 0 is samples times a fold.

    Attributes:
        module: What holds the weight, and the bias if there is one.
        rule: The use's own rule: a `LookupRule`, or `LinearRule`.
        x: Its state.
        G: Gradient at its output.
        Z_h: Columns there, with a leading axis; None where none reach it.
    """

    module: nn.Module
    rule: LayerRule | None
    x: Tensor
    G: Tensor | None
    Z_h: Tensor | None


class Tied(nn.Module):
    """The uses of one weight as a function of their packed states; it owns no parameter.

    Args:
        weight: (V, D).
        bias: (V,) of the heads, or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """The packed h of a packed state; zero where nothing is looked up.

        Args:
            x: (B, K, D + c): at each of K places the input of a head, and c indices.

        Returns:
            (B, K, V + c D): the head's output, and the rows looked up.
        """
        return _packed(x, self.weight, self.bias)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    state, index = _state(weight, x)
    rows = weight[index.clamp(min=0)] * (index >= 0)[..., None]
    return torch.cat([F.linear(state.to(weight.dtype), weight, bias), rows.flatten(-2)], -1)


def _state(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (.., D) and indices (.., c) of a packed state."""
    width = weight.shape[1]
    return x[..., :width], x[..., width:].long()


class TiedRule(LookupRule):
    """A `LookupRule`, a dense layer at all of a sample's positions, and what they have in common.

    A curvature that is Kronecker-factored treats the weight as it treats an embedding's: by the
    diagonal of the same Fisher matrix.
    """

    parameters = ("weight", "bias")

    def places(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """The lookups of all embeddings."""
        weight = cast(Tied, module).weight
        index = _state(weight, x)[1].reshape(samples, -1)
        v = V[..., weight.shape[0] :].reshape(V.shape[0], *index.shape, weight.shape[1])
        return index, v

    def heads(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Inputs (b, k, d) of all heads and columns at their outputs (r, b, k, v)."""
        weight = cast(Tied, module).weight
        state = _state(weight, x)[0].reshape(samples, -1, weight.shape[1])
        columns = V[..., : weight.shape[0]]
        return state, columns.reshape(V.shape[0], samples, -1, weight.shape[0])

    def push(self, module: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
        """W dx; indices don't move."""
        weight = cast(Tied, module).weight
        width = weight.shape[1]
        pushed = F.linear(dx[..., :width], weight)
        return F.pad(pushed, (0, (dx.shape[-1] - width) * width))

    def pull(self, module: nn.Module, x: Tensor, V: Tensor) -> Tensor:
        """W^T V; indices have no gradient."""
        weight = cast(Tied, module).weight
        pulled = V[..., : weight.shape[0]] @ weight
        return F.pad(pulled, (0, x.shape[-1] - weight.shape[1]))

    def gradient(self, module: nn.Module, x: Tensor, V: Tensor) -> dict[str, Tensor]:
        """V^T x, the rows' sums, and the sum of V over the batch."""
        zero = {n: V.new_zeros(p.shape) for n, p in module.named_parameters()}
        return self.onto(module, x, V, zero, 1.0)

    def onto(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gradients: Mapping[str, Tensor],
        scale: float,
    ) -> dict[str, Tensor]:
        """The sum fused into the product, and the rows added to it."""
        state, G = self.heads(module, x, V[None], 1)
        found = {}
        if "weight" in gradients:
            index, v = self.places(module, x, V[None], 1)
            total = torch.addmm(gradients["weight"], G[0, 0].mT, state[0], alpha=scale)
            found["weight"] = _scatter(total, index, v[0], scale)
        if "bias" in gradients:
            found["bias"] = gradients["bias"].add(G[0, 0].sum(0), alpha=scale)
        return found

    def sample_gradients(
        self, module: nn.Module, x: Tensor, V: Tensor, samples: int
    ) -> dict[str, Tensor]:
        """Dense, for inspection only."""
        state, G = self.heads(module, x, V, samples)
        found = super().sample_gradients(module, x, V, samples)
        found["weight"] += positions.sample_gradients(state[:, None], G[:, :, None])[:, :, 0]
        if module.bias is not None:
            found["bias"] = G.sum(2)
        return found

    def along(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        change: Mapping[str, Tensor],
        samples: int,
    ) -> Tensor:
        """V times the packed h of the changes in place of the parameters."""
        dW = change.get("weight")
        if dW is None:
            dW = V.new_zeros(cast(Tied, module).weight.shape)
        moved = _packed(x, dW, change.get("bias"))  # without a head, V is zero at the bias's place
        columns = V.reshape(V.shape[0], samples, -1)
        return torch.einsum("bh,rbh->br", moved.reshape(samples, -1), columns)

    def gram(
        self,
        module: nn.Module,
        x: Tensor,
        V: Tensor,
        gain: Mapping[str, Gain],
        samples: int,
        sketch: torch.Generator | None = None,
    ) -> Tensor:
        """The lookups', the heads', and twice what they have in common."""
        total = super().gram(module, x, V, gain, samples)
        state, G = self.heads(module, x, V, samples)
        if "weight" in gain:
            P = gain["weight"]
            assert not isinstance(P, Kronecker)
            index, v = self.places(module, x, V, samples)
            weighted = v * (P[index.clamp(min=0)] if diagonal(P) else P)
            cross = torch.einsum("rbtd,sbtd->brs", weighted, _met(state, G, index))
            total = total + _head_gram(state, G, P) + cross + cross.mT
        if "bias" in gain:
            P = gain["bias"]
            assert not isinstance(P, Kronecker)
            total = total + positions.bias_gram(G[:, :, None], P)
        # Uses that cancel leave rounding, of either sign, of a square.
        total.diagonal(dim1=1, dim2=2).clamp_(min=0)
        return total

    def squares(self, module: nn.Module, x: Tensor, V: Tensor, samples: int) -> dict[str, Tensor]:
        """(e + g)^2 = e^2 + 2 e g + g^2, the first two at the rows looked up alone."""
        state, G = self.heads(module, x, V[None], samples)
        index, v = self.places(module, x, V[None], samples)
        total = super().squares(module, x, V, samples)["weight"]
        total = _scatter(total, index, v[0] * _met(state, G, index)[0], 2.0)
        for rows in _chunks(state, G):
            total[rows] += positions.weight_squares(state[:, None], G[0, :, None, :, rows])[0]
        found = {"weight": total.clamp_(min=0)}  # rounding, as in `gram`
        if module.bias is not None:
            found["bias"] = G[0].sum(1).square().sum(0)
        return found

    def bias_gradient(self, module: nn.Module, V: Tensor) -> Tensor:
        """The sum over the heads' outputs alone."""
        return V[..., : cast(Tied, module).weight.shape[0]].flatten(0, -2).sum(0)


def _scatter(total: Tensor, index: Tensor, v: Tensor, scale: float) -> Tensor:
    """``total`` itself, with scale v added at the rows looked up."""
    known = v * (index >= 0)[..., None]
    at = index.clamp(min=0).flatten()
    return total.index_add_(0, at, known.flatten(0, -2).to(total.dtype), alpha=scale)


def _met(state: Tensor, G: Tensor, index: Tensor) -> Tensor:
    """The rows (r, b, t, d) of the heads' weight gradients that the lookups meet."""
    at = index.clamp(min=0)[None, :, None].expand(*G.shape[:3], -1)
    return (G.gather(3, at).mT @ state) * (index >= 0)[..., None]


def _chunks(state: Tensor, G: Tensor) -> Iterator[slice]:
    """Rows of the weight, as few as keep per-sample gradients of them small."""
    each = G.shape[0] * state.shape[0] * state.shape[-1]
    step = max(FEWEST, chunk_size(G) // max(1, each))
    return (slice(at, at + step) for at in range(0, G.shape[-1], step))


def _head_gram(state: Tensor, G: Tensor, P: float | Tensor) -> Tensor:
    """The heads' own; where per-sample gradients are needed, of some rows at a time."""
    U, V = state[:, None], G[:, :, None]
    if not positions.diagonal(P) or U.shape[2] == 1:
        return positions.weight_gram(U, V, P[None] if positions.diagonal(P) else P)
    parts = [positions.weight_gram(U, V[..., rows], P[None, rows]) for rows in _chunks(state, G)]
    return torch.stack(parts).sum(0)


def refusal(parts: Sequence[Part]) -> str:
    """Why these uses of one weight can't be one layer; empty if they can.

    Args:
        parts: The uses; only their modules and rules are looked at.
    """
    biases = set()
    for part in parts:
        kind, own = type(part.module).__name__, part.module._parameters.get("weight")
        rule = part.rule or registered(part.module)  # it may have been refused already
        if rule is not None and (reason := rule.refusal(part.module)):
            return reason
        if own is None:
            return f"{kind} computes the weight that it shares (a parametrisation, weight norm)"
        if identity(own) != identity(parts[0].module._parameters.get("weight")):
            return f"{kind} has another weight"
        if type(part.rule) is LinearRule:
            biases.add(identity(part.module._parameters.get("bias")))
        elif not isinstance(part.rule, LookupRule):
            return f"{kind} shares its weight, and only embeddings and nn.Linear can be joined"
        if own.shape[0] > LARGEST:
            return f"{kind} shares a weight of {own.shape[0]} rows, more than {LARGEST}"
    if len(biases) > 1:
        return "dense layers that share their weight have different biases; give all of them one"
    return ""


@torch.no_grad()
def tied(
    parts: Sequence[Part], samples: int
) -> tuple[TiedRule, Tied, Tensor, Tensor, Tensor | None]:
    """All uses of one weight as one layer.

    A sample's K places are the positions of its heads, and its lookups are spread over them, so
    that hardly anything is padded and the shapes alone tell what is whose.

    Args:
        parts: Its executions, in any order; those without a gradient are left out.
        samples: B.

    Returns:
        The rule, the module, the packed state (B, K, D + c), the gradient (B, K, V + c D) at its
        output, and the columns there with a leading axis, or None.

    Raises:
        ValueError: The uses can't be joined (named).
    """
    parts = [part for part in parts if part.G is not None]
    if reason := refusal(parts):
        raise ValueError(reason)
    weight = cast(nn.Parameter, parts[0].module.weight)
    rows, width = weight.shape
    heads = [part for part in parts if not isinstance(part.rule, LookupRule)]
    inputs = [part.x.reshape(samples, -1, width) for part in heads]
    if not inputs:  # a place for the lookups
        inputs = [weight.new_zeros(samples, 1, width)]
    state = torch.cat(inputs, 1)
    index, v = _looked_up(parts, samples, width, state.shape[1])

    kinds = [v.dtype, *(t.dtype for part in heads for t in (part.G, part.Z_h) if t is not None)]
    dtype = reduce(torch.promote_types, kinds)
    columns = v.new_zeros(*v.shape[:3], rows + v.shape[3], dtype=dtype)
    columns[..., rows:] = v
    at = 0
    for part, x in zip(heads, inputs, strict=False):
        places = columns[:, :, at : at + x.shape[1], :rows]
        places[0] = cast(Tensor, part.G).reshape(places[0].shape)
        if part.Z_h is not None:
            places[1:] = part.Z_h.reshape(places[1:].shape)
        at += x.shape[1]

    exact = torch.promote_types(state.dtype, torch.float32)
    bias = heads[0].module._parameters.get("bias") if heads else None
    x = torch.cat([state.to(exact), index.to(exact)], -1)
    return TiedRule(), Tied(weight, bias), x, columns[0], columns[1:] if len(columns) > 1 else None


def _looked_up(
    parts: Sequence[Part], samples: int, width: int, places: int
) -> tuple[Tensor, Tensor]:
    """All lookups, spread over K places: indices (B, K, c) and columns (1 + r, B, K, c D)."""
    r = max(0 if part.Z_h is None else len(part.Z_h) for part in parts)
    G = cast(Tensor, parts[0].G)
    found = [(G.new_zeros(samples, 0).long(), G.new_zeros(1 + r, samples, 0, width))]
    for part in parts:
        if isinstance(part.rule, LookupRule):
            G = cast(Tensor, part.G)
            Z = G.new_zeros(r, *G.shape) if part.Z_h is None else part.Z_h
            columns = torch.cat([G[None], Z])
            found.append(part.rule.places(part.module, part.x, columns, samples))
    index = torch.cat([one for one, _ in found], 1)
    v = torch.cat([one for _, one in found], 2)
    missing = -index.shape[1] % places
    index, v = F.pad(index, (0, missing), value=EMPTY), F.pad(v, (0, 0, 0, missing))
    return index.reshape(samples, places, -1), v.reshape(1 + r, samples, places, -1)
