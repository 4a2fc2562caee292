# SPDX-License-Identifier: MIT
"""Terminal costs of likelihoods: cross-entropy of softmax, and of independent logits."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from ddpnopt.decisions import anything, exceed, holds, traced
from ddpnopt.objectives import logistic_objective, softmax_objective
from ddpnopt.rows import HALF, chunk_size, chunks, working
from ddpnopt.terminal import Cost, diagonal_columns
from ddpnopt.typing import Tensor

#: Floor of |g| in kappa and the excess: their squares must stay inside float32.
SMALLEST = 1e-15
#: Some entry of the gradient must be this share of w to confirm a loss quickly.
INFORMATIVE = 1e-3
#: And so many steps of half precision.
STEPS = 256
#: How well w has to be seen where all rows are more confident than that.
PROPORTION = 1e-3


class Lines(NamedTuple):
    """Numbers (N,) of each row's line model, for g = G / size of the row.

    Attributes:
        size: max |G|, 0 where the row has no gradient.
        square: |g|^2.
        variance: sum p (g - gbar)^2 with gbar = sum p g.
        reach: max g - gbar.
    """

    size: Tensor
    square: Tensor
    variance: Tensor
    reach: Tensor


def row_lines(p: Tensor, G: Tensor) -> Lines:
    """Of rows (n, C) of probabilities and gradients."""
    low, high = G.amin(-1), G.amax(-1)  # aminmax is far slower
    size = torch.maximum(-low, high)
    scale = torch.where(size > 0, size, 1.0)[:, None]
    g = G / scale
    gbar = (p * g).sum(-1, keepdim=True)
    square = torch.linalg.vector_norm(g, dim=-1).square()
    reach = (high[:, None] / scale - gbar)[:, 0]
    return Lines(size, square, g.sub_(gbar).square_().mul_(p).sum(-1), reach)


def all_lines(z: Tensor, G: Tensor, axis: int) -> Lines:
    """Of all rows of the logits z and their gradient, chunk by chunk."""
    found = []
    for _, (rows, g) in chunks(axis, z, G):
        p = torch.softmax(rows, -1, dtype=working(z))
        found.append(torch.stack(row_lines(p, g.to(p.dtype))))
    return Lines(*torch.cat(found, 1).unbind())


def softmax_cost(
    name: str,
    z: Tensor,
    G: Tensor,
    w: Tensor,
    axis: int,
    samples: int,
    lines: Lines | None = None,
) -> Cost:
    """Cross-entropy of softmax, with any target distribution, a sum over a sample's rows.

    The slope along a sample's gradient is the sum of its rows' slopes along theirs: so are its
    bound, Lambda |g|^2 = sum_t Lambda_t |g_t|^2, and its derivative, kappa |g|^4.

    Args:
        name: Name to report.
        z: Logits, (N, ..) with the classes along ``axis``; N a multiple of the samples.
        G: Their gradient.
        w: Factor of each row's plain cross-entropy, (N, positions); 0 where a row is ignored.
        axis: Class axis.
        samples: B.
        lines: The rows' numbers, if they are known.
    """
    lines = all_lines(z, G, axis) if lines is None else lines
    size, square, variance, reach = (one.reshape(samples, -1) for one in lines)
    w_rows = w.reshape(samples, -1).to(size.dtype)
    w_sample = _sample_weight(w_rows)
    omega = w_rows / w_sample[:, None]
    largest = size.amax(1)
    share = size / torch.where(largest > 0, largest, 1.0)[:, None]
    size = (largest / w_sample).clamp(min=SMALLEST)
    # A sample without a gradient: whatever its coefficient, which only has to stay finite.
    square = (square * share.square()).sum(1).clamp(min=1)  # one entry has size 1
    kappa = (omega * variance * share.square()).sum(1) / (square.square() * size.square())
    excess = (omega * reach * share).sum(1) / (square * size)

    return Cost(
        name,
        w_sample,
        kappa,
        excess.clamp(min=0),
        partial(_softmax_columns, z, G, w_rows, axis),
        lambda new: softmax_objective(z, G, w, axis)(new),
    )


def _softmax_columns(z: Tensor, G: Tensor, w: Tensor, axis: int, rank: int | None) -> Tensor:
    """The factor S of softmax_cost's Hessian, columns first, for w of shape (B, rows)."""
    scores = z.movedim(axis, -1)
    rows = G.movedim(axis, -1).reshape(len(w), -1, z.shape[axis])
    p = torch.softmax(scores.reshape(rows.shape), -1, dtype=working(z))
    S = softmax_factor(p, rows.to(p.dtype), rank) * w.sqrt()[None, ..., None]
    S = _spread_positions(S).reshape(-1, *scores.shape)
    return S.movedim(-1, axis if axis < 0 else axis + 1)


