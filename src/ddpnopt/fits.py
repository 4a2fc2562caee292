# SPDX-License-Identifier: MIT
"""How well an output's gradient fits a loss, row by row: G = w (p - e_y).

Only numbers of each row are kept; the rows themselves are looked at once, in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ddpnopt.likelihoods import Lines, row_lines
from ddpnopt.rows import HALF, chunk_size, chunks, working
from ddpnopt.typing import Tensor

#: Rows tell a loss with w(p_y) from another where 1 - p_y, or p_y, differ by this share; 1 - p_y by
#: no more than so many times what w is known by (in new language models it hardly differs).
APART, APART_LABEL, CLEAR = 1e-2, 0.4, 100
#: Share of the probability off the label below which w in half precision is no longer known.
CONFIDENT = 1e-3
#: Rounding of gradients in half precision is above this.
COARSE = 1e-6


@dataclass(frozen=True)
class Fit:
    """What one pass's rows say about a loss.

    Attributes:
        w: Factor of each row (softmax) or element (logistic), 0 where it has no gradient.
        groups: Label of each row.
        fits: Every row has the loss's form.
        uniform: w is constant over the batch, over each label, or over each sample.
        evidence: The batch could have shown otherwise.
        hard: The targets are labels, not distributions.
        lines: Numbers of the rows' line models (softmax).
    """

    w: Tensor
    groups: Tensor
    fits: bool
    uniform: bool
    evidence: bool
    hard: bool = False
    lines: Lines | None = None


@dataclass(frozen=True)
class Grain:
    """How exactly a gradient can be what the formula says.

    Attributes:
        eps: Relative rounding of G's entries.
        step: Their smallest difference.
        exp: Rounding of the numbers that the loss is computed in.
        log: Rounding of log-probabilities, where they may be in half precision; else 0.
    """

    eps: float
    step: float
    exp: float
    log: float

    @classmethod
    def of(cls, z: Tensor, G: Tensor) -> Grain:
        """Of a loss of z with gradient G."""
        given, used = G.dtype, working(z)
        if used == torch.float64 and _narrow(G):  # logits.float(), as many language models do
            given = used = torch.float32
        info = torch.finfo(given)
        log = torch.finfo(z.dtype).eps if z.dtype in HALF else 0.0
        return cls(info.eps, info.smallest_normal * info.eps, torch.finfo(used).eps, log)

    def exp_error(self, spread: Tensor) -> Tensor:
        """Relative error of exp(log p) as losses compute it, with some rounding around it."""
        return self.exp * (8 + 2 * spread.clamp(max=100))

    def slack(self, spread: Tensor) -> Tensor:
        """Relative error of G's entries off the label."""
        return self.eps + self.exp_error(spread) + self.log * spread


def _narrow(G: Tensor) -> bool:
    return all(bool((g.float() == g).all()) for _, (g,) in chunks(-1, G))


@dataclass(frozen=True)
class Scan:
    """Numbers (N,) of each row, from one look at it.

    Attributes:
        y: The likely label.
        w: G / (p - e_y) off the label.
        label: p_y.
        rest: 1 - p_y, without cancellation.
        spread: Largest minus smallest score.
        drift: sum G, which is rounding, where it can be told.
        fits: G = w (p - e_y) to rounding.
        shows: The probabilities off the label differ, so that a fit says something.
        lines: Of the line models.
    """

    y: Tensor
    w: Tensor
    label: Tensor
    rest: Tensor
    spread: Tensor
    drift: Tensor
    fits: Tensor
    shows: Tensor
    lines: Lines

    @property
    def used(self) -> Tensor:
        """Rows with a gradient."""
        return self.lines.size > 0


def scan(z: Tensor, G: Tensor, axis: int, grain: Grain) -> Scan:
    """Look at all rows once."""
    labels, numbers, lines = [], [], []
    for _, (rows, g) in chunks(axis, z, G):
        p, g = torch.softmax(rows, -1, dtype=working(z)), g.to(working(z))
        line = row_lines(p, g)
        y, found = _scan_chunk(rows, p, g, line.size > 0, grain)
        labels.append(y)
        numbers.append(torch.stack(found))
        lines.append(torch.stack(line))
    w, label, rest, spread, drift, fits, shows = torch.cat(numbers, 1).unbind()
    line = Lines(*torch.cat(lines, 1).unbind())
    return Scan(torch.cat(labels), w, label, rest, spread, drift, fits > 0, shows > 0, line)


