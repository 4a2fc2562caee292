# SPDX-License-Identifier: MIT
"""Sums over a layer's samples: d itself, and M^-1 d under a Kronecker-factored curvature.

d = p.grad + r sum_i g_u^T v_i, and p.grad is r sum_i g_u^T g_i unless somebody changed it. So
M^-1 d is a sum of transformed samples, plus M^-1 of whatever else p.grad holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.layers.coordinates import Coordinates, unlike
from ddpnopt.positions import Kronecker
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks
from ddpnopt.weighted import Weighted

#: Of |p.grad|: less is the rounding of another order of summation.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5}


def coordinates_of(layer: Layer) -> Coordinates | None:
    """The layer's coordinates, if it ran in one pass and they were kept."""
    return layer.coordinates.get(layer.blocks[0]) if len(layer.blocks) == 1 else None


def besides(layer: Layer, known: Mapping[str, Tensor], scale: float) -> Tensor | None:
    """What p.grad of the layer's matrix holds besides the plain gradient; None for nothing.

    Args:
        layer: The layer, its coordinates kept; remembers the answer.
        known: p.grad of the matrix's parameters; those it is not computed for are left out.
        scale: r.
    """
    if layer.besides is not None:
        return layer.besides[0]
    found = coordinates_of(layer)
    assert found is not None and isinstance(layer.rule, MatrixRule)
    rest = None
    if known:
        plain = found.plain() * scale
        parts = {**layer.rule.parted(layer.module, plain, found.bias), **known}
        D = layer.rule.joined(layer.module, parts, found.bias).to(plain.dtype)
        rest = unlike(D, plain, ROUNDING.get(D.dtype, 1e-5))
    layer.besides = (rest,)
    return rest


def sampled_length(layer: Layer, known: Mapping[str, Tensor], scale: float) -> Tensor | None:
    """gbar^T P gbar from the samples' coordinates; None where p.grad is something else."""
    P, found = layer.gain.get("weight"), coordinates_of(layer)
    if found is None or len(layer.gain) > 1 or not isinstance(P, Kronecker):
        return None
    return found.length(P) if besides(layer, known, scale) is None else None


def sampled_direction(
    layer: Layer, P: Kronecker, known: Mapping[str, Tensor], vectors: Blocks, scale: float
) -> Tensor | None:
    """M^-1 d from the samples' coordinates; None where they were not kept.

    Args:
        layer: The layer, one pass.
        P: M^-1.
        known: As for `besides`.
        vectors: The policy's (coefficient - 1) g.
        scale: r.

    Returns:
        (g, o, i), in the matrix's own layout.
    """
    found = coordinates_of(layer)
    if found is None or not isinstance(vectors, Weighted):
        return None
    direction = found.direction(P, (1 + vectors.a) * scale)
    rest = besides(layer, known, scale)
    return direction if rest is None else direction + P(rest)


def reweighted_length(layer: Layer, vectors: Blocks) -> Tensor:
    """d^T P d of the re-weighted samples' sum, from their coordinates."""
    P, found = layer.gain["weight"], coordinates_of(layer)
    assert isinstance(P, Kronecker) and isinstance(vectors, Weighted) and found is not None
    return found.length(P, 1 + vectors.a)


def whole_gradient(layer: Layer, vectors: Blocks) -> dict[str, Tensor]:
    """sum_i g_u^T (g_i + v_i) by parameter, where no plain gradient is known to add to."""
    if isinstance(vectors, Weighted):
        return layer.weighted(Weighted(vectors.G, 1 + vectors.a, vectors.counts))
    return layer.weighted([g + v for g, v in zip(layer.plain_vectors(), vectors, strict=True)])
