# SPDX-License-Identifier: MIT
"""Terminal costs phi: the line model and the factor of phi_xx, at the last layer's output.

A cost is fitted from the output z and its gradient G alone (`recognition.py`), so that losses
inside the model, any scale, GradScaler and accumulation need no word from the user. Throughout,
G = w g with g the gradient of a sample's plain loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ddpnopt.errors import TerminalError
from ddpnopt.objectives import Objective, squared_objective
from ddpnopt.typing import Tensor

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

    def times(self, share: float) -> Cost:
        """The same loss, multiplied by a number."""
        root = share**0.5
        return replace(self, w=self.w * share, factor=lambda rank: self.factor(rank) * root)


def concatenated(costs: list[Cost]) -> Cost:
    """The cost over the samples of several passes of one kind."""
    if len(costs) == 1:
        return costs[0]
    excess = [c.excess for c in costs if c.excess is not None]
    return Cost(
        costs[0].name,
        torch.cat([c.w for c in costs]),
        torch.cat([c.kappa for c in costs]),
        torch.cat(excess) if len(excess) == len(costs) else None,
        lambda rank: torch.cat([c.factor(rank) for c in costs], dim=1),
    )


def joint(parts: list[tuple[Cost | None, Tensor]], samples: int) -> Cost | None:
    """The cost of several outputs whose losses are summed, from each one's cost and gradient.

    Along the joint gradient, an output's share of its square is |G_h|^2 / sum |G|^2. With w the
    largest of the outputs' factors w_h, the plain loss is sum_h (w_h / w) l_h, and

        kappa = sum_h share_h^2 kappa_h w / w_h,    Lambda = sum_h share_h Lambda_h.

    An output whose loss is not known counts as linear: kappa_h = 0, Lambda_h = 1. The factor's
    columns are those of the outputs, one after another: each is pulled back from its own output, as
    it arrives.

    Args:
        parts: The outputs' costs, None for one that is not known, and their gradients.
        samples: B.

    Returns:
        None where none is known.
    """
    costs = [cost for cost, _ in parts if cost is not None]
    if len(parts) == 1 or not costs:
        return costs[0] if costs else None
    wide, tiny = costs[0].w.dtype, torch.finfo(costs[0].w.dtype).tiny
    squares = torch.stack([G.to(wide).reshape(samples, -1).square().sum(1) for _, G in parts])
    shares = squares / squares.sum(0).clamp(min=tiny)
    own = [share for share, (cost, _) in zip(shares, parts, strict=True) if cost is not None]
    pairs = list(zip(own, costs, strict=True))
    w = torch.stack([cost.w for cost in costs]).amax(0)
    kappa = [
        torch.where(share > 0, share.square() * c.kappa * (w / c.w.clamp(min=tiny)), 0.0)
        for share, c in pairs
    ]
    bounded = [share * c.excess for share, c in pairs if c.excess is not None]

    def factor(rank: int | None) -> Tensor:
        raise TerminalError(
            "the loss is a sum over several outputs, which this value function can't take at one: "
            "use value='moreau', 'gauss_newton' or 'low_rank'"
        )

    return Cost(
        "+".join(dict.fromkeys(cost.name for cost in costs)),
        w,
        torch.stack(kappa).sum(0),
        torch.stack(bounded).sum(0) if len(bounded) == len(costs) else None,
        factor,
    )


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
    square = G.reshape(samples, -1).to(z.dtype).square().sum(1)
    w = torch.full_like(square, 1 / samples)
    kappa = w * curvature / square.clamp(min=torch.finfo(z.dtype).tiny ** 0.5)
    value = squared_objective(z, G, curvature)
    return Cost(name, w, kappa, None, lambda rank: diagonal_columns(root, z.shape), value)


def diagonal_columns(root: Tensor, shape: torch.Size) -> Tensor:
    """The factor, (Z, *shape), of a diagonal Hessian with the square roots (B, Z)."""
    return torch.diag_embed(root).movedim(-1, 0).reshape(-1, *shape)


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