def _scan_chunk(
    z: Tensor, p: Tensor, g: Tensor, used: Tensor, grain: Grain
) -> tuple[Tensor, list[Tensor]]:
    """Label, and what `Scan` holds of rows (n, C) of scores, probabilities (overwritten), G."""
    classes, tiny = p.shape[-1], torch.finfo(p.dtype).tiny
    spread = (z.amax(-1) - z.amin(-1)).to(p.dtype)
    # The label has the smallest entry; where that is 0 (a confident row) it is the likeliest.
    lowest, y = g.min(-1)
    if bool(((lowest >= 0) & used).any()):
        y = torch.where(lowest < 0, y, p.argmax(-1))
    at = y[:, None]
    label, g_y, total = p.gather(-1, at)[:, 0], g.gather(-1, at)[:, 0], g.sum(-1)
    off = p.scatter_(-1, at, 0.0)
    rest = off.sum(-1)
    # Rows sum to 0 but for the loss's own rounding over the classes, which is a multiple of p. Of
    # entries below half precision's smallest number the sum says nothing.
    drift = torch.zeros_like(total) if grain.eps > COARSE else total
    w = torch.where(used, (drift * label - g_y) / rest.clamp(min=tiny), 0.0).clamp_(min=0)
    shows = used & (rest < 0.995 * (classes - 1) * off.amax(-1))
    slack = grain.slack(spread)
    residual = torch.addcmul(g, off, (w + drift)[:, None], value=-1).abs_().scatter_(-1, at, 0.0)
    excess = residual.addcmul_(off, (2 * slack * w)[:, None], value=-1).amax(-1)
    form = excess <= 4 * grain.exp**2 * w + 2 * grain.step
    rounding = (4 * grain.eps + 4 * grain.exp * classes**0.5) * w + classes * grain.step
    closes = total.abs() <= 16 * grain.eps * g_y.abs() + rounding
    fits = (form & closes & (w > 0)) | ~used
    return y, [w, label, rest, spread, drift, fits.to(w), shows.to(w)]


def fit_softmax(z: Tensor, G: Tensor, axis: int, samples: int) -> Fit:
    """Fit G = w (p - e_y), or with label smoothing G = w p - c off the label."""
    classes = z.shape[axis]
    grain = Grain.of(z, G)
    rows = scan(z, G, axis, grain)
    if not bool(rows.fits.all()):
        return _fit_smoothed(z, G, axis, rows, grain)
    floor = CONFIDENT if grain.eps > COARSE else 0.0
    informative = rows.used & (rows.rest > 64 * grain.step / rows.w.clamp(min=grain.step))
    informative &= rows.rest > floor
    shows_form = classes == 2 or bool(rows.shows.any())
    widest = rows.spread[rows.used].amax() if bool(rows.used.any()) else rows.spread.new_zeros(())
    tolerance = 2 * grain.eps + 4 * float(grain.exp_error(widest))
    # With more classes the form is shown apart; then w(p_y) may also be seen over p_y.
    at = (rows.rest, rows.label if classes > 2 else rows.rest)
    uniform, redundant = _uniform(rows.w, rows.y, at, informative, tolerance)
    if not uniform and len(rows.w) > samples:
        owner = torch.arange(len(rows.w), device=z.device) // (len(rows.w) // samples)
        if _uniform_samples(rows.w, owner, at, informative, tolerance):
            uniform = redundant = True
    return Fit(rows.w, rows.y, True, uniform, shows_form and redundant, True, rows.lines)


def _fit_smoothed(z: Tensor, G: Tensor, axis: int, rows: Scan, grain: Grain) -> Fit:
    """Label smoothing: one w and one c for the batch, by regression of G on p off the label."""
    classes, used = z.shape[axis], rows.used
    nothing = Fit(torch.zeros_like(rows.w), rows.y, False, False, True)
    wide = torch.float32 if z.device.type == "mps" else torch.float64
    n = int(used.sum()) * (classes - 1)
    if n < 4:
        return nothing
    moments = torch.zeros(4, dtype=wide, device=z.device)
    for part, p, g in _balanced(z, G, axis, rows.drift):
        at, keep = rows.y[part, None], used[part, None]
        P, H = (one.scatter(-1, at, 0.0).mul_(keep).to(wide) for one in (p, g))
        moments += torch.stack([P.sum(), H.sum(), P.square().sum(), (P * H).sum()])
    P_mean, H_mean, PP, PH = (moments / n).tolist()
    variance = PP - P_mean**2
    if not variance > 1e-4 * PP:
        return nothing
    w = (PH - P_mean * H_mean) / variance
    c = w * P_mean - H_mean
    if not (w > 0 and 0 < c < w / classes):
        return nothing
    # w is known as well as the likeliest entries are, and c = w mean(p) - mean(G).
    likeliest = 8 * grain.exp + float(grain.exp_error(rows.spread[used].amax()))
    fitted = 8 * grain.exp * c + (likeliest + 4 * grain.eps / n**0.5) * w * P_mean
    rounding = 4 * grain.eps * c + fitted + 2 * grain.step
    at_label = 4 * grain.eps * w + classes * fitted
    # Sums of C equal shares are rounded one way.
    fits = (rows.drift.abs() <= (8 + classes) * grain.exp * w).all()
    for part, p, g in _balanced(z, G, axis, rows.drift):
        at = rows.y[part, None]
        residual = g.add(c).sub_(p, alpha=w)
        residual.scatter_add_(-1, at, at.new_full(at.shape, 1).to(g) * (w - classes * c))
        slack = grain.slack(rows.spread[part]) * w
        residual.abs_().addcmul_(p, slack[:, None], value=-1)
        residual.scatter_add_(-1, at, at.new_full(at.shape, 1).to(g) * -at_label)
        fits &= ((residual.amax(-1) <= rounding) | ~used[part]).all()
    known = bool(fits)
    return Fit(w * used.to(rows.w), rows.y, known, known, True, lines=rows.lines)


