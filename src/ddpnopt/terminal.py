# SPDX-License-Identifier: MIT
"""Terminal costs phi: the line model and the factor of phi_xx, at the last layer's output.

A cost is fitted from the output z and its gradient G alone (`recognition.py`), so that losses
inside the model, any scale, GradScaler and accumulation need no word from the user. Throughout,
G = w g with g the gradient of a sample's plain loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ddpnopt.errors import TerminalError
from ddpnopt.objectives import (
    Objective,
    logistic_objective,
    softmax_objective,
    squared_objective,
)
from ddpnopt.typing import Tensor

#: Floor of |g| in kappa and the excess: their squares must stay inside float32.
SMALLEST = 1e-15
#: A gradient must have this precision, and some entry this share of w, to confirm a loss quickly.
HARD_EPS, INFORMATIVE = 1e-6, 1e-3
REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Cost:
    """A fitted terminal cost of one pass; satisfies `value.base.TerminalCost`.

    Attributes:
        name: The cost's name.
        w: (B,) factor of each sample's plain loss.
        kappa: (B,) curvature along the gradient per slope squared.
        excess: (B,) Lambda - 1, or None where the slope is unbounded.
        factor: Columns S with S S^T = phi_xx, (r, *z.shape), for a bound on their number.
        value: The loss at another output, up to a constant; None where it is not known.
    """

    name: str
    w: Tensor
    kappa: Tensor
    excess: Tensor | None
    factor: Callable[[int | None], Tensor]
    value: Objective | None = None

    def hessian_factor(self) -> Tensor:
        """(B, Z, r), exact."""
        S = self.factor(None)
        return S.reshape(S.shape[0], self.w.shape[0], -1).permute(1, 2, 0)


def concatenated(costs: list[Cost]) -> Cost:
    """The cost over the samples of several passes of one kind."""
    if len(costs) == 1:
        return costs[0]
    excess = [c.excess for c in costs if c.excess is not None]

    def factor(rank: int | None) -> Tensor:
        return torch.cat([c.factor(rank) for c in costs], dim=1)

    return Cost(
        costs[0].name,
        torch.cat([c.w for c in costs]),
        torch.cat([c.kappa for c in costs]),
        torch.cat(excess) if len(excess) == len(costs) else None,
        factor,
    )


def softmax_cost(name: str, z: Tensor, G: Tensor, w: Tensor, axis: int, samples: int) -> Cost:
    """Cross-entropy of softmax, with any target distribution.

    Args:
        name: Name to report.
        z: Logits, (N, ..) with the classes along ``axis``; N a multiple of the samples.
        G: Their gradient.
        w: Factor of each row's plain cross-entropy, (N, positions); 0 where a row is ignored.
        axis: Class axis.
        samples: B.
    """
    classes = z.shape[axis]
    rows = z.movedim(axis, -1).reshape(samples, -1, classes)
    gradient = G.movedim(axis, -1).reshape(samples, -1, classes).to(rows.dtype)
    p = torch.softmax(rows, -1)
    w_rows = w.reshape(samples, -1).to(rows.dtype)
    w_sample = _sample_weight(w_rows)
    omega = w_rows / w_sample[:, None]
    g, size = _normalised(gradient / w_sample[:, None, None])
    gbar = (p * g).sum(-1, keepdim=True)
    square = g.square().sum((1, 2))
    variance = (omega[..., None] * p * (g - gbar).square()).sum((1, 2))
    reach = (omega * (g.amax(-1) - gbar[..., 0])).sum(1)
    kappa = variance / (square.square() * size.square())
    excess = reach / (square * size)

    def factor(rank: int | None) -> Tensor:
        S = softmax_factor(p, gradient, rank) * w_rows.sqrt()[None, ..., None]
        S = _spread_positions(S).reshape(-1, *z.movedim(axis, -1).shape)
        return S.movedim(-1, axis if axis < 0 else axis + 1)  # the columns lead

    def value(new: Tensor) -> Tensor:
        return softmax_objective(z, G, w, axis)(new)

    return Cost(name, w_sample, kappa, excess.clamp(min=0), factor, value)


def hard_label_cost(name: str, z: Tensor, G: Tensor, w: float) -> Cost | None:
    """`softmax_cost` of G = w (p - e_y) with one w for all rows, if that is what G is.

    What earlier passes have shown is confirmed at little cost; whatever differs, even by a rescaled
    loss, has to be recognised anew. Rows without a gradient are ignored ones.

    Args:
        name: Name to report.
        z: Logits (B, C).
        G: Their gradient.
        w: The factor that all rows are expected to have.

    Returns:
        The cost; None if some row is not of this form, or too confident to tell.
    """
    eps = torch.finfo(G.dtype).eps
    if eps > HARD_EPS:
        return None
    gradient = G.to(z.dtype)
    p = torch.softmax(z, -1)
    target = torch.sub(p, gradient, alpha=1 / w)
    size = gradient.abs().amax(-1)
    wrong = (target.amax(-1) - 1).abs_().add_(target.abs_().sum(-1).sub_(1).abs_())
    worst, largest = torch.stack([(wrong * (size > 0)).amax(), size.amax()]).tolist()
    if not (worst <= 64 * eps and largest >= INFORMATIVE * w):
        return None
    g = gradient / size.clamp(min=torch.finfo(z.dtype).tiny)[:, None]
    size = (size / w).clamp_(min=SMALLEST)
    gbar = (p * g).sum(-1, keepdim=True)
    reach = g.amax(-1).sub_(gbar[:, 0])
    area = g.square().sum(-1).clamp_(min=1).mul_(size)  # one entry has size 1
    variance = (g - gbar).square_().mul_(p).sum(-1)
    weight = torch.full_like(size, w)

    def exact() -> Cost:
        used = torch.where(gradient.abs().amax(-1) > 0, weight, 0.0)
        return softmax_cost(name, z, G, used, -1, len(z))

    def value(new: Tensor) -> Tensor:
        known = exact().value
        assert known is not None
        return known(new)

    kappa, excess = variance / area.square(), (reach / area).clamp_(min=0)
    return Cost(name, weight, kappa, excess, lambda rank: exact().factor(rank), value)


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

    def factor(rank: int | None) -> Tensor:
        root = (w_element * p * (1 - p)).sqrt()
        return torch.diag_embed(root).movedim(-1, 0).reshape(-1, *z.shape)

    value = logistic_objective(z, G, w)
    return Cost("bce_with_logits", w_sample, kappa, excess, factor, value)


@dataclass(frozen=True)
class SquaredError(ABC):
    """A squared distance as a terminal cost: phi_xx = curvature I; options as in `MSE`."""

    scale: float | int | Callable[[], float] = 1.0
    reduction: str = "mean"

    #: The cost's name, and the one that users may give in its place.
    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check the reduction."""
        check_reduction(type(self).__name__, self.reduction)

    def __call__(self, z: Tensor) -> Tensor:
        """The factor S of phi_xx, (B, elements, elements)."""
        shape = (z.shape[0], z[0].numel())
        root = torch.full(shape, self.curvature(z), dtype=z.dtype, device=z.device).sqrt()
        return torch.diag_embed(root)

    def curvature(self, z: Tensor) -> float:
        """phi_xx at the output z = this times I."""
        scale = float(self.scale() if callable(self.scale) else self.scale)
        return scale * self._plain_curvature(z)

    @abstractmethod
    def _plain_curvature(self, z: Tensor) -> float:
        """The curvature of the loss without a scale."""


