# SPDX-License-Identifier: MIT
"""Image sets as unsigned bytes, the form that every reader returns, with its checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

Bytes = NDArray[np.uint8]

#: Bounds of what a file may announce, far above every known set.
MAX_SAMPLES, MAX_SIDE = 1_000_000, 256
_LUMA = (0.299, 0.587, 0.114)
_EXAMINED = 500


@dataclass(frozen=True)
class Part:
    """A training or a test part.

    Attributes:
        images: Shape (N, channels, height, width).
        labels: Class indices, shape (N,).
    """

    images: Bytes
    labels: Bytes


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An image set with the split that it comes with.

    Attributes:
        train: Training part.
        test: Test part.
        form: Where the bytes come from, for a reader: "IDX files", "OpenML 554", "JPEG copy".
    """

    train: Part
    test: Part
    form: str

    @property
    def origin(self) -> str:
        """Numbers of images and the form: "60,000 + 10,000 images, IDX files"."""
        return f"{len(self.train.labels):,} + {len(self.test.labels):,} images, {self.form}"

    @cached_property
    def checksum(self) -> str:
        """Hash of every pixel and label: two copies that differ anywhere differ here."""
        digest = blake2b(digest_size=16)
        for part in (self.train, self.test):
            digest.update(repr(part.images.shape).encode())
            digest.update(np.ascontiguousarray(part.images).data)
            digest.update(np.ascontiguousarray(part.labels).data)
        return digest.hexdigest()


def checked(source: str, images: Bytes, labels: Bytes, classes: int) -> Part:
    """Put images and labels together.

    Args:
        source: The file that is named if something is wrong.
        images: Shape (N, channels, height, width).
        labels: Shape (N,).
        classes: Number of classes C.

    Returns:
        The part.

    Raises:
        ValueError: No sample, as many labels as images not there, or a label not in 0 to C - 1.
    """
    if len(images) != len(labels):
        raise ValueError(f"{source}: {len(labels)} labels for {len(images)} images")
    if not len(labels):
        raise ValueError(f"{source}: holds no sample")
    if labels.max() >= classes:
        raise ValueError(f"{source}: label {labels.max()} is not in 0 to {classes - 1}")
    return Part(images, labels)


def looks_like_jpeg(images: Bytes) -> bool:
    """Tell whether colour images went through JPEG compression.

    JPEG rounds the cosine coefficients of blocks of 8 x 8 pixels, most of the high ones to zero.
    They are near zero on the grid that starts at the corner; on a grid moved by half a block only
    if the images are smooth everywhere.

    Args:
        images: Shape (N, 3, height, width); the first 500 are looked at.

    Returns:
        True if the corner's grid has far more vanishing coefficients than the moved one.
    """
    # Greyscale JPEG would need other weights; the sets that circulate as JPEG are in colour.
    if images.shape[1] != 3 or min(images.shape[2:]) < 16:
        return False
    luma = np.tensordot(images[:_EXAMINED].astype(np.float64), _LUMA, axes=(1, 0))

    def vanishing(shift: int) -> float:
        rows, columns = ((side - 4) // 8 for side in luma.shape[1:])
        grid = luma[:, shift : shift + 8 * rows, shift : shift + 8 * columns]
        blocks = grid.reshape(-1, rows, 8, columns, 8).transpose(0, 1, 3, 2, 4)
        high = dctn(blocks, axes=(-2, -1), norm="ortho")[..., 4:, 4:]
        return float((np.abs(high) < 0.5).mean())

    return vanishing(0) > 0.1 + 2 * vanishing(4)
