# SPDX-License-Identifier: MIT
"""Image sets from OpenML, through scikit-learn's client, kept as compact files in a cache folder.

The client compares the download with the checksum that OpenML publishes. It works in a temporary
folder inside the cache folder, which is gone afterwards however it ends; what is kept is one file
of bytes, moved into place when it is complete.
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import fetch_openml, get_data_home

from ddpnopt.experiments.loaders.files import MAX_FILE, size_of
from ddpnopt.experiments.loaders.images import Bytes, ImageSet, checked

TIMEOUT = 60.0
_ROWS = 4096

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Remote:
    """A data set on OpenML.

    Attributes:
        number: Its number there.
        title: Its name there.
        channels: Colour channels of an image.
        classes: Number of classes.
        train: Samples of the standard training part, which are the first rows.
        test: Samples of the standard test part, which are the last rows.
    """

    number: int
    title: str
    channels: int
    classes: int
    train: int
    test: int


REMOTES = {
    "mnist": Remote(554, "mnist_784", 1, 10, 60_000, 10_000),
    "fashion-mnist": Remote(40996, "Fashion-MNIST", 1, 10, 60_000, 10_000),
    "svhn": Remote(41081, "SVHN", 3, 10, 73_257, 26_032),
    "cifar-10": Remote(40927, "CIFAR_10", 3, 10, 50_000, 10_000),
    "cifar-100": Remote(41983, "CIFAR-100", 3, 100, 50_000, 10_000),
}


def cached_file(name: str, cache: Path | None = None) -> Path:
    """Where a data set is kept.

    Args:
        name: A name in `REMOTES`.
        cache: The cache folder; None: scikit-learn's data folder (its environment variable
            SCIKIT_LEARN_DATA moves it).

    Returns:
        The file, which need not exist.
    """
    root = Path(get_data_home()) if cache is None else cache
    return root / "ddpnopt" / f"{name}-openml-{REMOTES[name].number}.npz"


def _images(values: Floats, remote: Remote) -> Bytes:
    """Rows of pixels as images (N, channels, height, width)."""
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a table of shape {values.shape} holds no image")
    side = isqrt(values.shape[1] // remote.channels)
    if side == 0 or remote.channels * side**2 != values.shape[1]:
        raise ValueError(f"{values.shape[1]} features are no square image")
    pixels = np.empty(values.shape, dtype=np.uint8)
    # By blocks: all rows as numbers twice would be gigabytes.
    unit = 255.0 if values.max() <= 1.0 and (values[:_ROWS] % 1.0).any() else 1.0
    for start in range(0, len(values), _ROWS):
        block = unit * values[start : start + _ROWS]
        whole = np.rint(block)
        if not (np.abs(block - whole) < 0.01).all() or whole.min() < 0 or whole.max() > 255:
            raise ValueError("features are no pixels between 0 and 255")
        pixels[start : start + _ROWS] = whole
    if remote.channels == 1 or not _channels_last(pixels, side, remote.channels):
        return pixels.reshape(-1, remote.channels, side, side)
    return pixels.reshape(-1, side, side, remote.channels).transpose(0, 3, 1, 2)


def _channels_last(pixels: Bytes, side: int, channels: int) -> bool:
    """Whether a row holds a pixel's colours side by side; the sets on OpenML differ in that.

    Pixels above each other are alike: they are `side` values apart where each colour is a picture
    of its own, and `channels * side` where the colours are side by side.
    """
    sample = pixels[:500].astype(np.int16)
    apart, together = (
        np.abs(sample[:, step:] - sample[:, :-step]).mean() for step in (side, channels * side)
    )
    return bool(together < 0.9 * apart)


def _labels(target: object, remote: Remote) -> Bytes:
    numbers = np.asarray(target).astype(str).astype(np.float64)
    # SVHN calls the digit 0 ten.
    numbers = np.where(numbers == 10, 0, numbers) if remote.classes == 10 else numbers
    if not np.isin(numbers, np.arange(remote.classes)).all():
        raise ValueError(f"a label is not in 0 to {remote.classes - 1}")
    return numbers.astype(np.uint8)


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Let a silent server end in an error; the client itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _ask(remote: Remote, home: str) -> tuple[Floats, object]:
    """Pixels and labels from the client, which checks the file's checksum."""
    wanted = {"data_id": remote.number, "data_home": home, "as_frame": False, "delay": 0.5}
    try:
        # Labels as numbers too: faster, and pandas' categories differ between its versions.
        numbers = {"dtype": "float32"}
        bunch = fetch_openml(**wanted, parser="pandas", read_csv_kwargs=numbers)
    except (ValueError, TypeError) as error:
        if "checksum" in str(error):
            raise
        # Labels in quotes are for the slow parser.
        bunch = fetch_openml(**wanted, parser="liac-arff")
    return np.asarray(bunch.data, dtype=np.float32), bunch.target


