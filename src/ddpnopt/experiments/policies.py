# SPDX-License-Identifier: MIT
"""Feedback gains looked at: leading singular triplets of K (Figs. 5 and 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds

from ddpnopt.gains import Gain


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of a gain matrix, largest first.

    Attributes:
        values: (k,) singular values.
        controls: (U, k) left-singular vectors: updates of the layer's parameters.
        states: (X, k) right-singular vectors: changes of its state that it answers to most.
    """

    values: torch.Tensor
    controls: torch.Tensor
    states: torch.Tensor


def linear_operator(gain: Gain) -> LinearOperator:
    """A gain as scipy's matrix-free operator, in float64.

    Args:
        gain: From `ddpnopt.feedback_gains`.
    """
    like = gain.layer.blocks[0].x

    def applied(function: Callable[[torch.Tensor], torch.Tensor], v: np.ndarray) -> np.ndarray:
        tensor = torch.as_tensor(np.ascontiguousarray(v).ravel(), device=like.device)
        return function(tensor.to(gain.layer.dtype)).double().cpu().numpy()

    return LinearOperator(
        gain.shape,
        matvec=lambda v: applied(gain.matvec, v),
        rmatvec=lambda v: applied(gain.rmatvec, v),
        dtype=np.float64,
    )


def singular_triplets(gain: Gain, k: int = 1, seed: int = 0) -> Triplets:
    """The k leading singular triplets, by Lanczos iterations (`scipy.sparse.linalg.svds`).

    Args:
        gain: From `ddpnopt.feedback_gains`.
        k: How many; fewer than the smaller side of K.
        seed: Of the starting vector.

    Raises:
        ValueError: k is out of range.
    """
    smaller = min(gain.shape)
    if not 1 <= k < smaller:
        raise ValueError(f"k={k}: K is {gain.shape[0]} x {gain.shape[1]}, give 1 to {smaller - 1}")
    start = np.random.default_rng(seed).standard_normal(smaller)
    u, s, vt = svds(linear_operator(gain), k=k, v0=start)
    order = np.argsort(s)[::-1].copy()
    return Triplets(
        torch.from_numpy(s[order].copy()),
        torch.from_numpy(u[:, order].copy()),
        torch.from_numpy(vt[order].T.copy()),
    )