def hard_label_cost(
    name: str, z: Tensor, G: Tensor, w: float, axis: int = -1, samples: int | None = None
) -> Cost | None:
    """`softmax_cost` of G = w (p - e_y) with one w for all rows, if that is what G is.

    What earlier passes have shown is confirmed at little cost; whatever differs, even by a rescaled
    loss, has to be recognised anew. Rows without a gradient are ignored ones.

    Args:
        name: Name to report.
        z: Logits, (N, ..) with the classes along ``axis``.
        G: Their gradient.
        w: The factor that all rows are expected to have.
        axis: Class axis.
        samples: B; None: N.

    Returns:
        The cost; None if some row is not of this form, or too confident to tell.
    """
    samples = len(z) if samples is None else samples
    whole, found, telling = z.numel() <= chunk_size(z), list[Lines](), list[Tensor]()
    for rows, given in [_as_rows(z, G, axis)] if whole else (two for _, two in chunks(axis, z, G)):
        p = torch.softmax(rows, -1, dtype=working(z))
        gradient = given.to(p.dtype)
        size = gradient.abs().amax(-1, keepdim=True)
        if whole and not (traced() or G.dtype in HALF):
            if not _hard(p, gradient, size, w):
                return None
        else:  # one decision, whatever the rows' confidence
            judge = _judge_half if G.dtype in HALF else _judge
            right, tells = judge(p, gradient, size, w, G.dtype)
            if not holds(right):
                return None
            telling.append(tells)
        found.append(_lines_of(p, gradient, size))
    if telling and not holds(torch.stack(telling).any()):
        return None
    lines = found[0] if whole else Lines(*map(torch.cat, zip(*found, strict=True)))
    size = lines.size
    if len(size) > samples or not whole:
        return softmax_cost(name, z, G, _used(size, w), axis, samples, lines)
    area = lines.square.mul_((size / w).clamp_(min=SMALLEST))
    return Cost(
        name,
        torch.full_like(size, w),
        lines.variance / area.square(),
        (lines.reach / area).clamp_(min=0),
        lambda rank: _softmax_columns(z, G, _used(size, w).reshape(samples, -1), axis, rank),
        lambda new: softmax_objective(z, G, _used(size, w), axis)(new),
    )


