# SPDX-License-Identifier: MIT
"""Factorisations of symmetric positive matrices that never give up on a finite one."""

from __future__ import annotations

import torch

from ddpnopt.errors import LinAlgError, NonFiniteError
from ddpnopt.typing import Tensor


def inverse_factor(A: Tensor) -> tuple[Tensor, int]:
    """T with T^T T = A^-1, by Cholesky; where that fails, by clipped eigenvalues.

    Args:
        A: (g, n, n), symmetric positive definite up to rounding.

    Returns:
        T, and how often the fallback was needed (0 or 1).

    Raises:
        NonFiniteError: A is not finite.
    """
    L, info = torch.linalg.cholesky_ex(A)
    if not bool(info.any()):
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)
        return torch.linalg.solve_triangular(L, identity, upper=False), 0
    eigenvalues, Q = _careful(A)
    smallest = torch.finfo(A.dtype).eps * eigenvalues.amax(-1, keepdim=True).clamp(min=0)
    floor = smallest.clamp(min=torch.finfo(A.dtype).tiny)
    return (Q * eigenvalues.clamp(min=floor).rsqrt().unsqueeze(-2)).mT.to(A), 1


def eigenvectors(A: Tensor) -> tuple[Tensor, int]:
    """Eigenvectors as columns; where the algorithm diverges, in double precision.

    Args:
        A: (g, n, n), symmetric.

    Returns:
        Q, orthogonal, and how often a fallback was needed.

    Raises:
        NonFiniteError: A is not finite.
    """
    try:
        Q: Tensor = torch.linalg.eigh(A).eigenvectors
        if bool(Q.isfinite().all()):
            return Q, 0
    except LinAlgError:  # counted, and done again with more digits
        pass
    return _careful(A)[1].to(A), 1


def _careful(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and -vectors in float64 on the CPU; the coordinate axes if that fails, too.

    Any orthogonal basis is a valid one for a diagonal rescaling; with the axes, the diagonal of A
    takes the place of the eigenvalues.
    """
    if not bool(A.isfinite().all()):
        raise NonFiniteError("a curvature factor is not finite")
    wide = A.detach().to("cpu", torch.float64)
    wide = (wide + wide.mT) / 2
    largest = wide.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    try:
        eigenvalues, Q = torch.linalg.eigh(wide / largest)
        return (eigenvalues * largest[..., 0]).to(A.device), Q.to(A.device)
    except LinAlgError:  # counted by the caller
        identity = torch.eye(A.shape[-1], dtype=torch.float64, device=A.device).expand_as(A)
        return wide.diagonal(dim1=-2, dim2=-1).to(A.device), identity
