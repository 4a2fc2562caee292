# SPDX-License-Identifier: MIT
"""Data sets: small ones inside scikit-learn's package, and MNIST from files. No downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import datasets as sk_datasets
from sklearn.model_selection import train_test_split
from torch import Tensor

from ddpnopt.experiments.idx import FOLDERS, read_image_set
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
class _Raw:
    """A data set before scaling: features (N, d) of both parts, and the shape of an image."""

    x_train: NDArray[np.float64]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float64]
    y_test: NDArray[np.int64]
    image_shape: tuple[int, ...] | None


def _split(arrays: Arrays, image_shape: tuple[int, ...] | None, request: _Request) -> _Raw:
    """Hold out a share by class, then keep as many training samples as were asked for."""
    x, y = arrays
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=request.test_share, random_state=request.seed, stratify=y
    )
    kept = request.choose(len(y_train))
    return _Raw(x_train[kept], y_train[kept], x_test, y_test, image_shape)


def _image_set(request: _Request) -> _Raw:
    """Read an image set; its test part is the one that it comes with."""
    if request.folder is None:
        raise ValueError(
            f"data set {request.name!r} is read from its four IDX files: name their folder with "
            "--data DIR (nothing is downloaded)"
        )
    (x_train, y_train), (x_test, y_test) = read_image_set(request.folder, request.name)
    kept = request.choose(len(y_train))
    # Bytes become numbers only once the subset is chosen: the whole set would take 0.4 GB.
    return _Raw(
        x_train[kept].reshape(len(kept), -1).astype(np.float64),
        y_train[kept].astype(np.int64),
        x_test.reshape(len(x_test), -1).astype(np.float64),
        y_test.astype(np.int64),
        (1, *x_train.shape[1:]),
    )


@dataclass(frozen=True)
class _Request:
    """What of a data set is wanted."""

    name: str
    seed: int
    test_share: float
    folder: Path | None
    train_samples: int | None

    def choose(self, available: int) -> NDArray[np.int64]:
        """Indices of the training samples to use: all, or as many as asked, drawn by the seed."""
        if self.train_samples is None:
            return np.arange(available)
        if not 0 < self.train_samples <= available:
            raise ValueError(
                f"data set {self.name!r} has {available} training samples, "
                f"{self.train_samples} asked for"
            )
        chosen = np.random.default_rng(self.seed).permutation(available)
        return np.asarray(chosen[: self.train_samples])


DATASETS: dict[str, Callable[[_Request], _Raw]] = {
    "digits": lambda request: _split(_digits(), (1, 8, 8), request),
    "wine": lambda request: _split(_wine(), None, request),
    **dict.fromkeys(FOLDERS, _image_set),
}
IMAGE_SETS = ("digits", *FOLDERS)


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
    folder: Path | None = None,
    train_samples: int | None = None,
) -> Dataset:
    """Load a data set, split it and scale it with the training part's statistics.

    Args:
        name: "digits" (1797 images of 8 x 8, 10 classes) or "wine" (178 samples of 13 features,
            3 classes), split by class; "mnist" or "fashion-mnist" (60,000 + 10,000 images of
            28 x 28, 10 classes), read from `folder` with the test part that they come with.
        seed: Seed of the split and of the choice of `train_samples`: one seed, one data set.
        scale: "standard" (every feature to mean 0 and deviation 1), "pooled" (one mean and one
            deviation for all features), "unit" (to [0, 1] by one range: pixels / 16 for digits,
            / 255 for MNIST) or "none".
        test_share: Share of the samples held out of "digits" and "wine", in (0, 1).
        images: Shape the samples as images (channels, height, width) for convolutions.
        folder: Folder of the IDX files, see `ddpnopt.experiments.idx.FOLDERS`.
        train_samples: Number of training samples to draw; None: all.

    Returns:
        The split data, float32 inputs and int64 labels on the CPU.

    Raises:
        ValueError: Unknown name or scale (the message lists the names), images asked of a data
            set that has none, more samples asked for than there are, or files that are missing
            or wrong.
    """
    source = lookup(DATASETS, name, "data set")
    scaler = lookup(SCALES, scale, "scale")
    raw = source(_Request(name, seed, test_share, folder, train_samples))
    if images and raw.image_shape is None:
        with_images = ", ".join(IMAGE_SETS)
        raise ValueError(f"data set {name!r} has no images; those with images: {with_images}")
    shape = raw.image_shape if images and raw.image_shape else (raw.x_train.shape[1],)
    scaled_train, scaled_test = (scaler(raw.x_train, x) for x in (raw.x_train, raw.x_test))
    return Dataset(
        name=name,
        x_train=torch.as_tensor(scaled_train, dtype=torch.float32).reshape(-1, *shape),
        y_train=torch.as_tensor(raw.y_train),
        x_test=torch.as_tensor(scaled_test, dtype=torch.float32).reshape(-1, *shape),
        y_test=torch.as_tensor(raw.y_test),
        classes=int(max(raw.y_train.max(), raw.y_test.max())) + 1,
        input_shape=shape,
    )
