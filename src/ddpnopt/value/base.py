# SPDX-License-Identifier: MIT
"""What a value function is asked for, and the linear maps it may use.

The value at layer t is carried in coordinates of the form's own choice. Values never see layers
or curvatures: a `Maps` object gives them the products they need, per sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from ddpnopt.typing import Tensor

#: A vector in h-space or x-space: one tensor for each recorded pass, in the layer's own shapes.
Blocks = Sequence[Tensor]
STATISTICS = ("plain", "value")


@dataclass(frozen=True)
class Coupling:
    """How far the samples' steps in one layer add up: rho, or what gives it.

    Attributes:
        length: gbar^T P gbar of the batch gradient gbar; None where rho itself is known.
        rho: Known from earlier steps.
    """

    length: float | Tensor | None = None
    rho: float | Tensor | None = None


def mean_field(
    couplings: Sequence[Coupling],
    squares: Tensor,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """rho = gbar^T P gbar / sum_i w_i s_i of each layer, between 1 and B.

    Args:
        couplings: One for each layer.
        squares: (layers, B) w_i s_i.
        pool: Sums a vector over several ranks, each with samples of its own.

    Returns:
        (layers,).
    """
    alone, samples = squares.sum(1), float(squares.shape[1])
    if pool is not None:
        pooled = pool(torch.cat([alone, alone.new_tensor([samples])]))
        alone, samples = pooled[:-1], float(pooled[-1])
    lengths = [c.length for c in couplings if isinstance(c.length, Tensor)]
    if len(lengths) == len(couplings):
        length = torch.stack(lengths).to(alone)
    else:
        numbers = [c.length if isinstance(c.length, float) else 0.0 for c in couplings]
        length = alone.new_tensor(numbers)
        for index, one in enumerate(couplings):
            if isinstance(one.length, Tensor):
                length[index] = one.length
    rho = torch.where(alone > 0, length / alone, 1.0).clamp_(1, samples)
    for index, one in enumerate(couplings):
        if isinstance(one.rho, Tensor):
            rho[index] = one.rho
        elif one.rho is not None:
            rho[index].fill_(one.rho)  # an assignment would copy from the host
    return rho


class Matrices(Protocol):
    """One layer's maps as explicit matrices, U all its parameters."""

    def control(self) -> Tensor:
        """(B, U, H) g_u^T, U all parameters of the layer."""

    def control_columns(self) -> Tensor:
        """(1+r, B, U) the columns [g, Z_1 .. Z_r] pulled back to the control."""

    def joint_gram(self) -> Tensor:
        """((1+r) B, (1+r) B) Gram matrix of those columns over all pairs of samples."""

    def precondition(self, columns: Tensor) -> Tensor:
        """P times (B, U, k)."""

    def state_map(self) -> Tensor:
        """(B, H, X) g_x."""

    def state(self, dx: Blocks) -> Tensor:
        """(B, X) a change of the state."""

    def mixed(self, V: Tensor) -> Tensor:
        """(B, U, X) V . g_ux for V (B, H)."""

    def state_curvature(self, V: Tensor) -> Tensor | None:
        """(B, X, X) V . g_xx; None where g is linear in the state."""

    def segment_curvature(self, V: Tensor) -> Tensor:
        """(B, H, H) V . sigma_hh for V (B, X') at the next layer's state."""