def _as_rows(z: Tensor, G: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    if z.dim() == 2 and axis in (1, -1):
        return z, G
    rows, gradient = (one.movedim(axis, -1).reshape(-1, z.shape[axis]) for one in (z, G))
    return rows, gradient


def _lines_of(p: Tensor, G: Tensor, size: Tensor) -> Lines:
    """`row_lines`, for a known size (n, 1) of each row."""
    g = G / size.clamp(min=torch.finfo(p.dtype).tiny)
    gbar = (p * g).sum(-1, keepdim=True)
    reach = g.amax(-1, keepdim=True).sub_(gbar)[:, 0]
    square = g.square().sum(-1).clamp_(min=1)  # one entry has size 1
    return Lines(size[:, 0], square, (g - gbar).square_().mul_(p).sum(-1), reach)


def _used(size: Tensor, w: float) -> Tensor:
    """Each row's factor: w where it has a gradient, by its size; 0 where it is ignored."""
    return (size > 0).to(size.dtype).mul_(w)


def _hard(p: Tensor, G: Tensor, size: Tensor, w: float) -> bool:
    """`_judge`, with the less work the sooner that is enough."""
    target, slack = torch.sub(p, G, alpha=1 / w), _slack(G.dtype)
    wrong, largest = _wrong(target), size.amax()
    off, telling = exceed((wrong.amax(), slack), (largest, INFORMATIVE * w))
    # A row without a gradient is not wrong.
    if off and exceed(((wrong * (size[:, 0] > 0)).amax(), slack))[0]:
        return False
    if telling:
        return True
    if not exceed((largest, 0.0))[0]:
        return False
    return not anything(_besides(target, p, size, w))


def _judge(
    p: Tensor, G: Tensor, size: Tensor, w: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Whether every row of the targets p - G / w is a label, and some row's gradient can tell.

    Where all rows are too confident for that, their entries off the label have to be w p, each in
    proportion to itself.
    """
    target, largest = torch.sub(p, G, alpha=1 / w), size.amax()
    right = (_wrong(target) * (size[:, 0] > 0)).amax() <= _slack(dtype)
    shown = ~_besides(target, p, size, w).any() & (largest > 0)
    return right, (largest > INFORMATIVE * w) | shown


def _slack(dtype: torch.dtype) -> float:
    return 64 * torch.finfo(dtype).eps


def _wrong(target: Tensor) -> Tensor:
    """How far rows are from being a label."""
    return (target.amax(-1) - 1).abs_().add_(target.abs().sum(-1).sub_(1).abs_())


def _besides(target: Tensor, p: Tensor, size: Tensor, w: float) -> Tensor:
    """Entries off the label that are not w p, of rows that have a gradient."""
    tiny = torch.finfo(p.dtype).smallest_normal
    return (target < 0.5) & (size > 0) & (target.abs() > PROPORTION * p + 64 * tiny / w)


def _judge_half(
    p: Tensor, g: Tensor, size: Tensor, w: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Whether every row is w (p - e_y) where G was rounded to half precision, and one can tell.

    The targets p - G / w would be too coarse: smoothed labels would pass for labels. So each entry
    has to be right in proportion to itself, which is what half precision keeps.
    """
    half, tiny = torch.finfo(dtype), torch.finfo(p.dtype).eps
    lowest, y = g.min(-1, keepdim=True)
    y = torch.where(lowest < 0, y, p.argmax(-1, keepdim=True))  # of a confident row: the likeliest
    off = p.scatter(-1, y, 0.0)
    right = off.scatter(-1, y, -off.sum(-1, keepdim=True)) * w
    step = half.smallest_normal * half.eps
    slack = 2 * half.eps * right.abs() + (4 * tiny * w + 2 * step)
    wrong = ((g - right).abs() > slack) & (size > 0)
    return ~wrong.any(), size.amax() > max(INFORMATIVE * w, STEPS * step)


def softmax_factor(p: Tensor, G: Tensor, rank: int | None) -> Tensor:
    """Factor S of diag(p) - p p^T, (r, *p.shape) for p (..., C).

    S = diag(sqrt p) Q, Q the C - 1 columns of the Householder reflection that maps sqrt p to the
    last axis: no cancellation, no division by a probability. With fewer columns the likeliest
    classes (the labels, where G < 0, among them) stay and the rest acts as one class: the
    covariance between groups, never more than the exact one.
    """
    classes = p.shape[-1]
    if rank is None or rank >= classes - 1:
        return _reflected(p)
    score = torch.where(G == G.amin(-1, keepdim=True), p + 1, p)
    kept = score.topk(rank, dim=-1).indices
    rest = (1 - p.gather(-1, kept).sum(-1, keepdim=True)).clamp(min=0)
    groups = _reflected(torch.cat([p.gather(-1, kept), rest], -1))
    share = p.scatter(-1, kept, 0.0)
    share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    S = groups[..., -1:] * share
    return S.scatter(-1, kept.expand(rank, *kept.shape), groups[..., :-1])


def _reflected(p: Tensor) -> Tensor:
    root = p.sqrt()
    last = root[..., -1:]
    # S_ik = sqrt(p_i) (delta_ik - sqrt(p_i p_k) / (1 + sqrt(p_C))) for i < C; -sqrt(p_C p_k) for C
    head, columns = p[..., :-1], root[..., :-1].movedim(-1, 0)[..., None]
    S = -head * columns / (1 + last)
    S = S + torch.diag_embed(root[..., :-1]).movedim(-1, 0)
    return torch.cat([S, -last * columns], -1)


def _spread_positions(S: Tensor) -> Tensor:
    """(r, B, P, C) to (r P, B, P, C): the positions of a sample are independent."""
    columns, samples, positions, classes = S.shape
    if positions == 1:
        return S
    spread = S.new_zeros(columns, positions, samples, positions, classes)
    at = torch.arange(positions, device=S.device)
    spread[:, at, :, at] = S.permute(2, 0, 1, 3)
    return spread.reshape(-1, samples, positions, classes)


def logistic_cost(z: Tensor, G: Tensor, w: Tensor, samples: int) -> Cost:
    """Binary cross-entropy with logits, a sum over a sample's elements.

    Args:
        z: Logits.
        G: Their gradient.
        w: Factor of every element's plain loss, of z's shape.
        samples: B.
    """
    logits, gradient = z.reshape(samples, -1), G.reshape(samples, -1).to(z.dtype)
    w_element = w.reshape(samples, -1).to(z.dtype)
    w_sample = _sample_weight(w_element)
    omega = w_element / w_sample[:, None]
    p = torch.sigmoid(logits)
    to_go = torch.where(gradient > 0, torch.sigmoid(-logits), p)  # 1 - |g|, without cancellation
    g, size = _normalised((gradient / w_sample[:, None])[:, None])
    g = g[:, 0]
    square = g.square().sum(1)
    kappa = (omega * p * (1 - p) * g.square()).sum(1) / (square.square() * size.square())
    excess = (omega * g.abs() * to_go).sum(1) / (square * size)
    return Cost(
        "bce_with_logits",
        w_sample,
        kappa,
        excess,
        lambda rank: diagonal_columns((w_element * p * (1 - p)).sqrt(), z.shape),
        logistic_objective(z, G, w),
    )


def _sample_weight(w: Tensor) -> Tensor:
    """(B,) mean of the rows' factors that are in use; 1 where a whole sample is ignored."""
    used = w > 0
    mean = w.sum(1) / used.sum(1).clamp(min=1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def _normalised(g: Tensor) -> tuple[Tensor, Tensor]:
    """g / max|g| per sample, and the maximum: |g|^4 would underflow for confident samples.

    A sample without a gradient gets an arbitrary direction of size 1: its G is zero whatever the
    coefficient, which only has to stay finite.
    """
    size = g.abs().amax((1, 2))
    zero = size == 0
    g = g / torch.where(zero, 1.0, size)[:, None, None]
    g[:, 0, 0] = torch.where(zero, 1.0, g[:, 0, 0])
    return g, torch.where(zero, 1.0, size.clamp(min=SMALLEST))
