# SPDX-License-Identifier: MIT
"""Image sets in the IDX format (MNIST and those shaped like it), read from a folder.

An IDX file is a big-endian header (two zero bytes, the type, the number of dimensions, then the
size of each) and the values, here unsigned bytes. Nothing is trusted: sizes are bounded before
anything is read, and a file that is not what it should be is refused by name.
"""

from __future__ import annotations

import gzip
import zlib
from math import prod
from pathlib import Path

import numpy as np

from ddpnopt.experiments.loaders.files import MAX_FILE, MAX_INFLATION, size_of
from ddpnopt.experiments.loaders.images import (
    MAX_SAMPLES,
    MAX_SIDE,
    Bytes,
    ImageSet,
    Part,
    checked,
)

PARTS = {"train": "train", "test": "t10k"}
CLASSES = 10
_UNSIGNED_BYTE = 8

#: Where a data set's files may lie inside the folder that the user names.
FOLDERS = {
    "mnist": (".", "mnist", "MNIST", "MNIST/raw"),
    "fashion-mnist": (".", "fashion-mnist", "fashion", "FashionMNIST", "FashionMNIST/raw"),
}
#: The first twenty training labels. Both sets' files bear the same names, so that a folder named
#: for one could hold the other.
_OPENINGS = {
    "mnist": "50419213143536172869",
    "fashion-mnist": "90033027255095579106",
}


def _candidates(folder: Path, stem: str, name: str) -> list[Path]:
    dotted = stem.replace("-idx", ".idx")
    ends = (f"{stem}.gz", stem, f"{dotted}.gz", dotted)
    return [folder / sub / end for sub in FOLDERS[name] for end in ends]


def find(folder: Path, name: str) -> tuple[Path, ...]:
    """Find a data set's four files.

    Args:
        folder: The folder with the files, or with a folder of that name in it (see `FOLDERS`).
        name: A name in `FOLDERS`.

    Returns:
        Images and labels of the training part, then of the test part.

    Raises:
        ValueError: A file is missing; the message names it and the folders looked into.
    """
    found = []
    for part in PARTS.values():
        for kind in ("images-idx3", "labels-idx1"):
            stem = f"{part}-{kind}-ubyte"
            path = next((p for p in _candidates(folder, stem, name) if p.is_file()), None)
            if path is None:
                tried = ", ".join(str(folder / sub) for sub in FOLDERS[name])
                raise ValueError(
                    f"data set {name!r}: no file {stem}.gz or {stem} in any of {tried}; put the "
                    "four standard IDX files there, or name their folder with --data DIR"
                )
            found.append(path)
    return tuple(found)


def _header(path: Path, head: bytes, dimensions: int) -> tuple[int, ...]:
    """Sizes that a header gives, checked."""
    if len(head) < 4 + 4 * dimensions:
        raise ValueError(f"{path}: truncated inside the header")
    if head[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise ValueError(
            f"{path}: not an IDX file of unsigned bytes with {dimensions} dimension(s) "
            f"(magic number {head[:4].hex()})"
        )
    sizes = tuple(int.from_bytes(head[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    if not 0 < sizes[0] <= MAX_SAMPLES or any(not 0 < side <= MAX_SIDE for side in sizes[1:]):
        raise ValueError(
            f"{path}: sizes {sizes} in the header are out of bounds "
            f"(1 to {MAX_SAMPLES} samples, sides of 1 to {MAX_SIDE})"
        )
    return sizes


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Read one IDX file of unsigned bytes.

    Args:
        path: The file, gzipped where its name ends with .gz.
        dimensions: Number of dimensions it must have: 1 (labels) or 3 (images).

    Returns:
        The values, shape (N,) or (N, height, width).

    Raises:
        ValueError: The file is missing, truncated, too long or no such file; the message names it.
    """
    zipped = path.suffix == ".gz"
    # Python allocates what is asked of a file before it reads: a file this small holds no more.
    largest = min(size_of(path) * (MAX_INFLATION if zipped else 1), MAX_FILE)
    try:
        with gzip.open(path) if zipped else path.open("rb") as file:
            sizes = _header(path, file.read(4 + 4 * dimensions), dimensions)
            announced = prod(sizes)
            # One byte more than announced shows a file that goes on.
            content = file.read(announced + 1) if announced <= largest else b""
    except EOFError as error:
        raise ValueError(f"{path}: the gzip stream ends early (truncated)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: no valid gzip file ({error})") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    if announced > MAX_FILE:
        raise ValueError(
            f"{path}: {announced:,} bytes of values announced, too many for such a file (at most "
            f"{MAX_FILE:,})"
        )
    if len(content) != announced:
        kind = "truncated" if len(content) < announced else "longer than its header says"
        raise ValueError(f"{path}: {kind} ({announced} bytes of values announced)")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)


def _part(images: Path, labels: Path) -> Part:
    # One channel, which the format doesn't write down.
    return checked(str(labels), read_idx(images, 3)[:, None], read_idx(labels, 1), CLASSES)


def read(paths: tuple[Path, ...], name: str) -> ImageSet:
    """Read a data set's four files.

    Args:
        paths: What `find` returned.
        name: A name in `FOLDERS`.

    Returns:
        The set; images have one channel.

    Raises:
        ValueError: A file is wrong (the message names it and says why), the parts don't fit
            together, or they are those of the other data set.
    """
    train, test = _part(*paths[:2]), _part(*paths[2:])
    if train.images.shape[2:] != test.images.shape[2:]:
        raise ValueError(
            f"{paths[0].parent}: training images are {train.images.shape[2:]}, test images "
            f"{test.images.shape[2:]}"
        )
    opening = "".join(str(label) for label in train.labels[:20])
    other = next((known for known, labels in _OPENINGS.items() if labels == opening), name)
    if other != name:
        raise ValueError(f"{paths[1]}: holds {other!r}, not {name!r}; ask for that data set")
    return ImageSet(train, test, "IDX files")
