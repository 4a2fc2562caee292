# SPDX-License-Identifier: MIT
"""The three quadratic backups of V through a layer, and the clip of the feedback.

With Q_uu = M / eta, D = eta g_u M^-1 g_u^T per sample (in h-space), and in terminal coordinates
V_xx = Z C Z^T, V_x = g - Z c with the Gram matrices S = Z^T D Z, s = Z^T D g, R = (I + C S)^-1.
"""

from __future__ import annotations

import torch

from ddpnopt.errors import LinAlgError, NonFiniteError
from ddpnopt.typing import Float, Tensor

BACKUPS = ("proximal", "closed_loop", "riccati")


def scalar_backup(
    kind: str, alpha: Float[Tensor, " b"], beta: Float[Tensor, " b"], s: Float[Tensor, " b"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Rank 1: V_x = alpha g, V_xx = beta g g^T, s = eta g_u^T M^-1 g_u."""
    if kind == "proximal":
        return alpha / (1 + beta * s), beta / (1 + beta * s)
    rate = 1 - beta * s
    if kind == "riccati":
        return alpha * rate, beta * rate
    return alpha * rate.square(), beta * rate.square()


def factor_backup(
    kind: str,
    C: Float[Tensor, "b r r"],
    c: Float[Tensor, "b r"],
    S: Float[Tensor, "b r r"],
    s: Float[Tensor, "b r"],
) -> tuple[Float[Tensor, "b r r"], Float[Tensor, "b r"]]:
    """Terminal coordinates: the new (C, c)."""
    residual = (s - (S @ c[..., None])[..., 0])[..., None]
    if kind == "proximal":
        # Not R C times the residual: at large S the product would lose what the solve keeps.
        both = solve(identity_like(C) + C @ S, torch.cat([C, C @ residual], -1))
        return symmetric(both[..., :-1]), c + both[..., -1]
    first = c + (C @ residual)[..., 0]
    if kind == "riccati":
        return symmetric(C - C @ S @ C), first
    rate = identity_like(C) - C @ S
    residual = (s - (S @ first[..., None])[..., 0])[..., None]
    return symmetric(rate @ C @ rate.transpose(-1, -2)), first + (C @ residual)[..., 0]


def dense_backup(
    kind: str,
    V_h: Float[Tensor, "b h"],
    V_hh: Float[Tensor, "b h h"],
    D: Float[Tensor, "b h h"],
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h h"]]:
    """Explicit matrices: the new (V_h, V_hh)."""
    I = identity_like(V_hh)  # noqa: E741 - the literature's letter
    both = torch.cat([V_h[..., None], V_hh], dim=-1)
    if kind == "proximal":
        both = solve(I + V_hh @ D, both)
        return both[..., 0], symmetric(both[..., 1:])
    rate = torch.baddbmm(I, V_hh, D, alpha=-1)
    if kind == "riccati":
        both = torch.bmm(rate, both)
        return both[..., 0], symmetric(both[..., 1:])
    V_h = (rate @ rate @ V_h[..., None])[..., 0]
    return V_h, symmetric(rate @ V_hh @ rate.transpose(-1, -2))


def solve(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix^-1 columns.

    Raises:
        NonFiniteError: The matrix is singular to rounding: eta V_hh is out of the dtype's range.
    """
    try:
        found: Tensor = torch.linalg.solve(matrix, columns)
    except LinAlgError as error:
        raise NonFiniteError(
            "the value function's backup has no solution in this dtype (lr times the curvature is "
            "out of range); nothing was changed. Lower lr, or use nonfinite='skip' or float64"
        ) from error
    return found


def clip_factor(
    clip: float | int, feedback: Float[Tensor, " b"], forward: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Factor on the feedback so that |V_hh g_x dx| <= clip |V_h|, given both norms."""
    tiny = torch.finfo(feedback.dtype).tiny
    return (clip * forward / feedback.clamp(min=tiny)).clamp(max=1)


def identity_like(A: Tensor) -> Tensor:
    """The identity, broadcast over the batch of A."""
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)


def symmetric(A: Tensor) -> Tensor:
    """Remove the rounding's antisymmetric part, which the recursion would amplify."""
    return (A + A.mT).mul_(0.5)
