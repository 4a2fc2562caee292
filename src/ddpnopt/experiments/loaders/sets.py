# SPDX-License-Identifier: MIT
"""The image sets: which reader reads which, and reading each only once per process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ddpnopt.experiments.loaders import cifar, idx, openml, svhn
from ddpnopt.experiments.loaders.images import ImageSet

Find = Callable[[Path, str], tuple[Path, ...]]
Read = Callable[[tuple[Path, ...], str], ImageSet]


@dataclass(frozen=True)
class Source:
    """A downloadable image set.

    Attributes:
        title: Its name in tables.
        classes: Number of classes.
        find: Finds its files in a folder.
        read: Reads them.
    """

    title: str
    classes: int
    find: Find
    read: Read


IMAGE_SETS = {
    "mnist": Source("MNIST", 10, idx.find, idx.read),
    "fashion-mnist": Source("Fashion-MNIST", 10, idx.find, idx.read),
    "svhn": Source("SVHN", 10, svhn.find, svhn.read),
    "cifar-10": Source("CIFAR-10", 10, cifar.find, cifar.read),
    "cifar-100": Source("CIFAR-100", 100, cifar.find, cifar.read),
}


@lru_cache(maxsize=2)
def _once(name: str, read: Read, paths: tuple[Path, ...], stamps: tuple[object, ...]) -> ImageSet:
    return read(paths, name)


def read_image_set(name: str, folder: Path | None = None, cache: Path | None = None) -> ImageSet:
    """Read an image set from a folder or, without one, from OpenML.

    Args:
        name: A name in `IMAGE_SETS`.
        folder: Folder with the set's files in any of its formats; nothing is downloaded then.
        cache: Cache folder of the downloads; None: scikit-learn's data folder.

    Returns:
        The set, kept in memory until two others were read or its files change.

    Raises:
        ValueError: Files are missing or wrong, or the download failed; the message names them and
            the way out.
    """
    source = IMAGE_SETS[name]
    paths: tuple[Path, ...]
    read: Read
    if folder is None:
        paths, read = (openml.fetch(name, cache),), openml.read
    elif not folder.is_dir():
        raise ValueError(
            f"data set {name!r}: --data {folder} is no folder; name the folder that holds its files"
        )
    else:
        paths, read = source.find(folder, name), source.read
    stamps = tuple((stat.st_mtime_ns, stat.st_size) for stat in (path.stat() for path in paths))
    return _once(name, read, paths, stamps)
