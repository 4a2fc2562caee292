# SPDX-License-Identifier: MIT
"""SVHN's cropped digits from train_32x32.mat and test_32x32.mat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpnopt.experiments.loaders.files import read_file
from ddpnopt.experiments.loaders.images import ImageSet, Part, checked
from ddpnopt.experiments.loaders.matlab import read_mat

CLASSES = 10
FILES = ("train_32x32.mat", "test_32x32.mat")
FOLDERS = (".", "svhn", "SVHN")
_IMAGE = (32, 32, 3)


def find(folder: Path, name: str) -> tuple[Path, ...]:
    """Find the two files.

    Args:
        folder: The user's folder.
        name: "svhn", for the message.

    Returns:
        The training and the test file.

    Raises:
        ValueError: A file is missing; the message names it and the folders looked into.
    """
    for place in (folder / sub for sub in FOLDERS):
        paths = tuple(place / file for file in FILES)
        if any(path.is_file() for path in paths):
            for path in paths:
                if not path.is_file():
                    raise ValueError(f"{path}: missing; both of {', '.join(FILES)} are needed")
            return paths
    tried = ", ".join(str(folder / sub) for sub in FOLDERS)
    raise ValueError(
        f"data set {name!r}: no {FILES[0]} and {FILES[1]} in any of {tried}; put the files there, "
        "or name their folder with --data DIR"
    )


def _part(path: Path) -> Part:
    values = read_mat(read_file(path))
    if not {"X", "y"} <= set(values):
        raise ValueError(f"{path}: holds {sorted(values)}; X and y are needed")
    pixels, numbers = values["X"], values["y"]
    if (
        isinstance(pixels, str)
        or pixels.dtype != np.uint8
        or pixels.ndim != 4
        or pixels.shape[:3] != _IMAGE
    ):
        raise ValueError(f"{path}: X is {_named(pixels)}, not uint8 of shape (32, 32, 3, N)")
    count = pixels.shape[3]
    if isinstance(numbers, str) or numbers.shape not in ((count, 1), (1, count)):
        raise ValueError(f"{path}: y is {_named(numbers)}, not numbers of shape ({count}, 1)")
    labels = numbers.ravel()
    if not np.isin(labels, np.arange(CLASSES + 1)).all():
        raise ValueError(f"{path}: a label is not in 0 to {CLASSES}")
    # The files call the digit 0 ten.
    digits = (labels.astype(np.int64) % CLASSES).astype(np.uint8)
    return checked(
        str(path), pixels.astype(np.uint8, copy=False).transpose(3, 2, 0, 1), digits, CLASSES
    )


def _named(values: NDArray[np.generic] | str) -> str:
    return values if isinstance(values, str) else f"{values.dtype} of shape {values.shape}"


def read(paths: tuple[Path, ...], name: str) -> ImageSet:
    """Read the two files.

    Args:
        paths: What `find` returned.
        name: "svhn".

    Returns:
        The set, images (N, 3, 32, 32); label 10 of the files is class 0.

    Raises:
        ValueError: A file is wrong; the message names it and says why.
    """
    train, test = (_part(path) for path in paths)
    return ImageSet(train, test, f"{name.upper()} .mat files")
