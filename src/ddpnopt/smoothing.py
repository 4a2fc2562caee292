# SPDX-License-Identifier: MIT
"""Cross-entropy with label smoothing, told from the output's gradient.

With smoothing s of C classes G = w p - c off the label, c = w s / C, and less by w (1 - s) at it:
one w and one c for the batch, found by regression of G on p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ddpnopt.rows import chunks, working
from ddpnopt.typing import Tensor

if TYPE_CHECKING:
    from ddpnopt.fits import Grain, Scan

#: Rows' sums above so many times the rounding of the largest entry: no cross-entropy, told at once.
MOST = 100


def smoothed(
    z: Tensor, G: Tensor, axis: int, rows: Scan, grain: Grain
) -> tuple[float, Tensor] | None:
    """w and the rows' labels, or None where the loss is another one.

    A sample that is surer of its label than 1 - s has not its smallest G there. But v p - G peaks
    at every label for any v between s w and (2 - s) w. The largest entry of G is less than w; where
    it is below s w, too, each label is its row's likeliest class (if s < 1/3).

    Args:
        z: Output of the last layer.
        G: Its gradient.
        axis: Class axis of z.
        rows: What one look at them has shown.
        grain: Rounding of G.
    """
    size = float(rows.lines.size.amax()) if len(rows.w) else 0.0
    most = MOST * (8 + z.shape[axis]) * grain.exp * size
    if not size > 0 or bool((rows.drift.abs() > most).any()):
        return None
    before = None
    for v in (size, math.inf):
        y = torch.empty_like(rows.y)
        for part, p, g in _balanced(z, G, axis, rows.drift):
            y[part] = p.sub_(g, alpha=1 / v).argmax(-1)
        if before is not None and torch.equal(y, before):
            return None
        w = _fit(z, G, axis, rows, y, grain)
        if w is not None:
            return w, y
        before = y
    return None


def _fit(z: Tensor, G: Tensor, axis: int, rows: Scan, y: Tensor, grain: Grain) -> float | None:
    """w with labels y, where the rows fit to rounding."""
    classes, used = z.shape[axis], rows.used
    n = int(used.sum()) * (classes - 1)
    if n < 4:
        return None
    w, c, P_mean = _line(z, G, axis, rows, y, n)
    if not (w > 0 and 0 < c < w / classes):
        return None
    # w is known as well as the likeliest entries are, and c = w mean(p) - mean(G).
    likeliest = 8 * grain.exp + float(grain.exp_error(rows.spread[used].amax()))
    fitted = 8 * grain.exp * c + (likeliest + 4 * grain.eps / n**0.5) * w * P_mean
    rounding = 4 * grain.eps * c + fitted + 2 * grain.step
    at_label = 4 * grain.eps * w + classes * fitted
    # Sums of C equal shares are rounded one way.
    fits = (rows.drift.abs() <= (8 + classes) * grain.exp * w).all()
    for part, p, g in _balanced(z, G, axis, rows.drift):
        at = y[part, None]
        residual = g.add(c).sub_(p, alpha=w)
        residual.scatter_add_(-1, at, at.new_full(at.shape, 1).to(g) * (w - classes * c))
        slack = grain.slack(rows.spread[part]) * w
        residual.abs_().addcmul_(p, slack[:, None], value=-1)
        residual.scatter_add_(-1, at, at.new_full(at.shape, 1).to(g) * -at_label)
        fits &= ((residual.amax(-1) <= rounding) | ~used[part]).all()
    return w if bool(fits) else None


def _line(
    z: Tensor, G: Tensor, axis: int, rows: Scan, y: Tensor, n: int
) -> tuple[float, float, float]:
    """w (nan where all p are too much alike), c of G = w p - c off the labels y, mean of p there.

    Summed as differences from about the mean: before training all p are nearly alike.
    """
    wide = torch.float32 if z.device.type == "mps" else torch.float64
    keep = rows.used.to(wide)
    centre = torch.zeros(2, dtype=wide, device=z.device)
    moments = torch.zeros(4, dtype=wide, device=z.device)
    for part, p, g in _balanced(z, G, axis, rows.drift):
        P, H = (one.gather(-1, y[part, None])[:, 0].to(wide) for one in (p, g))
        centre += torch.stack([((1 - P) * keep[part]).sum(), -(H * keep[part]).sum()]) / n
    for part, p, g in _balanced(z, G, axis, rows.drift):
        P, H = (
            (one.to(wide) - about).scatter_(-1, y[part, None], 0.0).mul_(keep[part, None])
            for one, about in zip((p, g), centre, strict=True)
        )
        moments += torch.stack([P.sum(), H.sum(), P.square().sum(), (P * H).sum()])
    P, H, PP, PH = (moments / n).tolist()
    P_mean, H_mean, variance = P + float(centre[0]), H + float(centre[1]), PP - P**2
    w = (PH - P * H) / variance if variance > 1e-4 * P_mean**2 else math.nan
    return w, w * P_mean - H_mean, P_mean


def _balanced(
    z: Tensor, G: Tensor, axis: int, drift: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of p and of G, its rows' sums taken off."""
    for part, (rows, g) in chunks(axis, z, G):
        p = torch.softmax(rows, -1, dtype=working(z))
        yield part, p, torch.addcmul(g.to(p.dtype), p, drift[part, None], value=-1)
