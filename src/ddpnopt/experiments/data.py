# SPDX-License-Identifier: MIT
"""Small data sets that scikit-learn carries inside its package: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import datasets as sk_datasets
from sklearn.model_selection import train_test_split
from torch import Tensor

from ddpnopt.experiments.names import lookup

Arrays = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass(frozen=True)
class Dataset:
    """A data set, split and scaled.

    Attributes:
        name: The registry name.
        x_train: Inputs, shape (N_train, *input_shape), dtype float32 unless moved.
        y_train: Class indices, shape (N_train,), dtype int64.
        x_test: Inputs, shape (N_test, *input_shape).
        y_test: Class indices, shape (N_test,).
        classes: Number of classes C.
        input_shape: Shape of one sample, (d,) or (channels, height, width).
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    input_shape: tuple[int, ...]

    def to(self, device: torch.device) -> Dataset:
        """Return the same data with all four tensors on `device`."""
        return replace(
            self,
            x_train=self.x_train.to(device),
            y_train=self.y_train.to(device),
            x_test=self.x_test.to(device),
            y_test=self.y_test.to(device),
        )

    @property
    def chance(self) -> float:
        """Accuracy of always answering the test part's largest class, in [0, 1]."""
        counts = torch.bincount(self.y_test, minlength=self.classes)
        return float(counts.max() / counts.sum())


@cache
def _wine() -> Arrays:
    raw = sk_datasets.load_wine()
    return raw.data.astype(np.float64), raw.target.astype(np.int64)


@cache
def _digits() -> Arrays:
    raw = sk_datasets.load_digits()
    return raw.data.astype(np.float64), raw.target.astype(np.int64)


@dataclass(frozen=True)
class _Source:
    load: Callable[[], Arrays]
    image_shape: tuple[int, ...] | None


DATASETS: dict[str, _Source] = {
    "digits": _Source(_digits, (1, 8, 8)),
    "wine": _Source(_wine, None),
}


def _standard(train: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    std = train.std(axis=0)
    # A feature that is constant over the training part (border pixels) carries no unit of its own.
    std[std == 0.0] = 1.0
    return np.asarray((x - train.mean(axis=0)) / std)


def _pooled(train: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((x - train.mean()) / train.std())


def _unit(train: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = train.min(), train.max()
    return np.asarray((x - low) / (high - low))


def _raw(train: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x


SCALES: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]] = {
    "standard": _standard,
    "pooled": _pooled,
    "unit": _unit,
    "none": _raw,
}


def load(
    name: str,
    *,
    seed: int = 0,
    scale: str = "standard",
    test_share: float = 0.2,
    images: bool = False,
) -> Dataset:
    """Load a data set, split it by class and scale it with the training part's statistics.

    Args:
        name: "digits" (1797 images of 8 x 8, 10 classes) or "wine" (178 samples of 13 features,
            3 classes).
        seed: Seed of the stratified split: one seed, one split.
        scale: "standard" (every feature to mean 0 and deviation 1), "pooled" (one mean and one
            deviation for all features), "unit" (to [0, 1] by one range) or "none".
        test_share: Share of the samples held out, in (0, 1).
        images: Shape the samples as images (channels, height, width) for convolutions.

    Returns:
        The split data, float32 inputs and int64 labels on the CPU.

    Raises:
        ValueError: Unknown name or scale (the message lists the names), or images asked of a
            data set that has none.
    """
    source = lookup(DATASETS, name, "data set")
    scaler = lookup(SCALES, scale, "scale")
    if images and source.image_shape is None:
        with_images = ", ".join(n for n, s in DATASETS.items() if s.image_shape is not None)
        raise ValueError(f"data set {name!r} has no images; those with images: {with_images}")
    x, y = source.load()
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=test_share, random_state=seed, stratify=y
    )
    scaled_train, scaled_test = scaler(x_train, x_train), scaler(x_train, x_test)
    shape = source.image_shape if images and source.image_shape is not None else (x.shape[1],)
    return Dataset(
        name=name,
        x_train=torch.as_tensor(scaled_train, dtype=torch.float32).reshape(-1, *shape),
        y_train=torch.as_tensor(y_train),
        x_test=torch.as_tensor(scaled_test, dtype=torch.float32).reshape(-1, *shape),
        y_test=torch.as_tensor(y_test),
        classes=int(y.max()) + 1,
        input_shape=shape,
    )
