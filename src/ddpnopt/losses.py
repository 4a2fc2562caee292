# SPDX-License-Identifier: MIT
"""Losses that torch does not have."""

from __future__ import annotations

import math

import torch
from torch import nn

from ddpnopt.ranges import check_number, count, positive
from ddpnopt.terminal import check_reduction
from ddpnopt.typing import Tensor


class MMCLoss(nn.Module):
    """Max-Mahalanobis center loss, 1/2 |z - mu_y|^2 per sample (Pang et al. 2020).

    The centers mu are fixed: the corners of a regular simplex around the origin, as far apart as
    points of one norm can be. As a terminal cost it is ``terminal="mmc"`` or `ddpnopt.MMC`.

    Args:
        num_classes: L, at least 2.
        dim: Features of the network's output z, at least L - 1.
        norm: |mu|, the same for all centers (10 in the source).
        reduction: "mean" over the samples, or "sum".

    Attributes:
        centers: (num_classes, dim), a buffer.

    Raises:
        ValueError: An option is out of range.

    Examples:
        >>> criterion = MMCLoss(num_classes=10, dim=16)
        >>> criterion(model(x), y).backward()
        >>> labels = criterion.predict(model(x))
    """

    centers: Tensor

    def __init__(
        self, num_classes: int, dim: int, norm: float = 10.0, reduction: str = "mean"
    ) -> None:
        super().__init__()
        check_number("MMCLoss", "num_classes", num_classes, _several, "must be at least 2")
        check_number("MMCLoss", "dim", dim, count, "must be a whole number, at least 1")
        if dim < num_classes - 1:
            raise ValueError(
                f"MMCLoss(dim={dim}): {num_classes} centers with equal angles need at least "
                f"num_classes - 1 = {num_classes - 1} dimensions; widen the network's output"
            )
        check_number("MMCLoss", "norm", norm, positive, "must be positive and finite")
        check_reduction("MMCLoss", reduction)
        self.num_classes, self.dim, self.norm, self.reduction = num_classes, dim, norm, reduction
        self.register_buffer("centers", _simplex(num_classes, dim, norm))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """The loss of outputs z (B, dim) with labels y (B,).

        Raises:
            ValueError: A shape does not fit, or a label is no class.
        """
        self._check_output(z)
        if y.shape != z.shape[:1] or y.is_floating_point():
            raise ValueError(
                f"MMCLoss: y has shape {tuple(y.shape)} and dtype {y.dtype}; expected the labels "
                f"as integers of shape ({z.shape[0]},)"
            )
        if y.numel() and not bool(((y >= 0) & (y < self.num_classes)).all()):
            raise ValueError(
                f"MMCLoss: y has labels from {int(y.min())} to {int(y.max())}; they must lie "
                f"between 0 and num_classes - 1 = {self.num_classes - 1}"
            )
        losses = (z - self.centers[y.long()]).square().sum(1) / 2
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def predict(self, z: Tensor) -> Tensor:
        """Labels (B,) of the centers that are nearest to z (B, dim).

        Raises:
            ValueError: The shape does not fit.
        """
        self._check_output(z)
        dtype = torch.promote_types(z.dtype, self.centers.dtype)
        # Of points with one norm, the nearest has the largest inner product.
        return (z.to(dtype) @ self.centers.T.to(dtype)).argmax(1)

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"num_classes={self.num_classes}, dim={self.dim}, norm={self.norm}, "
            f"reduction={self.reduction!r}"
        )

    def _check_output(self, z: Tensor) -> None:
        if z.dim() != 2 or z.shape[1] != self.dim:
            raise ValueError(
                f"MMCLoss: z has shape {tuple(z.shape)}; expected (B, dim) with dim={self.dim}"
            )


def _several(number: int) -> bool:
    return count(number) and number > 1


def _simplex(corners: int, dim: int, norm: float) -> Tensor:
    """Corners of a regular simplex, (corners, dim): inner products -norm^2 / (corners - 1).

    The columns of Helmert's matrix, whose rows are orthonormal and orthogonal to (1, ..., 1).
    """
    k = torch.arange(1, corners, dtype=torch.float64)[:, None]
    j = torch.arange(corners, dtype=torch.float64)
    helmert = ((j < k).double() - k * (j == k)) / (k * (k + 1)).sqrt()
    centers = torch.zeros(corners, dim, dtype=torch.float64)
    centers[:, : corners - 1] = helmert.T * (norm * math.sqrt(corners / (corners - 1)))
    return centers.to(torch.get_default_dtype())
