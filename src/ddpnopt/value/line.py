# SPDX-License-Identifier: MIT
"""Models of one sample's loss along its own gradient, and their Moreau envelopes.

With delta = g . dz the predicted change of the plain loss, l'(0) = 1 and l''(0) = kappa.

- quadratic: l'(delta) = 1 + kappa delta (exact for squared error).
- logistic:  l'(delta) = Lambda sigma(omega delta - log(Lambda - 1)), bounded by Lambda
  (exact for two classes), omega = kappa Lambda / (Lambda - 1).

The value of layer t is the Moreau envelope of l with parameter S, the sum of the steps
s_k = eta g_u,k^T M^-1 g_u,k still to come (inf-convolutions with parabolas add up), and the
policy's coefficient is its derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from ddpnopt.decisions import anything, exceed, traced
from ddpnopt.typing import Float, Tensor

#: Below this excess of the slope's bound the logistic is taken at its limit (Lambda -> 1).
FLAT = 1e-4
#: Floor of the excess inside the logarithm.
FLOOR = 1e-6
#: Largest A = omega S Lambda: keeps the fixed point finite at absurd learning rates.
STIFFEST = 1e12
#: Smallest A, below which a flow is as long as its first instant.
SHORTEST = 1e-30
#: Above this v the slope is Lambda to the last bit; below minus STEEPEST it is 0.
STRAIGHT, STEEPEST = 40.0, 600.0
NEWTON_STEPS = 30


@dataclass(frozen=True)
class Line:
    """One line model a sample.

    Attributes:
        kappa: (B,) curvature along the gradient, sum p (g - gbar)^2 / |g|^4 for softmax.
        excess: (B,) Lambda - 1, how far the slope's bound lies above 1; None for the quadratic.
    """

    kappa: Float[Tensor, " b"]
    excess: Float[Tensor, " b"] | None = None

    @cached_property
    def logistic(self) -> tuple[Tensor, Tensor, Tensor]:
        """(Lambda, omega, -log(Lambda - 1)), in float64 where the device has it.

        The scalars are few, and A = omega S Lambda spans 12 decades.
        """
        assert self.excess is not None
        wide = self.kappa.dtype if self.kappa.device.type == "mps" else torch.float64
        kappa, excess = self.kappa.to(wide), self.excess.to(wide)
        Lambda = 1 + excess
        omega = torch.where(excess < FLAT, Lambda, kappa * Lambda / excess.clamp(min=FLAT))
        return Lambda, omega, -excess.clamp(min=FLOOR).log()


class Slope(Protocol):
    """The coefficient of a policy: by how much a sample's gradient is re-weighted, given q."""

    def __call__(self, q: Float[Tensor, " *t b"] | None) -> Float[Tensor, " *t b"]:
        """The factor; 1 at S = q = 0.

        Args:
            q: Predicted changes of the plain loss by what earlier layers have done; None for 0.
        """

    def rows(self) -> Sequence[Slope]:
        """One for each row of S."""


@dataclass(frozen=True, eq=False)
class Envelope:
    """Derivative of the Moreau envelope: l'(delta*) with delta* = q - S l'(delta*).

    Attributes:
        line: The samples' line models.
        S: Envelope parameters, in units of the plain loss per unit of slope.
    """

    line: Line
    S: Float[Tensor, " *t b"]

    def __call__(self, q: Float[Tensor, " *t b"] | None) -> Float[Tensor, " *t b"]:
        """The coefficient."""
        line, S = self.line, self.S
        if line.excess is None:
            numerator: Tensor | float = 1.0 if q is None else 1 + line.kappa * q
            return numerator / (1 + line.kappa * S)
        Lambda, omega, start = line.logistic
        c = start if q is None else torch.addcmul(start, omega, q.to(omega.dtype))
        return (Lambda * torch.sigmoid(_fixed_point(_stiffness(line, S), c))).to(S.dtype)

    def rows(self) -> Sequence[Envelope]:
        """One for each row of S."""
        return [Envelope(self.line, S) for S in self.S.unbind()]


