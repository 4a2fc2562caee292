# SPDX-License-Identifier: MIT
"""Factorisations of symmetric positive matrices that never give up on a finite one.

Where one fails, it is tried again with growing damping, and then done in double precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ddpnopt.decisions import all_finite, anything
from ddpnopt.errors import LinAlgError, NonFiniteError
from ddpnopt.typing import Tensor

#: Damping of the retries, in units of the rounding of A's mean diagonal.
DAMPINGS = (1e1, 1e2, 1e3)


def inverse(A: Tensor) -> tuple[Tensor, int]:
    """A^-1 by Cholesky; where that fails, damped, then by clipped eigenvalues.

    Args:
        A: (g, n, n), symmetric positive definite up to rounding.

    Returns:
        A^-1, contiguous, and whether it was not to be had at once (0 or 1).

    Raises:
        NonFiniteError: A is not finite.
    """
    for failed, damped in enumerate(_damped(A)):
        L, info = torch.linalg.cholesky_ex(damped)
        if not anything(info):
            found = torch.cholesky_inverse(L).contiguous()
            if failed == 0 or bool(found.isfinite().all()):
                return found, min(failed, 1)
    eigenvalues, Q = _careful(A)
    smallest = torch.finfo(A.dtype).eps * eigenvalues.amax(-1, keepdim=True).clamp(min=0)
    floor = smallest.clamp(min=torch.finfo(A.dtype).tiny)
    return ((Q / eigenvalues.clamp(min=floor).unsqueeze(-2)) @ Q.mT).to(A).contiguous(), 1


def eigenvectors(A: Tensor) -> tuple[Tensor, int]:
    """Eigenvectors as columns; where the algorithm diverges, damped, then in double precision.

    Args:
        A: (g, n, n), symmetric.

    Returns:
        Q, orthogonal, and whether it was not to be had at once (0 or 1).

    Raises:
        NonFiniteError: A is not finite.
    """
    for failed, damped in enumerate(_damped(A)):
        try:
            Q: Tensor = torch.linalg.eigh(damped).eigenvectors
        except LinAlgError:  # counted by the caller
            continue
        if all_finite(torch.linalg.vector_norm(Q)):
            return Q, min(failed, 1)
    return _careful(A)[1].to(A), 1


def _damped(A: Tensor) -> Iterator[Tensor]:
    """A itself, then with growing damping.

    Raises:
        NonFiniteError: A is not finite, found out where A itself would not do.
    """
    yield A
    _check_finite(A)
    info = torch.finfo(A.dtype)
    size = A.diagonal(dim1=-2, dim2=-1).abs().mean(-1).clamp(min=info.tiny / info.eps)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for damping in DAMPINGS:
        yield A + (damping * info.eps * size)[:, None, None] * identity


def _check_finite(A: Tensor) -> None:
    if not bool(A.isfinite().all()):
        raise NonFiniteError("a curvature factor is not finite")


def _careful(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and -vectors in float64 on the CPU; the coordinate axes if that fails, too.

    Any orthogonal basis is a valid one for a diagonal rescaling; with the axes, the diagonal of A
    takes the place of the eigenvalues.
    """
    wide = A.detach().to("cpu", torch.float64)
    wide = (wide + wide.mT) / 2
    largest = wide.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    try:
        eigenvalues, Q = torch.linalg.eigh(wide / largest)
        return (eigenvalues * largest[..., 0]).to(A.device), Q.to(A.device)
    except LinAlgError:  # counted by the caller
        identity = torch.eye(A.shape[-1], dtype=torch.float64, device=A.device).expand_as(A)
        return wide.diagonal(dim1=-2, dim2=-1).to(A.device), identity
