# SPDX-License-Identifier: MIT
"""Data sets: small ones inside scikit-learn's package, and image sets from files or OpenML."""

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

from ddpnopt.experiments.loaders.sets import IMAGE_SETS as _DOWNLOADABLE
from ddpnopt.experiments.loaders.sets import read_image_set
from ddpnopt.experiments.names import lookup
from ddpnopt.experiments.scaling import SCALES, Features
from ddpnopt.experiments.tasks import TASKS

Arrays = tuple[NDArray[np.float64], NDArray[np.int64]]


@dataclass(frozen=True)
class Dataset:
    """A data set, split and scaled.

    Attributes:
        name: The registry name.
        x_train: Inputs, shape (N_train, *input_shape), dtype float32 unless moved.
        y_train: Class indices, shape (N_train,), dtype int64; a task of
            `ddpnopt.experiments.tasks` has other targets.
        x_test: Inputs, shape (N_test, *input_shape).
        y_test: Class indices, shape (N_test,), or a task's targets.
        classes: Number of classes C.
        input_shape: Shape of one sample, (d,) or (channels, height, width).
        origin: What was read, of which these samples may be a part: "60,000 + 10,000 images, IDX
            files", "15,000 + 5,000 images, JPEG copy", "scikit-learn".
        checksum: Hash of all images and labels that were read; "" for scikit-learn's own sets.
        title: The data set's name in tables, "CIFAR-10".
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int
    input_shape: tuple[int, ...]
    origin: str = ""
    checksum: str = ""
    title: str = ""

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
        """Accuracy of always answering the test part's largest class, in [0, 1]; 0 for numbers."""
        if self.classes == 1:
            return 0.0
        counts = torch.bincount(self.y_test.flatten().long(), minlength=self.classes)
        return float(counts.max() / counts.sum())

    @property
    def label(self) -> str:
        """Title and origin: "CIFAR-10, 15,000 + 5,000 images, JPEG copy"."""
        return ", ".join(text for text in (self.title or self.name, self.origin) if text)


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

    x_train: Features
    y_train: NDArray[np.int64]
    x_test: Features
    y_test: NDArray[np.int64]
    image_shape: tuple[int, ...] | None
    classes: int
    title: str
    origin: str = "scikit-learn"
    checksum: str = ""


@dataclass(frozen=True)
class _Request:
    """What of a data set is wanted."""

    name: str
    seed: int
    test_share: float
    folder: Path | None
    cache: Path | None
    train_samples: int | None
    test_samples: int | None

    def choose(self, available: int, part: str = "training") -> NDArray[np.int64]:
        """Indices of a part's samples to use: all, or as many as asked, drawn by the seed."""
        asked = self.train_samples if part == "training" else self.test_samples
        if asked is None:
            return np.arange(available)
        if not 0 < asked <= available:
            raise ValueError(
                f"data set {self.name!r} has {available} {part} samples, {asked} asked for"
            )
        chosen = np.random.default_rng(self.seed).permutation(available)
        return np.asarray(chosen[:asked])


def _split(
    arrays: Arrays, title: str, image_shape: tuple[int, ...] | None, request: _Request
) -> _Raw:
    """Hold out a share by class, then keep as many samples as were asked for."""
    x, y = arrays
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=request.test_share, random_state=request.seed, stratify=y
    )
    kept, shown = request.choose(len(y_train)), request.choose(len(y_test), "test")
    return _Raw(
        x_train[kept],
        y_train[kept],
        x_test[shown],
        y_test[shown],
        image_shape,
        int(y.max()) + 1,
        title,
    )


def _image_set(request: _Request) -> _Raw:
    """Read an image set; its test part is the one that it comes with."""
    source = _DOWNLOADABLE[request.name]
    images = read_image_set(request.name, request.folder, request.cache)
    train, test = images.train, images.test
    kept, shown = request.choose(len(train.labels)), request.choose(len(test.labels), "test")
    return _Raw(
        train.images[kept].reshape(len(kept), -1),
        train.labels[kept].astype(np.int64),
        test.images[shown].reshape(len(shown), -1),
        test.labels[shown].astype(np.int64),
        train.images.shape[1:],
        source.classes,
        source.title,
        images.origin,
        images.checksum,
    )


def _task(request: _Request) -> Dataset:
    """Make a task's samples; they are neither scaled nor reshaped."""
    train, test = request.train_samples or 1200, request.test_samples or 400
    made = TASKS[request.name](train + test, request.seed)
    return Dataset(
        name=request.name,
        x_train=made.x[:train],
        y_train=made.y[:train],
        x_test=made.x[train:],
        y_test=made.y[train:],
        classes=made.classes,
        input_shape=tuple(made.x.shape[1:]),
        origin=made.origin,
        title=request.name,
    )


DATASETS: dict[str, Callable[[_Request], _Raw]] = {
    "digits": lambda request: _split(_digits(), "DIGITS", (1, 8, 8), request),
    "wine": lambda request: _split(_wine(), "WINE", None, request),
    **dict.fromkeys(_DOWNLOADABLE, _image_set),
}
IMAGE_SETS = ("digits", *_DOWNLOADABLE)