@dataclass(frozen=True, eq=False)
class Flow:
    """Average slope along the gradient flow delta' = -l'(delta), delta(0) = q, of length S.

    The envelope is one implicit Euler step of that flow and falls short of it at small S, where
    nothing is wrong; the flow itself is the envelope with c S, c rising from 1/2 (the implicit
    midpoint rule) at small S to 1 at large S: exponential fitting, without a constant to choose.
    For the quadratic line the coefficient at q = 0 would be (1 - exp(-kappa S)) / (kappa S).

    With v = omega delta - log(Lambda - 1) the flow conserves v - exp(-v) + omega Lambda tau, so
    the distance d = v(0) - v(S) solves d + b expm1(d) = A with b = exp(-v(0)), A = omega S Lambda.

    Attributes:
        line: The samples' line models, logistic.
        A: Length of the flow, in units of v.
        scale: Lambda / A: the coefficient is that much times the distance.
        dtype: Of the coefficient.
    """

    line: Line
    A: Float[Tensor, " *t b"]
    scale: Float[Tensor, " *t b"]
    dtype: torch.dtype

    @staticmethod
    def of(line: Line, S: Float[Tensor, " *t b"]) -> Flow:
        """A flow of length S."""
        A = _stiffness(line, S).clamp_(min=SHORTEST)
        return Flow(line, A, line.logistic[0] / A, S.dtype)

    def __call__(self, q: Float[Tensor, " *t b"] | None) -> Float[Tensor, " *t b"]:
        """The coefficient."""
        _, omega, start = self.line.logistic
        if q is None:  # v(0) = -log(Lambda - 1) is near 0
            return _flow_distance(self.A, -start).mul_(self.scale).to(self.dtype)
        below = torch.addcmul(-start, omega, q.to(omega.dtype), value=-1)  # -v(0)
        far = torch.rsub(below, -STRAIGHT).clamp_(min=0)
        far = torch.minimum(far, self.A)  # there the slope is Lambda
        near = _flow_distance(self.A - far, below.add_(far).clamp_(-STRAIGHT, STEEPEST))
        return near.add_(far).mul_(self.scale).to(self.dtype)

    def rows(self) -> Sequence[Flow]:
        """One for each row of S."""
        pairs = zip(self.A.unbind(), self.scale.unbind(), strict=True)
        return [Flow(self.line, A, scale, self.dtype) for A, scale in pairs]


def _stiffness(line: Line, S: Tensor) -> Tensor:
    """A = omega S Lambda, finite."""
    Lambda, omega, _ = line.logistic
    return (S.to(omega.dtype) * omega).mul_(Lambda).clamp_(max=STIFFEST)


def _flow_distance(A: Tensor, below: Tensor) -> Tensor:
    """Solve f(d) = d + b expm1(d) - A = 0 with b = exp(-v) by Halley's method.

    Both starting values bound the root from above, and f is convex: the iteration descends. Two
    steps suffice but where A is large and close to v; only then is convergence looked at again.

    Args:
        A: Not negative.
        below: -v.
    """
    b = torch.exp(below)
    slope = 1 + b
    d = torch.minimum(A / slope, torch.log1p(A / b))
    d, _ = _halley(d, A, b, slope)
    if traced():  # one more is cheap there, and what does not converge is done again elsewhere
        d, _ = _halley(d, A, b, slope)
    tolerance = (8 * torch.finfo(d.dtype).eps) ** (1 / 3)
    for _ in range(NEWTON_STEPS):
        before = d
        d, newton = _halley(d, A, b, slope)
        # The error of the next would be this one's cube.
        if not exceed((torch.sub(newton.abs_(), before, alpha=tolerance).amax(), 0.0))[0]:
            break
    return d


def _halley(d: Tensor, A: Tensor, b: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """d - t / (1 - t f'' / (2 f')), and Newton's step t = f / f'.

    f' = 1 + b + b expm1(d), f'' = f' - 1.
    """
    rise = torch.expm1(d).mul_(b)
    f = (d + rise).sub_(A)
    first = rise.add_(slope)
    t = f.div_(first)
    bend = torch.sub(t, t / first)
    return torch.addcdiv(d, t, torch.rsub(bend, 1, alpha=0.5), value=-1), t


def _fixed_point(A: Tensor, c: Tensor) -> Tensor:
    """Solve v + A sigma(v) = c by Newton's method from the side where it converges monotonically.

    For a root v <= 0, e^v <= 2 sigma(v) = 2 (c - v) / A and v >= min(c, 0) - log(1 + A) - 1 give
    the starting point; from v = 0 Newton gains only one unit of v a step, and too few steps leave
    far too large a coefficient exactly where the rule has to save the run.
    """
    bound = (2 * (c.clamp(min=0) + A.log1p() + 1) / A.clamp(min=FLOOR)).log()
    below = torch.minimum(c, bound).clamp(max=0)
    v = torch.where(c > A / 2, (c - A).clamp(min=0), below)
    tolerance = 8 * torch.finfo(v.dtype).eps
    for _ in range(NEWTON_STEPS):
        s = torch.sigmoid(v)
        step = (v + A * s - c) / (1 + A * s * (1 - s))
        v = v - step
        if not anything(step.abs() > tolerance * (1 + v.abs())):
            break
    return v
