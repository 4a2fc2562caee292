# SPDX-License-Identifier: MIT
"""M = A (x) G, the Kronecker-factored curvatures of whole layers: KFAC and EKFAC.

A = E[x x^T], G = E[V_h V_h^T] over a layer's inputs (with the constant 1 for its bias) and the
gradients of single samples at its output, in units of one sample's unscaled loss (Martens and
Grosse 2015; convolutions: Grosse and Martens 2016, sums over positions in A, means in G; EKFAC:
George et al. 2018).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ddpnopt.curvature.base import Curvature, Rate, State, momentum_step
from ddpnopt.curvature.factorisation import eigenvectors, inverse
from ddpnopt.positions import Diagonal, Kronecker, Product
from ddpnopt.ranges import check_number, count, positive, share
from ddpnopt.typing import Tensor

#: Sums of tensors and of whole numbers over the ranks that hold the batch together.
Counted = Callable[[Sequence[Tensor], Sequence[int]], tuple[Sequence[Tensor], Sequence[int]]]


class Factors(Protocol):
    """What is measured of a layer: inputs u and unscaled gradients v at each position."""

    def products(self, bias: bool) -> tuple[Tensor, Tensor, int]:
        """Sums of u u^T (with the constant 1 in u) and of v v^T, by group, and how many v."""

    def squares(self, T_A: Tensor, T_G: Tensor, bias: bool) -> Tensor:
        """Sum over the samples of (T_G D T_A^T)^2, D their weight gradients."""


def by_itself(
    parts: Sequence[Tensor], counts: Sequence[int]
) -> tuple[Sequence[Tensor], Sequence[int]]:
    """One process has the whole batch."""
    return parts, counts


@dataclass(frozen=True)
class Joint(Curvature):
    """A curvature of a layer's whole matrix; its state lives with the layer's weight.

    Parameters that can't be joined (norms, embeddings) take the diagonal of the same Fisher
    matrix, and parameters that belong to no recorded layer M = I.

    Args:
        damping: Added to M: to A and G by the pi split in KFAC, to the diagonal in EKFAC.
        decay: Of the running means; the first k steps take plain means, min(decay, 1 - 1/k).
        update_every: Steps between two inversions (or eigendecompositions); the first so many
            steps have one each.
        statistics_every: Steps between two updates of A, G and EKFAC's s, likewise; the steps in
            between use them as they are. The diagonals of parameters by themselves are updated in
            every step.

    Raises:
        ValueError: An option is out of range.
    """

    damping: float | int = 0.1
    decay: float | int = 0.95
    update_every: int = 10
    statistics_every: int = 1

    counts: ClassVar[tuple[str, ...]] = ("step", "fallbacks")
    #: What of a layer's state is made of A and G where they are decomposed: subclasses say.
    _made: ClassVar[tuple[str, ...]] = ()
    #: What else a step without statistics leaves as it is.
    _kept: ClassVar[tuple[str, ...]] = ("A", "G")

    def __post_init__(self) -> None:
        """Check the options."""
        owner = type(self).__name__
        check_number(owner, "damping", self.damping, positive, "must be positive and finite")
        check_number(owner, "decay", self.decay, share, "must lie in [0, 1)")
        for name in ("update_every", "statistics_every"):
            check_number(owner, name, getattr(self, name), count, "a number of steps")

    # One parameter by itself: the diagonal of the Fisher matrix ------------------------------

    @property
    def statistics(self) -> str:
        """Squares of each sample's gradient."""
        return "squares"

    def moment(self, state: State, gradient: Tensor, squares: Tensor | None) -> Tensor | None:
        """Running mean of the samples' squared gradients; None where no layer tells them."""
        if squares is None:
            return None
        return self._mean(state.get("fisher"), squares, state.get("step", 0) + 1)

    def inverse(self, state: State, moment: Tensor | None) -> Tensor | None:
        """1 / (F + damping)."""
        return None if moment is None else (moment + self.damping).reciprocal()

    def update(
        self, p: Tensor, d: Tensor, state: State, moment: Tensor | None, lr: Rate, momentum: float
    ) -> dict[str, Any]:
        """b <- mu b + M^-1 d, u <- u - eta b."""
        new: dict[str, Any] = {}
        if moment is not None:
            d = d / (moment + self.damping)
            new = {"fisher": moment, "step": state.get("step", 0) + 1}
        return new | momentum_step(p, d, state, lr, momentum)

    # A layer's matrix ------------------------------------------------------------------------

    def measures(self, state: State, inputs: int) -> bool:
        """Whether the coming step updates the layer's statistics.

        Args:
            state: The layer's state, read only.
            inputs: Width of A.
        """
        k = state.get("step", 0) + 1
        known = all(name in state for name in (*self._kept, *self._made))
        known = known and state["A"].shape[-1] == inputs
        return not known or _latest(k, self.statistics_every) == k

    def joint(
        self,
        state: State,
        factors: Factors | None,
        bias: bool,
        samples: int,
        counted: Counted = by_itself,
    ) -> dict[str, Any]:
        """The layer's statistics after this step, without storing them.

        Args:
            state: The layer's state, read only.
            factors: Sums over the layer's passes; None in a step that does not update the
                statistics (see `measures`).
            bias: The inputs have a constant 1 besides, whose weights are the bias.
            samples: Number of samples B, on all ranks.
            counted: Sums tensors and whole numbers over the ranks.

        Returns:
            A, G, what is made of them, step and fallbacks.

        Raises:
            NonFiniteError: A factor that is to be inverted is not finite.
        """
        found = factors.products(bias) if factors is not None else None
        if found is not None and "A" in state and state["A"].shape != found[0].shape:
            state = {}  # a bias has joined or left the matrix: other statistics
        k = state.get("step", 0) + 1
        new = {name: state.get(name) for name in (*self._kept, *self._made)}
        new |= {"step": k, "fallbacks": state.get("fallbacks", 0)}
        if found is not None:
            (A, G), (rows,) = counted(found[:2], found[2:])
            updates = _updates(k, self.statistics_every)
            new["A"] = self._mean(new["A"], A / max(samples, 1), updates)
            new["G"] = self._mean(new["G"], G / max(rows, 1), updates)
        if self._decomposes(k) or any(new[name] is None for name in (*self._kept, *self._made)):
            self._decompose(state, new)
        if factors is not None:
            self._measure(new, factors, bias, samples, counted)
        return new

    def kind(self, state: State) -> Hashable:
        """Whether the coming step updates and decomposes A and G, once the means have settled."""
        if "step" not in state:  # a bias in its weight's matrix
            return ()
        k, joined = state["step"] + 1, "A" in state
        updates = _updates(k, self.statistics_every) if joined else k
        if 1 - 1 / updates < self.decay or k <= max(self.update_every, self.statistics_every):
            return None
        return (_latest(k, self.statistics_every) == k, self._decomposes(k)) if joined else ()

    def _decomposes(self, k: int) -> bool:
        """Whether step k is due, and there are new statistics since the last that was."""
        fresh = _latest(k, self.statistics_every) > _latest(k - 1, self.update_every)
        return fresh and _latest(k, self.update_every) == k

    @abstractmethod
    def _decompose(self, state: State, new: dict[str, Any]) -> None:
        """Make what the gain is made of from the present A and G."""

    def _measure(
        self, new: dict[str, Any], factors: Factors, bias: bool, samples: int, counted: Counted
    ) -> None:
        """What is measured besides, in coordinates that A and G have given: nothing here."""
        return None

    @abstractmethod
    def gain(self, joint: State, eta: float, bias: bool) -> Kronecker:
        """P = eta M^-1."""

    def _mean(self, before: Tensor | None, now: Tensor, k: int) -> Tensor:
        decay = min(self.decay, 1 - 1 / k)
        return now if before is None or decay == 0 else before.lerp(now, 1 - decay)


