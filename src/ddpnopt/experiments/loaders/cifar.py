# SPDX-License-Identifier: MIT
"""CIFAR-10 and CIFAR-100 from their binary files, their Python files, or an archive of either."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddpnopt.experiments.loaders import class_folders
from ddpnopt.experiments.loaders.files import Blob, first_folder, read_file, read_tar
from ddpnopt.experiments.loaders.images import (
    MAX_SAMPLES,
    Bytes,
    ImageSet,
    Part,
    checked,
    looks_like_jpeg,
)
from ddpnopt.experiments.loaders.pickles import read_pickle

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """How a set's files are named and filled.

    Attributes:
        classes: Number of classes.
        places: Folders inside the user's folder in which the set may lie.
        binary: Names of the binary files, the test part last.
        binary_folder: The folder that the binary archive unpacks to.
        label_bytes: Bytes before the pixels of a record; the class is the last of them.
        python: Names of the Python files, the test part last.
        python_folder: The folder that the Python archive unpacks to.
        label_key: Key of the labels in a Python file.
    """

    classes: int
    places: tuple[str, ...]
    binary: tuple[str, ...]
    binary_folder: str
    label_bytes: int
    python: tuple[str, ...]
    python_folder: str
    label_key: str


LAYOUTS = {
    "cifar-10": Layout(
        classes=10,
        places=(".", "cifar-10", "cifar10", "CIFAR10"),
        binary=(*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
        binary_folder="cifar-10-batches-bin",
        label_bytes=1,
        python=(*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
        python_folder="cifar-10-batches-py",
        label_key="labels",
    ),
    "cifar-100": Layout(
        classes=100,
        places=(".", "cifar-100", "cifar100", "CIFAR100"),
        binary=("train.bin", "test.bin"),
        binary_folder="cifar-100-binary",
        label_bytes=2,
        python=("train", "test"),
        python_folder="cifar-100-python",
        label_key="fine_labels",
    ),
}


def _binary(blob: Blob, layout: Layout) -> tuple[Bytes, Bytes]:
    """Images and labels of one binary file."""
    record = layout.label_bytes + PIXELS
    count, rest = divmod(len(blob.content), record)
    if rest or not 0 < count <= MAX_SAMPLES:
        raise ValueError(
            f"{blob.source}: {len(blob.content):,} bytes are not a whole number of records of "
            f"{record} bytes (truncated?); fetch it anew"
        )
    table = np.frombuffer(blob.content, dtype=np.uint8).reshape(count, record)
    return table[:, layout.label_bytes :].reshape(-1, *SHAPE), table[:, layout.label_bytes - 1]


def _python(blob: Blob, layout: Layout) -> tuple[Bytes, Bytes]:
    """Images and labels of one Python file."""
    content = read_pickle(blob)
    pixels, labels = content.get("data"), content.get(layout.label_key)
    if not isinstance(pixels, np.ndarray) or pixels.shape[1] != PIXELS:
        raise ValueError(
            f"{blob.source}: 'data' is no table of unsigned bytes with {PIXELS} columns"
        )
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{blob.source}: {layout.label_key!r} is no list of integers")
    wrong = [label for label in labels if not 0 <= label < layout.classes]
    if wrong:
        # Python writes no number out that is longer than this.
        shown = wrong[0] if abs(wrong[0]) < 10**12 else "of many digits"
        raise ValueError(f"{blob.source}: label {shown} is not in 0 to {layout.classes - 1}")
    return pixels.reshape(-1, *SHAPE), np.array(labels, dtype=np.uint8)


Parse = Callable[[Blob, Layout], tuple[Bytes, Bytes]]


def _assemble(
    blobs: Mapping[str, Blob], names: tuple[str, ...], parse: Parse, layout: Layout, form: str
) -> ImageSet:
    """Put the parts of all files together, the last file being the test part."""

    def part(wanted: tuple[str, ...]) -> Part:
        pieces = []
        for name in wanted:
            images, labels = parse(blobs[name], layout)
            pieces.append(checked(blobs[name].source, images, labels, layout.classes))
        return Part(
            np.concatenate([piece.images for piece in pieces]),
            np.concatenate([piece.labels for piece in pieces]),
        )

    train, test = part(names[:-1]), part(names[-1:])
    # The files of a re-encoded copy look like the original's; its pixels don't.
    return ImageSet(train, test, "JPEG copy" if looks_like_jpeg(train.images) else form)


def _kinds(layout: Layout) -> tuple[tuple[tuple[str, ...], str, Parse, str], ...]:
    return (
        (layout.binary, layout.binary_folder, _binary, "CIFAR binary files"),
        (layout.python, layout.python_folder, _python, "CIFAR Python files"),
    )


def _archives(layout: Layout) -> tuple[str, ...]:
    stem = layout.python_folder.removesuffix("-batches-py").removesuffix("-python")
    return (f"{stem}-binary.tar.gz", f"{stem}-python.tar.gz")


def _missing(where: Path, names: tuple[str, ...], present: Mapping[str, object]) -> None:
    absent = [name for name in names if name not in present]
    if absent:
        raise ValueError(
            f"{where}: {', '.join(absent)} missing; all of {', '.join(names)} are needed"
        )


def find(folder: Path, name: str) -> tuple[Path, ...]:
    """Find a set's files.

    Args:
        folder: The user's folder.
        name: "cifar-10" or "cifar-100".

    Returns:
        The binary files, else the Python files, else an archive of them, else a folder or zip
        file with one folder of images per class.

    Raises:
        ValueError: There is nothing, or one file of several is missing; the message says what was
            looked for and where.
    """
    layout = LAYOUTS[name]
    places = [folder / place for place in layout.places]
    for names, inner, _, _ in _kinds(layout):
        place = first_folder([p for root in places for p in (root, root / inner)], names)
        if place is not None:
            paths = {file: place / file for file in names if (place / file).is_file()}
            _missing(place, names, paths)
            return tuple(paths[file] for file in names)
    archives = _archives(layout)
    place = first_folder(places, archives)
    if place is not None:
        return (next(place / file for file in archives if (place / file).is_file()),)
    found = class_folders.find(places, name)
    if found is not None:
        return (found,)
    tried = ", ".join(str(place) for place in places)
    raise ValueError(
        f"data set {name!r}: none of {layout.binary[0]} ({layout.binary_folder}), "
        f"{layout.python[0]} ({layout.python_folder}), {archives[0]}, {archives[1]} or "
        f"{name}*.zip in any of {tried}; put the files there, or name their folder with --data DIR"
    )


def read(paths: tuple[Path, ...], name: str) -> ImageSet:
    """Read a set's files.

    Args:
        paths: What `find` returned.
        name: "cifar-10" or "cifar-100".

    Returns:
        The set, images (N, 3, 32, 32). Its form says "JPEG copy" where the pixels went through
        JPEG compression.

    Raises:
        ValueError: A file is wrong; the message names it and says why.
    """
    layout = LAYOUTS[name]
    if len(paths) > 1:
        for names, _, parse, form in _kinds(layout):
            if paths[0].name in names:
                blobs = {path.name: read_file(path) for path in paths}
                return _assemble(blobs, names, parse, layout, form)
    if paths[0].name in _archives(layout):
        for names, _, parse, form in _kinds(layout):
            blobs = read_tar(paths[0], names)
            if blobs:
                _missing(paths[0], names, blobs)
                return _assemble(blobs, names, parse, layout, form)
        raise ValueError(f"{paths[0]}: holds none of CIFAR's files")
    return class_folders.read(paths[0], layout.classes)