def canonical(name: str) -> str:
    """Spell a data set's name as the registry does.

    Args:
        name: A name in any case, with hyphens, underscores, blanks or none: "CIFAR10".

    Returns:
        The registry name, "cifar-10".

    Raises:
        ValueError: No such data set; the message lists the names.
    """
    known: dict[str, object] = {**DATASETS, **TASKS}
    plain = {entry.replace("-", ""): entry for entry in known}
    spelled = plain.get("".join(c for c in name.lower() if c not in "-_ "), name)
    lookup(known, spelled, "data set")
    return spelled


@dataclass(frozen=True)
class Description:
    """What a data set is, for records and tables.

    Attributes:
        title: Its name, "MNIST".
        origin: What was read, see `Dataset.origin`.
        checksum: Hash of all images and labels, see `Dataset.checksum`.
    """

    title: str
    origin: str
    checksum: str


def describe(name: str, *, folder: Path | None = None, cache: Path | None = None) -> Description:
    """Say what `load` would read, downloading it if need be.

    Call it once before starting many processes: they find the download complete.

    Args:
        name: Data set name.
        folder: As for `load`.
        cache: As for `load`.

    Returns:
        The description.

    Raises:
        ValueError: Unknown name, or files that are missing, wrong or can't be downloaded.
    """
    name = canonical(name)
    if name in TASKS:
        return Description(name, "", "")
    if name not in _DOWNLOADABLE:
        return Description(name.upper(), "scikit-learn", "")
    images = read_image_set(name, folder, cache)
    return Description(_DOWNLOADABLE[name].title, images.origin, images.checksum)


def load(
    name: str,
    *,
    seed: int = 0,
    scale: str = "standard",
    test_share: float = 0.2,
    images: bool = False,
    folder: Path | None = None,
    train_samples: int | None = None,
    test_samples: int | None = None,
    cache: Path | None = None,
    label_noise: float = 0.0,
) -> Dataset:
    """Load a data set, split it and scale it with the training part's statistics.

    Args:
        name: "digits" (1797 images of 8 x 8, 10 classes) or "wine" (178 samples of 13 features,
            3 classes), split by class; "mnist", "fashion-mnist" (60,000 + 10,000 images of
            28 x 28, 10 classes), "svhn" (73,257 + 26,032), "cifar-10" (50,000 + 10,000) or
            "cifar-100" (the same, 100 classes; colour images of 32 x 32), with the test part that
            they come with; a task of `ddpnopt.experiments.tasks`, which no option below but the
            numbers of samples concerns. Case, hyphens and underscores don't matter.
        seed: Seed of the split and of the choice of samples: one seed, one data set.
        scale: "standard" (every feature to mean 0 and deviation 1), "pooled" (one mean and one
            deviation for all features), "unit" (to [0, 1] by one range: pixels / 16 for digits,
            / 255 for the others) or "none".
        test_share: Share of the samples held out of "digits" and "wine", in (0, 1).
        images: Shape the samples as images (channels, height, width) for convolutions.
        folder: Folder with the files of the other sets, in any format of `docs/data.md`; None:
            they are fetched from OpenML once.
        train_samples: Number of training samples to draw; None: all.
        test_samples: Number of test samples to draw; None: all.
        cache: Folder in which downloads are kept; None: scikit-learn's data folder.
        label_noise: Share of the training labels that are drawn anew from all classes, by the seed.

    Returns:
        The split data, float32 inputs and int64 labels on the CPU.

    Raises:
        ValueError: Unknown name or scale (the message lists the names), images asked of a data
            set that has none, more samples asked for than there are, files that are missing or
            wrong, or a download that failed.
    """
    name = canonical(name)
    fit = lookup(SCALES, scale, "scale")
    request = _Request(name, seed, test_share, folder, cache, train_samples, test_samples)
    if name in TASKS:
        return _noisy(_task(request), label_noise, seed)
    return _noisy(_scaled(DATASETS[name](request), name, fit, images), label_noise, seed)


def _noisy(data: Dataset, share: float, seed: int) -> Dataset:
    """Draw a share of the training labels anew."""
    if not share:
        return data
    if data.y_train.is_floating_point():
        raise ValueError(f"label_noise={share:g}: data set {data.name!r} has no classes")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(data.classes, data.y_train.shape, generator=generator)
    hit = torch.rand(data.y_train.shape, generator=generator) < share
    return replace(data, y_train=torch.where(hit, drawn, data.y_train))


def _scaled(
    raw: _Raw, name: str, fit: Callable[[Features], Callable[[Features], Tensor]], images: bool
) -> Dataset:
    """Scale a data set and shape its samples."""
    if images and raw.image_shape is None:
        raise ValueError(f"data set {name!r} has no images; with images: {', '.join(IMAGE_SETS)}")
    shape = raw.image_shape if images and raw.image_shape else (raw.x_train.shape[1],)
    scaled = fit(raw.x_train)
    return Dataset(
        name=name,
        x_train=scaled(raw.x_train).reshape(-1, *shape),
        y_train=torch.as_tensor(raw.y_train),
        x_test=scaled(raw.x_test).reshape(-1, *shape),
        y_test=torch.as_tensor(raw.y_test),
        classes=raw.classes,
        input_shape=shape,
        origin=raw.origin,
        checksum=raw.checksum,
        title=raw.title,
    )
