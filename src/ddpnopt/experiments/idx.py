# SPDX-License-Identifier: MIT
"""Image sets in the IDX format (MNIST and those shaped like it), read from a folder.

An IDX file is a big-endian header (two zero bytes, the type, the number of dimensions, then the
size of each) and the values, here unsigned bytes. Nothing is trusted: sizes are bounded before
anything is read, and a file that is not what it should be is refused by name.
"""

from __future__ import annotations

import gzip
import zlib
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Split = tuple[Bytes, Bytes]

PARTS = {"train": "train", "test": "t10k"}
CLASSES = 10
MAX_SAMPLES, MAX_SIDE = 1_000_000, 256
_UNSIGNED_BYTE = 8

#: Where a data set's files may lie inside the folder that the user names.
FOLDERS = {
    "mnist": (".", "mnist", "MNIST/raw"),
    "fashion-mnist": (".", "fashion-mnist", "FashionMNIST/raw"),
}


def _find(folder: Path, stem: str, name: str) -> Path:
    candidates = [folder / sub / (stem + end) for sub in FOLDERS[name] for end in (".gz", "")]
    for path in candidates:
        if path.is_file():
            return path
    tried = ", ".join(str(folder / sub) for sub in FOLDERS[name])
    raise ValueError(
        f"data set {name!r}: no file {stem}.gz or {stem} in any of {tried}; put the four "
        "standard IDX files there, or name their folder with --data DIR"
    )


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
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            sizes = _header(path, file.read(4 + 4 * dimensions), dimensions)
            # One byte more than announced shows a file that goes on.
            content = file.read(prod(sizes) + 1)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except EOFError as error:
        raise ValueError(f"{path}: the gzip stream ends early (truncated)") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: no valid gzip file ({error})") from error
    if len(content) != prod(sizes):
        kind = "truncated" if len(content) < prod(sizes) else "longer than its header says"
        raise ValueError(f"{path}: {kind} ({prod(sizes)} bytes of values announced)")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes)


def _part(folder: Path, name: str, part: str) -> Split:
    images_path = _find(folder, f"{PARTS[part]}-images-idx3-ubyte", name)
    labels_path = _find(folder, f"{PARTS[part]}-labels-idx1-ubyte", name)
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: {len(labels)} labels for {len(images)} images")
    if labels.max() >= CLASSES:
        raise ValueError(f"{labels_path}: label {labels.max()} is not in 0 to {CLASSES - 1}")
    return images, labels


@lru_cache(maxsize=1)
def read_image_set(folder: Path, name: str) -> tuple[Split, Split]:
    """Read a data set's four files.

    Args:
        folder: The folder with the files, or with a folder of that name in it (see `FOLDERS`).
        name: A name in `FOLDERS`.

    Returns:
        Training and test part, each images (N, height, width) and labels (N,), unsigned bytes.

    Raises:
        ValueError: A file is missing or wrong (the message names it and says why), or the parts
            don't fit together.
    """
    train, test = _part(folder, name, "train"), _part(folder, name, "test")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(
            f"{folder}: training images are {train[0].shape[1:]}, test images {test[0].shape[1:]}"
        )
    return train, test
