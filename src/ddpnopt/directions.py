# SPDX-License-Identifier: MIT
"""Sums over a layer's samples: d itself, and M^-1 d under a Kronecker-factored curvature.

d = p.grad + r sum_i g_u^T v_i, and p.grad is r sum_i g_u^T g_i unless somebody changed it. So
M^-1 d is a sum of transformed samples, plus M^-1 of whatever else p.grad holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ddpnopt.borrowed import Borrowed
from ddpnopt.curvature.base import descend_all
from ddpnopt.layer import Layer
from ddpnopt.layers import MatrixRule
from ddpnopt.layers.coordinates import Coordinates, unlike
from ddpnopt.positions import Kronecker
from ddpnopt.ranks import Ranks
from ddpnopt.typing import Tensor
from ddpnopt.value.base import Blocks
from ddpnopt.weighted import Weighted

#: Multiply-adds of a product that is made sooner than it is asked what it would be.
SMALL = 2**20
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
    rest, rule, module, bias = None, layer.rule, layer.module, found.bias
    if known and not _plain(rule, module, found, known, scale):
        plain = found.plain() * scale
        parts = {**rule.parted(module, plain, bias), **known}
        D = rule.joined(module, parts, bias).to(plain.dtype)
        rest = unlike(D, plain, ROUNDING.get(D.dtype, 1e-5))
    layer.besides = (rest,)
    return rest


def _plain(
    rule: MatrixRule,
    module: nn.Module,
    found: Coordinates,
    known: Mapping[str, Tensor],
    scale: float,
) -> bool:
    """Whether p.grad is known of a whole, large matrix, and is the plain gradient alone."""
    if "weight" not in known or (found.bias and "bias" not in known):
        return False
    if known["weight"].numel() * found.V.shape[0] * found.V.shape[2] < SMALL:
        return False
    W = rule.to_matrix(module, known["weight"]).to(found.V.dtype)
    b = known["bias"].reshape(W.shape[:2]).to(W.dtype) if found.bias else None
    return not found.differs(W, b, scale, ROUNDING.get(W.dtype, 1e-5))


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


def reweighted(
    layer: Layer,
    known: Mapping[str, Tensor],
    vectors: Blocks,
    scale: float,
    bent: Mapping[str, Tensor],
    ranks: Ranks,
) -> Mapping[str, Tensor]:
    """d = p.grad + r sum_i g_u^T v_i, the sum over the samples of all ranks.

    Args:
        layer: The layer.
        known: p.grad of all its parameters.
        vectors: v_i.
        scale: r.
        bent: What second-order dynamics add to the sum.
        ranks: Those that hold the batch together; each layer's d is one reduction.
    """
    if not ranks.several:
        d = layer.onto(known, vectors, scale)
        return {n: g.add(bent[n], alpha=scale) if n in bent else g for n, g in d.items()}
    own = layer.weighted(vectors)
    total = ranks.total({n: own[n] + bent[n] if n in bent else own[n] for n in known})
    return {n: g.add(total[n], alpha=scale) for n, g in known.items()}


def descended(
    layer: Layer,
    borrowed: Borrowed,
    known: Mapping[str, Tensor],
    vectors: Blocks,
    scale: float,
) -> bool:
    """u <- u - eta d without d itself, where the step is that and the layer can.

    Args:
        layer: The layer.
        borrowed: The optimizer's steps.
        known: p.grad of all its parameters.
        vectors: v_i.
        scale: r.

    Returns:
        Whether it has been done.
    """
    parameters: list[Tensor] = list(layer.params.values())
    grads, rate = [known[name] for name in layer.params], borrowed.rate(parameters)
    pairs = zip(parameters, grads, strict=True)
    plain = all(type(g) is Tensor and not g.is_sparse and g.dtype == p.dtype for p, g in pairs)
    if not isinstance(rate, float | int) or not plain or not layer.adds(vectors):
        return False
    borrowed.save(parameters)
    descend_all(parameters, grads, rate)
    layer.add(vectors, -rate * scale)
    borrowed.moved(parameters)
    return True


def held(
    layer: Layer,
    known: Mapping[str, Tensor],
    vectors: Blocks,
    scale: float,
    bent: Mapping[str, Tensor],
    ranks: Ranks,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The same where p.grad is known of the bias alone, or of nothing.

    Returns:
        d, and the sum over all re-weighted samples by itself.
    """
    whole = whole_gradient(layer, vectors)
    parts = {n: whole[n] for n in layer.params}
    fused = "bias" in known and bool(layer.kept) and not ranks.several
    if "bias" in known and not fused:
        biases = [layer.rule.bias_gradient(layer.module, v) for v in vectors]
        parts["bias besides p.grad"] = torch.stack(biases).sum(0)
    total = ranks.total(parts)
    used = {n: total[n] for n in layer.params}
    d = {n: g if scale == 1.0 else g * scale for n, g in used.items()}
    if fused:
        d.update(layer.onto({"bias": known["bias"]}, vectors, scale))
    elif "bias" in known:
        d["bias"] = known["bias"].add(total["bias besides p.grad"], alpha=scale)
    return {n: g.add(bent[n], alpha=scale) if n in bent else g for n, g in d.items()}, used


def squares(layer: Layer, vectors: Blocks, ranks: Ranks) -> tuple[dict[str, Tensor], int]:
    """Sums over the samples of all ranks of their squared gradients, and how many there are."""
    own = layer.squares(vectors)
    found, (samples,) = ranks.counted(list(own.values()), [sum(layer.counts)])
    return dict(zip(own, found, strict=True)), samples
