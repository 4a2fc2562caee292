# SPDX-License-Identifier: MIT
"""Scaling of inputs by the training part's statistics. Bytes become numbers block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features: TypeAlias = NDArray[np.float64] | NDArray[np.uint8]

_ROWS, _COLUMNS = 2048, 256


@dataclass(frozen=True)
class Affine:
    """The map x -> (x - shift) / unit.

    Attributes:
        shift: One number, or one per feature, shape (d,).
        unit: As `shift`.
    """

    shift: NDArray[np.float64]
    unit: NDArray[np.float64]

    def __call__(self, x: Features) -> Tensor:
        """Scale samples.

        Args:
            x: Shape (N, d).

        Returns:
            The scaled samples, shape (N, d), computed in float64 and rounded to float32.
        """
        result = np.empty(x.shape, dtype=np.float32)
        for start in range(0, len(x), _ROWS):
            rows = slice(start, start + _ROWS)
            result[rows] = (x[rows].astype(np.float64) - self.shift) / self.unit
        return torch.from_numpy(result)


def _standard(train: Features) -> Affine:
    """Every feature to mean 0 and deviation 1."""
    mean, std = np.empty(train.shape[1]), np.empty(train.shape[1])
    for start in range(0, train.shape[1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        block = np.ascontiguousarray(train[:, columns], dtype=np.float64)
        mean[columns], std[columns] = block.mean(axis=0), block.std(axis=0)
    # A feature that is constant over the training part (border pixels) carries no unit of its own.
    std[std == 0.0] = 1.0
    return Affine(mean, std)


def _pooled(train: Features) -> Affine:
    """One mean and one deviation for all features."""
    if train.dtype != np.uint8:
        return Affine(np.asarray(train.mean()), np.asarray(train.std()))
    counts = np.bincount(train.ravel(), minlength=256).astype(np.float64)
    values = np.arange(256.0)
    mean = counts @ values / train.size
    return Affine(np.asarray(mean), np.asarray(np.sqrt(counts @ (values - mean) ** 2 / train.size)))


def _unit(train: Features) -> Affine:
    """To [0, 1] by one range."""
    low, high = float(train.min()), float(train.max())
    return Affine(np.asarray(low), np.asarray(high - low))


def _none(train: Features) -> Affine:
    """As it is."""
    return Affine(np.asarray(0.0), np.asarray(1.0))


SCALES: dict[str, Callable[[Features], Affine]] = {
    "standard": _standard,
    "pooled": _pooled,
    "unit": _unit,
    "none": _none,
}
