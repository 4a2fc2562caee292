# SPDX-License-Identifier: MIT
"""M^-1 d of a layer's matrix under a Kronecker-factored curvature, sample by sample where it pays.

d = p.grad + r sum_i g_u^T v_i, and p.grad is r sum_i g_u^T g_i unless somebody changed it. So
M^-1 d is a sum of transformed samples, plus M^-1 of whatever else p.grad holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ddpnopt.bellman import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.layers.coordinates import unlike
from ddpnopt.positions import Kronecker
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks
from ddpnopt.weighted import Weighted

#: Of |p.grad|: less is the rounding of another order of summation.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5}


def sampled_direction(
    layer: Layer, P: Kronecker, known: Mapping[str, Tensor], vectors: Blocks, scale: float
) -> Tensor | None:
    """M^-1 d from the samples' coordinates; None where they were not kept.

    Args:
        layer: The layer, one pass.
        P: M^-1.
        known: p.grad of the matrix's parameters; those it is not computed for are left out.
        vectors: The policy's (coefficient - 1) g.
        scale: r.

    Returns:
        (g, o, i), in the matrix's own layout.
    """
    (stage, *others) = layer.blocks
    found = layer.coordinates.get(stage)
    if others or found is None or not isinstance(vectors, Weighted):
        return None
    direction = found.direction(P, (1 + vectors.a) * scale)
    if known:
        assert isinstance(layer.rule, MatrixRule)
        plain = found.plain() * scale
        parts = {**layer.rule.parted(layer.module, plain, P.bias), **known}
        D = layer.rule.joined(layer.module, parts, P.bias).to(plain.dtype)
        rest = unlike(D, plain, ROUNDING.get(D.dtype, 1e-5))
        if rest is not None:
            direction = direction + P(rest)
    return direction


def reweighted_length(layer: Layer, vectors: Blocks) -> Tensor:
    """d^T P d of the re-weighted samples' sum, from their coordinates."""
    P = layer.gain["weight"]
    assert isinstance(P, Kronecker) and isinstance(vectors, Weighted)
    return layer.coordinates[layer.blocks[0]].length(P, 1 + vectors.a)
