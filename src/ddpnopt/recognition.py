# SPDX-License-Identifier: MIT
"""Which loss was it? Recognised from the output z and its gradient G.

For cross-entropy with hard labels G = w (p - e_y). Only "p - k G is a distribution" would hold for
every small k, and class weights, focal losses, temperatures, mixup and distillation would pass
for what they are not. So the off-label entries must fit p in every row to rounding, and w must be
constant over the batch, or per label (class weights); where the batch can't show that (one sample,
all logits equal) the decision waits, with what earlier steps have shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ddpnopt.errors import TerminalError
from ddpnopt.likelihoods import hard_label_cost, logistic_cost, softmax_cost
from ddpnopt.terminal import MMC, MSE, Cost, SquaredError, callable_cost, squared_cost
from ddpnopt.typing import Tensor

SOFTMAX, LOGISTIC = "cross_entropy", "bce_with_logits"
#: Names of terminal costs that users may give.
TERMINALS = ("auto", SOFTMAX, "nll", "mse", "mmc", LOGISTIC)
SQUARED: dict[str, SquaredError] = {"mse": MSE(), "mmc": MMC()}
Terminal = str | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fit:
    """What one pass's rows say about a loss.

    Attributes:
        w: Factor of each row (softmax) or element (logistic), 0 where it has no gradient.
        groups: Label of each row.
        fits: Every row has the loss's form.
        uniform: w is constant over the batch, or over each group.
        evidence: The batch could have shown otherwise.
        hard: The targets are labels, not distributions.
    """

    w: Tensor
    groups: Tensor
    fits: bool
    uniform: bool
    evidence: bool
    hard: bool = False


class Recogniser:
    """Finds the terminal cost of each pass; remembers what earlier passes have shown.

    Args:
        terminal: "auto", a name, `MSE`, `MMC`, or a callable output -> factor.
    """

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.decision = ""
        self.weights: dict[int, float] = {}
        #: The w that all rows had, when a hard-label cross-entropy was last recognised.
        self.common = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The memory, as plain values."""
        return {
            "decision": self.decision,
            "weights": dict(self.weights),
            "common": self.common,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the memory back."""
        self.decision, self.weights = state["decision"], dict(state["weights"])
        self.common = state.get("common", 0.0)

    def __call__(self, z: Tensor, G: Tensor, axis: int, samples: int) -> Cost | None:
        """The cost of a pass, or None where no loss is recognised.

        Args:
            z: Output of the last layer.
            G: Its gradient.
            axis: Class axis of z.
            samples: B.

        Raises:
            TerminalError: The cost that the user named contradicts z or G.
        """
        # Losses work in float32 where the network runs in half precision.
        logits = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
        known = SQUARED.get(self.terminal) if isinstance(self.terminal, str) else self.terminal
        if isinstance(known, SquaredError):
            return squared_cost(known.name, logits, G, known.curvature(logits), samples)
        if not isinstance(self.terminal, str):
            return callable_cost(self.terminal, logits, G, samples)
        if self.terminal in (SOFTMAX, "nll"):
            w = _named_softmax(self.terminal, logits, G, axis)
            return softmax_cost(self.terminal, logits, G, w, axis, samples)
        if self.terminal == LOGISTIC:
            return logistic_cost(logits, G, _named_logistic(logits, G), samples)
        return self._recognise(logits, G, axis, samples)

    def _recognise(self, z: Tensor, G: Tensor, axis: int, samples: int) -> Cost | None:
        softmax = z.dim() > 1 and z.shape[axis] > 1
        if self.common and softmax and z.dim() == 2 and z.shape[0] == samples:
            known = hard_label_cost(SOFTMAX, z, G, self.common)
            if known is not None:
                return known
        self.common = 0.0
        if softmax:
            fit = fit_softmax(z, G, axis)
            if not fit.fits:
                fit, softmax = fit_logistic(z, G), False
        else:
            fit = fit_logistic(z, G)
        name = SOFTMAX if softmax else LOGISTIC
        if not self._decide(fit, name):
            return None
        if softmax:
            if fit.uniform and fit.hard and z.dim() == 2 and z.shape[0] == samples:
                w = _simple(float(fit.w.max()), samples)
                known = hard_label_cost(name, z, G, w) if w > 0 else None
                if known is not None:
                    self.common = w
                    return known
            return softmax_cost(name, z, G, fit.w, axis, samples)
        return logistic_cost(z, G, fit.w, samples)

    def _decide(self, fit: Fit, name: str) -> bool:
        """Update the decision; whether this pass may be taken for ``name``."""
        if not fit.fits or (fit.evidence and not fit.uniform):
            self.decision, self.weights = "unrecognised", {}
            return False
        if not bool((fit.w > 0).any()):
            return self.decision == name  # no gradient at all: nothing is learnt
        if not fit.evidence:
            known = self._agrees(fit, name)
            if known is False and self.decision != name:
                self.decision = "unrecognised"
            elif known:
                self.decision = name
        else:
            self.decision = name
        self._remember(fit)
        return self.decision == name

    def _agrees(self, fit: Fit, name: str) -> bool | None:
        """Whether w is what it was for the same labels; None where that can't be told yet."""
        if not self.weights:
            return None
        verdict = None
        for label, w in zip(fit.groups.tolist(), fit.w.flatten().tolist(), strict=True):
            if w <= 0:
                continue
            same = self.weights.get(int(label))
            if same is not None:
                if abs(w - same) > 1e-3 * same:
                    return False
                verdict = True
            elif all(abs(w - other) <= 1e-3 * other for other in self.weights.values()):
                verdict = True  # an unseen label with everybody's w
        return verdict

    def _remember(self, fit: Fit) -> None:
        """Keep w by label while the batch alone can't decide; nothing in the usual case."""
        self.weights = {} if fit.evidence else self.weights
        if not fit.evidence:
            pairs = zip(fit.groups.tolist(), fit.w.flatten().tolist(), strict=True)
            self.weights.update({int(label): w for label, w in pairs if w > 0})


def _simple(w: float, samples: int) -> float:
    """A fitted w without its rounding, where it is k / B or 1 / (k B): then all batches agree."""
    share = w * samples
    if not 0 < share < math.inf:
        return w
    whole = round(share) if share >= 1 else 1 / round(1 / share)
    return whole / samples if abs(share - whole) <= 1e-4 * whole else w


def fit_softmax(z: Tensor, G: Tensor, axis: int) -> Fit:
    """Fit G = w (p - e_y), or with label smoothing G = w p - c off the label."""
    classes = z.shape[axis]
    rows = z.movedim(axis, -1).reshape(-1, classes)
    g = G.movedim(axis, -1).reshape(-1, classes).to(rows.dtype)
    p = torch.softmax(rows, -1)
    # The label has the smallest entry; of several zeros (a confident row) it is the likeliest.
    y = torch.where(g == g.amin(-1, keepdim=True), p, -1.0).argmax(-1)
    off = torch.ones_like(p).scatter_(-1, y[:, None], 0.0)
    used = g.abs().amax(-1) > 0
    eps, tiny = _precision(G), torch.finfo(p.dtype).tiny
    spread = rows.amax(-1, keepdim=True) - rows
    slack = eps + _exp_error(p.dtype, spread)
    w = torch.where(used, (g * off).sum(-1) / (p * off).sum(-1).clamp(min=tiny), 0.0)
    w = w.clamp(min=0)
    step = torch.finfo(G.dtype).smallest_normal * torch.finfo(G.dtype).eps
    residual = (g - w[:, None] * p).abs() * off
    allowed = slack * (w[:, None] * p + g.abs()) + 4 * eps * eps * w[:, None] + 2 * step
    label = g.gather(-1, y[:, None])[:, 0]
    sums = (
        label + (g * off).sum(-1)
    ).abs() <= 16 * eps * label.abs() + 4 * eps * w + classes * step
    fits = bool(((residual <= allowed).all(-1) & sums & (w > 0) | ~used).all())
    if not fits:
        return _fit_smoothed(p, g, y, off, used, slack)
    informative = used & ((p * off).sum(-1) > 64 * step / w.clamp(min=step))
    off_label = torch.where(off > 0, p, torch.nan)
    if classes > 2:
        low = torch.nan_to_num(off_label, nan=2.0).amin(-1)
        shows_form = bool(((low < 0.99 * (p * off).amax(-1)) & used).any())
    else:
        shows_form = True
    widest = spread[used].amax() if bool(used.any()) else spread.new_zeros(())
    tolerance = 2 * eps + 4 * float(_exp_error(p.dtype, widest))
    uniform, redundant = _uniform(w, y, (p * off).sum(-1), informative, tolerance)
    return Fit(w, y, True, uniform, shows_form and redundant, hard=True)


def _fit_smoothed(p: Tensor, g: Tensor, y: Tensor, off: Tensor, used: Tensor, slack: Tensor) -> Fit:
    """Label smoothing: one w and one c for the batch, by regression of G on p off the label."""
    eps = float(slack.min())
    mask = (off > 0) & used[:, None]
    nothing = Fit(torch.zeros_like(p[:, 0]), y, False, False, True)
    if int(mask.sum()) < 4:
        return nothing
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    P, H = p[mask].to(wide), g[mask].to(wide)
    centred = P - P.mean()
    variance = centred.square().sum()
    if not bool(variance > 1e-4 * P.square().sum()):
        return nothing
    w = (centred * H).sum() / variance
    c = w * P.mean() - H.mean()
    classes = p.shape[-1]
    if not bool((w > 0) & (c > 0) & (c < w / classes)):
        return nothing
    w, c = w.to(p.dtype), c.to(p.dtype)
    model = torch.where(off > 0, w * p - c, w * p - w + (classes - 1) * c)
    allowed = slack * w * p + 4 * eps * (c + (1 - off) * w)
    fits = bool((((g - model).abs() <= allowed).all(-1) | ~used).all())
    return Fit(torch.where(used, w, 0.0), y, fits, fits, True)


def fit_logistic(z: Tensor, G: Tensor) -> Fit:
    """Fit G = w (sigma(z) - y), y 0 or 1: any G fits, the constancy of w is the whole test."""
    g = G.to(z.dtype)
    y = (g < 0).long()
    slope = torch.where(g > 0, torch.sigmoid(z), torch.sigmoid(-z))
    used = g != 0
    eps = _precision(G)
    w = torch.where(used, g.abs() / slope.clamp(min=torch.finfo(z.dtype).tiny), 0.0)
    step = torch.finfo(G.dtype).smallest_normal
    informative = used & (g.abs() > 64 * step)
    # 1 - sigma(z) is rounded at 1, not at itself: judge by elements that are not saturated.
    clear = informative & (slope > 1e-2)
    informative = clear if bool(clear.any()) else informative
    columns = torch.arange(z[0].numel(), device=z.device).expand(z.shape[0], -1)
    lowest = float(slope[informative].amin()) if bool(informative.any()) else 1.0
    tolerance = min(2 * eps + 64 * torch.finfo(z.dtype).eps / lowest, 0.05)
    flat = (w.flatten(), y.flatten(), slope.flatten(), informative.flatten())
    uniform, redundant = _uniform(*flat, tolerance)
    if redundant and not uniform:
        by_class = _uniform(flat[0], columns.flatten(), flat[2], flat[3], tolerance)
        if by_class[0] and by_class[1]:
            uniform = True
    return Fit(w, y.flatten(), True, uniform, redundant)


def _uniform(
    w: Tensor, groups: Tensor, at: Tensor, rows: Tensor, tolerance: float
) -> tuple[bool, bool]:
    """Whether w is constant (over all rows, or within each group), and whether that was tested.

    Tested means: some rows that had to agree stand at different probabilities ``at``; a focal
    loss agrees with itself where they are the same.
    """
    w, groups, at = w[rows], groups[rows], at[rows]
    if w.numel() < 2:
        return True, False

    def spread(x: Tensor, index: Tensor) -> Tensor:
        size = int(index.max()) + 1
        low = x.new_full((size,), torch.inf).scatter_reduce(0, index, x, "amin")
        high = x.new_zeros(size).scatter_reduce(0, index, x, "amax")
        return torch.where(low.isfinite() & (high > 0), 1 - low / high, 0.0)

    one = torch.zeros_like(groups)
    if bool((spread(w, one) <= tolerance).all()):
        return True, bool((spread(at, one) > 1e-2).any())
    moved = spread(at, groups) > 1e-2
    return bool((spread(w, groups) <= tolerance).all()), bool(moved.any())


def _exp_error(dtype: torch.dtype, spread: Tensor) -> Tensor:
    """Relative error of exp(log p) as losses compute it, with some rounding around it."""
    return torch.finfo(dtype).eps * (8 + 2 * spread.clamp(max=100))


def _precision(G: Tensor) -> float:
    return float(torch.finfo(G.dtype).eps)


def _named_softmax(name: str, z: Tensor, G: Tensor, axis: int) -> Tensor:
    """w of a cross-entropy that the user names: fitted, or 1/N for soft targets."""
    if z.dim() < 2 or z.shape[axis] < 2:
        raise TerminalError(
            f"terminal='{name}': the last layer's output has shape {tuple(z.shape)}, "
            "not a row of class scores; use 'bce_with_logits' for one logit"
        )
    fit = fit_softmax(z, G, axis)
    if fit.fits:
        return fit.w
    rows = z.movedim(axis, -1)
    g = G.movedim(axis, -1).to(z.dtype)
    w = 1 / (rows.numel() // rows.shape[-1])
    target = torch.softmax(rows, -1) - g / w
    slack = 64 * _precision(G)
    sums = g.sum(-1).abs() <= slack * w
    if not bool((sums[..., None] & (target > -slack) & (target < 1 + slack)).all()):
        raise TerminalError(
            f"terminal='{name}' contradicts the output's gradient: it is not w (p - target) "
            "for a target distribution (soft targets are taken as a mean over the batch); name "
            "the loss that is used, or pass a callable output -> factor of its Hessian"
        )
    return torch.full(rows.shape[:-1], w, dtype=z.dtype, device=z.device)


def _named_logistic(z: Tensor, G: Tensor) -> Tensor:
    """w of a binary cross-entropy that the user names: fitted, or the mean for soft targets."""
    fit = fit_logistic(z, G)
    if fit.uniform:
        known = fit.w[fit.w > 0]
        fill = known.median() if known.numel() else fit.w.new_tensor(1.0)
        return torch.where(fit.w > 0, fit.w, fill)
    w = 1 / z.numel()
    target = torch.sigmoid(z) - G.to(z.dtype) / w
    slack = 64 * _precision(G)
    if not bool(((target > -slack) & (target < 1 + slack)).all()):
        raise TerminalError(
            "terminal='bce_with_logits' contradicts the output's gradient: it is not "
            "w (sigmoid(z) - target) with targets between 0 and 1; name the loss that is used, "
            "or pass a callable output -> factor of its Hessian"
        )
    return torch.full_like(z, w)