def _download(remote: Remote, path: Path) -> None:
    """Fetch, check, convert, and put the file in its place in one move."""
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ddpnopt-", dir=path.parent.parent) as work:
        with _patience(TIMEOUT):
            values, target = _ask(remote, work)
        images, labels = _images(values, remote), _labels(target, remote)
        complete = Path(work) / path.name
        np.savez_compressed(complete, images=images, labels=labels)
        path.parent.mkdir(exist_ok=True)
        os.replace(complete, path)


def _open(path: Path) -> tuple[Bytes, Bytes]:
    size_of(path)
    with ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_FILE:
            raise ValueError(f"unpacks to more than {MAX_FILE:,} bytes")
    # Every member of the file carries a checksum, which the reader compares.
    with np.load(path, allow_pickle=False) as content:
        images, labels = content["images"], content["labels"]
    if images.dtype != np.uint8 or labels.dtype != np.uint8 or images.ndim != 4:
        raise ValueError("no images")
    return images, labels


def _failure(name: str, path: Path, error: Exception, asked: str) -> ValueError:
    remote = REMOTES[name]
    return ValueError(
        f"data set {name!r}: the download of {asked or 'its file'} (OpenML {remote.number}, "
        f"{remote.title}) failed ({type(error).__name__}: {error}). Nothing was left in the cache "
        f"folder {path.parent}, where {path.name} would lie. Try again, or name a folder that "
        "holds the data set's files with --data DIR (IDX files of mnist and fashion-mnist, CIFAR's "
        "binary or Python files, SVHN's .mat files)"
    )


def fetch(name: str, cache: Path | None = None) -> Path:
    """Make sure that a data set is in the cache folder.

    Args:
        name: A name in `REMOTES`.
        cache: The cache folder, see `cached_file`.

    Returns:
        The complete file.

    Raises:
        ValueError: The download failed or is not what it should be. The message names what was
            asked for, the folder and the way out; the cache folder is as it was before.
    """
    path = cached_file(name, cache)
    if path.is_file():
        return path
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _download(REMOTES[name], path)
        except Exception as error:
            # Network, server, checksum, parser, disk: each has exception types of its own.
            notes = " ".join([*(str(w.message) for w in caught), str(getattr(error, "url", ""))])
            addresses = re.findall(r"https?://[^\s,;]+", notes)
            asked = addresses[-1].rstrip(".") if addresses else ""
            raise _failure(name, path, error, asked) from error
    return path


def read(paths: tuple[Path, ...], name: str) -> ImageSet:
    """Read a data set from the cache folder.

    Args:
        paths: What `fetch` returned, as a tuple.
        name: A name in `REMOTES`.

    Returns:
        The set: the first rows are the training part, the last the test part, in the standard
        numbers, or in their ratio should OpenML's copy have another number of rows.

    Raises:
        ValueError: A label is out of range, there are too few rows for two parts, or the file is
            damaged and fetching it anew failed.
    """
    remote, (path,) = REMOTES[name], paths
    try:
        images, labels = _open(path)
    except (BadZipFile, zlib.error, OSError, ValueError, KeyError, EOFError, MemoryError):
        # Damaged on disk, which the checksum shows: as good as absent.
        path.unlink(missing_ok=True)
        images, labels = _open(fetch(name, path.parent.parent))
    test = round(len(labels) * remote.test / (remote.train + remote.test))
    first = len(labels) - test
    train, held_out = (
        checked(str(path), images[rows], labels[rows], remote.classes)
        for rows in (slice(None, first), slice(first, None))
    )
    return ImageSet(train, held_out, f"OpenML {remote.number}")
