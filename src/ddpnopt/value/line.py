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

from dataclasses import dataclass

import torch

from ddpnopt.typing import Float, Tensor

#: Below this excess of the slope's bound the logistic is taken at its limit (Lambda -> 1).
FLAT = 1e-4
#: Floor of the excess inside the logarithm.
FLOOR = 1e-6
#: Largest A = omega S Lambda: keeps the fixed point finite at absurd learning rates.
STIFFEST = 1e12
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


def coefficient(line: Line, S: Float[Tensor, " b"], q: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Derivative of the Moreau envelope: l'(delta*) with delta* = q - S l'(delta*).

    Args:
        line: The samples' line models.
        S: Envelope parameters, in units of the plain loss per unit of slope.
        q: Predicted changes of the plain loss by what earlier layers have just done.

    Returns:
        The factor by which each sample's gradient is re-weighted; 1 at S = q = 0.
    """
    if line.excess is None:
        return (1 + line.kappa * q) / (1 + line.kappa * S)
    # The scalars are few; float64 keeps the fixed point exact where A spans 12 decades.
    wide = S.dtype if S.device.type == "mps" else torch.float64
    kappa, excess = line.kappa.to(wide), line.excess.to(wide)
    Lambda = 1 + excess
    omega = torch.where(excess < FLAT, Lambda, kappa * Lambda / excess.clamp(min=FLAT))
    shift = excess.clamp(min=FLOOR).log()
    A = (omega * S.to(wide) * Lambda).clamp(max=STIFFEST)
    return (Lambda * torch.sigmoid(_fixed_point(A, omega * q.to(wide) - shift))).to(S.dtype)


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
        if bool((step.abs() <= tolerance * (1 + v.abs())).all()):
            break
    return v