def _balanced(
    z: Tensor, G: Tensor, axis: int, drift: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of p and of G, its rows' sums taken off."""
    for part, (rows, g) in chunks(axis, z, G):
        p = torch.softmax(rows, -1, dtype=working(z))
        yield part, p, torch.addcmul(g.to(p.dtype), p, drift[part, None], value=-1)


def fit_logistic(z: Tensor, G: Tensor) -> Fit:
    """Fit G = w (sigma(z) - y), y 0 or 1: any G fits, the constancy of w is the whole test."""
    stride = -(-z.numel() // chunk_size(z))
    if stride > 1 and z[0].numel() > 1:  # a large output: what fails in a part of it, fails
        flat = (one.reshape(len(one), -1)[:, ::stride] for one in (z, G))
        part = _fit_logistic(*(one.contiguous() for one in flat))
        if part.evidence and not part.uniform:
            return part
    return _fit_logistic(z, G)


def _fit_logistic(z: Tensor, G: Tensor) -> Fit:
    z = z.to(working(z))
    g = G.to(z.dtype)
    y = (g < 0).long()
    slope = torch.where(g > 0, torch.sigmoid(z), torch.sigmoid(-z))
    used = g != 0
    eps, known = torch.finfo(G.dtype).eps, torch.finfo(z.dtype)
    slope = slope.clamp(min=known.tiny)  # of a saturated element
    w = torch.where(used, g.abs() / slope, 0.0).clamp(max=known.max)
    step = torch.finfo(G.dtype).smallest_normal
    informative = used & (g.abs() > 64 * step)
    # 1 - sigma(z) is rounded at 1, not at itself: judge by elements that are not saturated.
    clear = informative & (slope > 1e-2)
    informative = clear if bool(clear.any()) else informative
    columns = torch.arange(z[0].numel(), device=z.device).expand(z.shape[0], -1)
    lowest = float(slope[informative].amin()) if bool(informative.any()) else 1.0
    tolerance = min(2 * eps + 64 * known.eps / lowest, 0.05)
    flat, kept, at = w.flatten(), informative.flatten(), (slope.flatten(),)
    uniform, redundant = _uniform(flat, y.flatten(), at, kept, tolerance)
    if redundant and not uniform:
        by_class = _uniform(flat, columns.flatten(), at, kept, tolerance)
        if by_class[0] and by_class[1]:
            uniform = True
    return Fit(w, y.flatten(), True, uniform, redundant)


def _spread(x: Tensor, groups: Tensor) -> Tensor:
    """1 - smallest / largest of each group; 0 of an empty one."""
    size = int(groups.max()) + 1
    low = x.new_full((size,), torch.inf).scatter_reduce(0, groups, x, "amin")
    high = x.new_zeros(size).scatter_reduce(0, groups, x, "amax")
    return torch.where(low.isfinite() & (high > 0), 1 - low / high, 0.0)


def _apart(at: tuple[Tensor, ...], groups: Tensor, tolerance: float) -> Tensor:
    """Which groups have rows at different probabilities, by the tolerance of w."""
    moved = _spread(at[0], groups) > min(APART, max(APART**2, CLEAR * tolerance))
    return moved | (_spread(at[1], groups) > APART_LABEL) if len(at) > 1 else moved


def _uniform(
    w: Tensor, groups: Tensor, at: tuple[Tensor, ...], rows: Tensor, tolerance: float
) -> tuple[bool, bool]:
    """Whether w is constant (over all rows, or within each group), and whether that was tested.

    Tested means: some rows that had to agree stand at different probabilities ``at``; a focal
    loss agrees with itself where they are the same.
    """
    w, groups, at = w[rows], groups[rows], tuple(one[rows] for one in at)
    if w.numel() < 2:
        return True, False
    one = torch.zeros_like(groups)
    if bool((_spread(w, one) <= tolerance).all()):
        return True, bool(_apart(at, one, tolerance).any())
    return bool((_spread(w, groups) <= tolerance).all()), bool(_apart(at, groups, tolerance).any())


def _uniform_samples(
    w: Tensor, owner: Tensor, at: tuple[Tensor, ...], rows: Tensor, tolerance: float
) -> bool:
    """Whether w is constant over each sample's positions, as in a mean over sequences of means.

    Positions of one sample are many, so more is asked than of labels: all samples with several
    positions must stand at different probabilities, and they must be most of the samples.
    """
    w, owner, at = w[rows], owner[rows], tuple(one[rows] for one in at)
    if w.numel() < 2:
        return False
    count = torch.bincount(owner)
    several, moved = count > 1, _apart(at, owner, tolerance)
    tested = bool(moved[several].all()) and 2 * int(several.sum()) > int((count > 0).sum())
    return tested and bool((_spread(w, owner) <= tolerance).all())
