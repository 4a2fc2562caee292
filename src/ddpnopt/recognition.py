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
from typing import Any

import torch

from ddpnopt.decisions import anything, postpone, refuse, traced
from ddpnopt.errors import TerminalError
from ddpnopt.fits import Fit, fit_logistic, fit_softmax
from ddpnopt.likelihoods import (
    Lines,
    all_lines,
    hard_label_cost,
    logistic_cost,
    softmax_cost,
)
from ddpnopt.rows import chunk_size, chunks, working
from ddpnopt.terminal import MMC, MSE, Cost, SquaredError, callable_cost, squared_cost
from ddpnopt.typing import Tensor

SOFTMAX, LOGISTIC = "cross_entropy", "bce_with_logits"
#: Names of terminal costs that users may give.
TERMINALS = ("auto", SOFTMAX, "nll", "mse", "mmc", LOGISTIC)
SQUARED: dict[str, SquaredError] = {"mse": MSE(), "mmc": MMC()}
#: Why a pass can't be recorded.
FITTED = (
    "the loss is fitted to the numbers of each batch (what is known without: a cross-entropy of "
    "labels whose weights are all alike, unless torch computes it in half precision, and "
    "terminal='mse', 'mmc' or a callable)"
)
#: Why such a pass is left to another batch.
IGNORED = (
    "too many batches show nothing of their loss: the output's gradient is zero (all labels are "
    "ignored, say)"
)
#: A fitted w this close to a simple number is that number, where half precision leaves it as sure.
SIMPLE = 1e-4
Terminal = str | Callable[[Tensor], Tensor]


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
        #: The number of rows with a gradient then.
        self.rows = 0
        #: The number of all rows of the last pass.
        self._whole = 0

    def state_dict(self) -> dict[str, Any]:
        """The memory, as plain values."""
        return {
            "decision": self.decision,
            "weights": dict(self.weights),
            "common": self.common,
            "rows": self.rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the memory back."""
        self.decision, self.weights = state["decision"], dict(state["weights"])
        self.common, self.rows = state.get("common", 0.0), state.get("rows", 0)

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
        if self.terminal in (SOFTMAX, "nll"):
            return self._named_softmax(str(self.terminal), z, G, axis, samples)
        if self.terminal == "auto":
            return self._recognise(z, G, axis, samples)
        logits = z.to(working(z))
        known = SQUARED.get(self.terminal) if isinstance(self.terminal, str) else self.terminal
        if isinstance(known, SquaredError):
            return squared_cost(known.name, logits, G, known.curvature(logits), samples)
        if callable(known):
            return callable_cost(known, logits, G, samples)
        return logistic_cost(logits, G, _named_logistic(logits, G), samples)

    def _recognise(self, z: Tensor, G: Tensor, axis: int, samples: int) -> Cost | None:
        softmax = z.dim() > 1 and z.shape[axis] > 1
        known = self._known(SOFTMAX, z, G, axis, samples) if softmax else None
        if known is not None:
            return known
        _fits(G)
        fit = fit_softmax(z, G, axis, samples) if softmax else None
        if fit is None or not fit.fits:
            fit, softmax = fit_logistic(z, G), False
        name = SOFTMAX if softmax else LOGISTIC
        if not self._decide(fit, name):
            return None
        if not softmax:
            return logistic_cost(z.to(working(z)), G, fit.w, samples)
        return self._fitted_softmax(name, fit, z, G, axis, samples)

    def _named_softmax(self, name: str, z: Tensor, G: Tensor, axis: int, samples: int) -> Cost:
        """Of a cross-entropy that the user names: w fitted, or 1/N for soft targets."""
        if z.dim() < 2 or z.shape[axis] < 2:
            raise TerminalError(
                f"terminal='{name}': the last layer's output has shape {tuple(z.shape)}, "
                "not a row of class scores; use 'bce_with_logits' for one logit"
            )
        known = self._known(name, z, G, axis, samples)
        if known is not None:
            return known
        _fits(G)
        fit = fit_softmax(z, G, axis, samples)
        if fit.fits:
            return self._fitted_softmax(name, fit, z, G, axis, samples)
        w, lines = _soft_targets(name, z, G, axis)
        return softmax_cost(name, z, G, w, axis, samples, lines)

    def _fitted_softmax(
        self, name: str, fit: Fit, z: Tensor, G: Tensor, axis: int, samples: int
    ) -> Cost:
        """Of a fit; one w for all rows is kept, for the passes to come."""
        used = fit.w[fit.w > 0] if fit.uniform and fit.hard else fit.w[:0]
        if len(used):
            close, rows, w = max(SIMPLE, torch.finfo(G.dtype).eps), len(used), float(used.median())
            simple = [_simple(w, number, close) for number in (len(fit.w), rows)]
            w = min(simple, key=lambda one: (one == w, abs(one - w)))
            if z.numel() > chunk_size(z):  # a fit costs less than to confirm it
                self.common, self.rows, self._whole = w, rows, len(fit.w)
                return softmax_cost(name, z, G, fit.w, axis, samples, fit.lines)
            known = hard_label_cost(name, z, G, w, axis, samples) if w > 0 else None
            if known is not None:
                self.common, self.rows = w, rows
                return known
        return softmax_cost(name, z, G, fit.w, axis, samples, fit.lines)

    def _known(self, name: str, z: Tensor, G: Tensor, axis: int, samples: int) -> Cost | None:
        """The cost if the loss is what it was, as a mean over however many rows have a label."""
        if not self.common or (z.numel() > chunk_size(z) and not traced()):
            return None
        known, whole = None, G.numel() // G.shape[axis]
        if self.rows and whole != self._whole:  # a batch of another size, all of it with labels
            w = self.common * self.rows / whole
            known = hard_label_cost(name, z, G, w, axis, samples)
            if known is not None:
                self.common, self.rows = w, whole
        self._whole = whole
        if known is None:
            known = hard_label_cost(name, z, G, self.common, axis, samples)
        if known is None and not anything(G):  # all labels are ignored: what is known stays
            return None
        if known is None and self.rows:
            rows = int((G.movedim(axis, -1).abs().amax(-1) > 0).sum())
            if rows not in (0, self.rows):
                w = self.common * self.rows / rows
                known = hard_label_cost(name, z, G, w, axis, samples)
                if known is not None:
                    self.common, self.rows = w, rows
        if known is None:
            self.common = 0.0
        return known

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


def _fits(G: Tensor) -> None:
    """What comes next reads numbers; but a batch without a gradient says nothing of others."""
    if traced() and not anything(G):
        postpone(IGNORED)
    else:
        refuse(FITTED)


def _simple(w: float, rows: int, close: float) -> float:
    """A fitted w without its rounding, where it is k / N or 1 / (k N): then all batches agree."""
    share = w * rows
    if not 0 < share < math.inf:
        return w
    whole = round(share) if share >= 1 else 1 / round(1 / share)
    return whole / rows if abs(share - whole) <= close * whole else w


def _soft_targets(name: str, z: Tensor, G: Tensor, axis: int) -> tuple[Tensor, Lines]:
    """w = 1/N of soft targets, N the rows that have a gradient."""
    lines = all_lines(z, G, axis)
    used = lines.size > 0
    w = 1 / max(1, int(used.sum()))
    slack = 64 * torch.finfo(G.dtype).eps
    for part, (rows, g) in chunks(axis, z, G):
        g = g.to(working(z))
        low, high = (torch.softmax(rows, -1, dtype=g.dtype) - g / w).aminmax(dim=-1)
        sums = g.sum(-1).abs() <= slack * w
        if not bool((sums & (low > -slack) & (high < 1 + slack) | ~used[part]).all()):
            raise TerminalError(
                f"terminal='{name}' contradicts the output's gradient: it is not w (p - target) "
                "for a target distribution (soft targets are taken as a mean over the rows that "
                "have a gradient); name the loss that is used, or pass a callable output -> "
                "factor of its Hessian"
            )
    return w * used.to(lines.size), lines


def _named_logistic(z: Tensor, G: Tensor) -> Tensor:
    """w of a binary cross-entropy that the user names: fitted, or the mean for soft targets."""
    refuse(FITTED)
    fit = fit_logistic(z, G)
    if fit.uniform:
        known = fit.w[fit.w > 0]
        fill = known.median() if known.numel() else fit.w.new_tensor(1.0)
        return torch.where(fit.w > 0, fit.w, fill)
    w = 1 / z.numel()
    target = torch.sigmoid(z) - G.to(z.dtype) / w
    slack = 64 * torch.finfo(G.dtype).eps
    if not bool(((target > -slack) & (target < 1 + slack)).all()):
        raise TerminalError(
            "terminal='bce_with_logits' contradicts the output's gradient: it is not "
            "w (sigmoid(z) - target) with targets between 0 and 1; name the loss that is used, "
            "or pass a callable output -> factor of its Hessian"
        )
    return torch.full_like(z, w)