class Maps(Protocol):
    """One layer's linear maps over all samples B of the step (the passes are concatenated).

    Columns are [g, Z_1 .. Z_r]: the ordinary gradient and the pulled-back factor (r may be 0).
    """

    @property
    def strength(self) -> float:
        """The factor on S that suits the layer's curvature."""

    def gram(self) -> Tensor:
        """(B, 1+r, 1+r) Gram matrix eta (g, Z)_u^T M^-1 (g, Z)_u."""

    def lengths(self) -> Tensor:
        """(B,) its first entry, s = eta g_u^T M^-1 g_u."""

    def h_gram(self) -> Tensor:
        """(B, 1+r, 1+r) inner products of the same columns in h-space."""

    def project(self, dx: Blocks) -> Tensor:
        """(B, r) the columns' Z_x . dx; (B, 1) with g itself where there is no factor."""

    def combine(self, a: Tensor | None, b: Tensor | None) -> Blocks:
        """The h-space vectors a g + Z b, a (B,), b (B, r)."""

    def coupling(self, weight: Tensor) -> Coupling:
        """What tells how far the samples' own steps add up.

        Args:
            weight: (B,) w_i s_i, the samples' own squared step lengths.
        """

    def gradient(self) -> Tensor:
        """(B, H) the gradient g in h-space."""

    def curvature(self) -> Tensor:
        """(B, H, H) D = eta g_u M^-1 g_u^T."""

    def push(self, dx: Blocks) -> Tensor:
        """(B, H) the map g_x dx."""

    def pull(self, V: Tensor) -> Tensor:
        """(B, H, k) columns in h-space to (B, X, k): g_x^T V."""

    def through(self, V: Tensor) -> Tensor:
        """(B, X', k) columns at the next layer's state to (B, H, k): sigma_h^T V."""

    def split(self, v: Tensor) -> Blocks:
        """(B, H) to h-space vectors, one for each pass."""

    @property
    def matrices(self) -> Matrices:
        """The same maps as explicit matrices, for value functions that can't do without."""


class TerminalCost(Protocol):
    """The recognised or named terminal cost phi of the step's samples, at the output z."""

    @property
    def w(self) -> Tensor:
        """(B,) the factor of each sample's plain loss in the loss that autograd sees."""

    @property
    def kappa(self) -> Tensor:
        """(B,) curvature of the plain loss along its gradient, per slope squared."""

    @property
    def excess(self) -> Tensor | None:
        """(B,) Lambda - 1 of the logistic line; None where the quadratic is right."""

    def hessian_factor(self) -> Tensor:
        """(B, Z, r) the exact factor S S^T = phi_xx in the units of the loss."""


class Policy(ABC):
    """du_t(dx_t): turns what earlier layers did to the state into this layer's gradient."""

    #: (B,) diagnostics, None where the form has no such scalar.
    S: Tensor | None = None
    coefficient: Tensor | None = None

    @abstractmethod
    def __call__(self, maps: Maps, dx: Blocks | None) -> Blocks:
        """The h-space vectors v_i with d_t = sum_i (g + v)_u,i; dx None for q = 0."""

    def bend(self, maps: Maps, dx: Blocks) -> Blocks | None:
        """Vectors V_i whose (V_i . g_ux) dx_i is added to d_t; None for first-order dynamics."""
        return None


class Recursion(ABC):
    """The value function at one layer's output, on its way backwards."""

    #: Sums a vector over several ranks that hold the batch together.
    pool: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def correction(self, maps: Maps) -> Blocks | None:
        """V_h - g at this layer, before its own step; None for zero (``statistics="value"``)."""

    @abstractmethod
    def back(self, maps: Maps, bottom: bool) -> Policy:
        """The layer's policy; afterwards the recursion stands at the layer's input.

        Args:
            maps: The layer.
            bottom: No layer lies below, so nothing has to be backed up.
        """

    def close(self) -> None:  # noqa: B027 - most forms have nothing left to do
        """All layers have been backed up through: policies may be used from now on."""


class ValueFunction(ABC):
    """A form of the value function: a frozen set of options that starts a recursion."""

    name: ClassVar[str]
    #: What has to be linearised: "gradient", "factor" (S pulled back) or "jacobian" (segments).
    linearization: ClassVar[str]
    statistics: str
    #: Columns of the factor kept (None: exact).
    rank: int | None = None

    @property
    def graphs(self) -> bool:
        """Only what a change of the state does to the loss is needed: any network will do."""
        return self.linearization != "jacobian" and not self.segments

    @property
    def segments(self) -> bool:
        """The functions between the layers are needed, for their second derivatives."""
        return False

    @abstractmethod
    def start(self, terminal: TerminalCost) -> Recursion:
        """The recursion at the output."""