@dataclass(frozen=True)
class KFAC(Joint):
    """M = (A + pi sqrt(damping) I) (x) (G + sqrt(damping) / pi I).

    pi^2 is the ratio of the factors' mean eigenvalues. Options: see `Joint`.
    """

    name: ClassVar[str] = "kfac"
    _made: ClassVar[tuple[str, ...]] = ("A_inverse", "G_inverse")

    def _decompose(self, state: State, new: dict[str, Any]) -> None:
        """The damped factors' inverses."""
        A, G = new["A"], new["G"]
        a, g = (F.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] for F in (A, G))
        known = (a > 0) & (g > 0)
        pi = torch.where(known, (a / g.clamp(min=torch.finfo(g.dtype).tiny)).sqrt(), 1.0)
        root = self.damping**0.5
        for name, F, extra in zip(self._made, (A, G), (pi * root, root / pi), strict=True):
            identity = torch.eye(F.shape[-1], dtype=F.dtype, device=F.device)
            new[name], failed = inverse(F + extra * identity)
            new["fallbacks"] += failed

    def gain(self, joint: State, eta: float, bias: bool) -> Kronecker:
        """The inverses' Kronecker product, times eta."""
        A, G = (joint[name] for name in self._made)
        return Product(A, G, eta, bias)


@dataclass(frozen=True)
class EKFAC(Joint):
    """M = U diag(s + damping) U^T with U = U_G (x) U_A, the eigenvectors of KFAC's factors.

    s is the running mean of the samples' squared gradients in that basis; where the basis changes,
    s is the diagonal of the same matrix in the new one. Options: see `Joint`.
    """

    name: ClassVar[str] = "ekfac"
    basis: ClassVar[tuple[str, ...]] = ("T_A", "T_G", "scale")
    _made: ClassVar[tuple[str, ...]] = ("T_A", "T_G")
    _kept: ClassVar[tuple[str, ...]] = (*Joint._kept, "scale")

    def _decompose(self, state: State, new: dict[str, Any]) -> None:
        """T_A and T_G have the eigenvectors as rows; s follows into the new basis."""
        for name, F in (("T_A", new["A"]), ("T_G", new["G"])):
            Q, failed = eigenvectors(F)
            new[name] = Q.mT.contiguous()
            new["fallbacks"] += failed
        if any(name not in state for name in self._made):
            new["scale"] = None  # of an unknown basis
        if new["scale"] is not None and self.decay > 0:  # with 0 nothing of it stays
            R_A = (new["T_A"] @ state["T_A"].mT).square()
            R_G = (new["T_G"] @ state["T_G"].mT).square()
            new["scale"] = R_G @ new["scale"] @ R_A.mT

    def _measure(
        self, new: dict[str, Any], factors: Factors, bias: bool, samples: int, counted: Counted
    ) -> None:
        """s, the samples' squared gradients in the eigenbasis."""
        (total,), _ = counted([factors.squares(new["T_A"], new["T_G"], bias)], [])
        updates = _updates(new["step"], self.statistics_every)
        new["scale"] = self._mean(new["scale"], total / max(samples, 1), updates)

    def gain(self, joint: State, eta: float, bias: bool) -> Kronecker:
        """A diagonal in the eigenbasis."""
        scale = (joint["scale"] + self.damping).reciprocal_().mul_(eta)
        return Diagonal(joint["T_A"], joint["T_G"], scale, bias)


def _latest(k: int, every: int) -> int:
    """The latest step, k or before it, of those that are due: all up to `every`, its multiples."""
    return k if k <= every else k - k % every


def _updates(k: int, every: int) -> int:
    """How many steps up to k were due."""
    return min(k, every) + max(k // every - 1, 0)