@dataclass(frozen=True)
class MSE(SquaredError):
    """Squared error as a terminal cost: ``nn.MSELoss()`` times a scale.

    Its scale can't be read off the gradient, so it is the user's to tell.

    Args:
        scale: What the loss is multiplied by before ``backward`` (1/k under accumulation); a
            function for a scale that changes (``scaler.get_scale``).
        reduction: "mean" over all elements, or "sum".

    Raises:
        ValueError: The reduction is unknown.
    """

    name: ClassVar[str] = "mse"

    def _plain_curvature(self, z: Tensor) -> float:
        return 2 / z.numel() if self.reduction == "mean" else 2.0


@dataclass(frozen=True)
class MMC(SquaredError):
    """The Max-Mahalanobis center loss as a terminal cost: `ddpnopt.MMCLoss` times a scale.

    Its scale can't be read off the gradient, so it is the user's to tell.

    Args:
        scale: What the loss is multiplied by before ``backward`` (1/k under accumulation); a
            function for a scale that changes (``scaler.get_scale``).
        reduction: "mean" over the samples, or "sum".

    Raises:
        ValueError: The reduction is unknown.
    """

    name: ClassVar[str] = "mmc"

    def _plain_curvature(self, z: Tensor) -> float:
        return 1 / z.shape[0] if self.reduction == "mean" else 1.0


def check_reduction(owner: str, reduction: str) -> None:
    """Refuse an unknown reduction.

    Raises:
        ValueError: It lists the known ones.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"{owner}(reduction={reduction!r}): choose from {', '.join(REDUCTIONS)}")


def squared_cost(name: str, z: Tensor, G: Tensor, curvature: float, samples: int) -> Cost:
    """A cost with phi_xx = curvature I, as the mean squared error has with 2 / elements."""
    columns = z[0].numel() * (z.shape[0] // samples)
    root = torch.full((samples, columns), curvature, dtype=z.dtype, device=z.device).sqrt()

    def factor(rank: int | None) -> Tensor:
        return torch.diag_embed(root).movedim(-1, 0).reshape(-1, *z.shape)

    square = G.reshape(samples, -1).to(z.dtype).square().sum(1)
    w = torch.full_like(square, 1 / samples)
    kappa = w * curvature / square.clamp(min=torch.finfo(z.dtype).tiny ** 0.5)
    return Cost(name, w, kappa, None, factor, squared_objective(z, G, curvature))


def callable_cost(function: Callable[[Tensor], Tensor], z: Tensor, G: Tensor, samples: int) -> Cost:
    """A cost known by a user's factor S(z), (B, C, r) with S S^T = phi_xx of each sample.

    Raises:
        TerminalError: S does not fit the output or is not finite.
    """
    S = function(z)
    elements = z.numel() // samples
    if not isinstance(S, Tensor) or S.dim() < 3 or S.shape[0] != samples:
        shape = tuple(S.shape) if isinstance(S, Tensor) else type(S).__name__
        raise TerminalError(
            f"terminal: the callable returned {shape} for an output of shape {tuple(z.shape)}; "
            f"expected a factor of shape ({samples}, {elements}, columns)"
        )
    S = S.detach().to(z.dtype).reshape(samples, -1, S.shape[-1])
    if S.shape[1] != elements or not bool(S.isfinite().all()):
        raise TerminalError(
            f"terminal: the callable's factor has {S.shape[1]} rows a sample for an output with "
            f"{elements} elements, or entries that are not finite"
        )
    gradient = G.reshape(samples, -1).to(z.dtype)
    square = gradient.square().sum(1)
    w = torch.full_like(square, 1 / samples)
    along = torch.einsum("bcr,bc->br", S, gradient).square().sum(1)
    floor = torch.finfo(z.dtype).tiny ** 0.25
    kappa = w * along / square.clamp(min=floor).square()
    return Cost("callable", w, kappa, None, lambda rank: S.permute(2, 0, 1).reshape(-1, *z.shape))


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
