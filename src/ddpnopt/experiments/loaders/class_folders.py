# SPDX-License-Identifier: MIT
"""Colour images in one folder per class: train/airplane/0001.jpg, in a folder or a zip file."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ddpnopt.experiments.loaders.files import size_of
from ddpnopt.experiments.loaders.images import (
    MAX_SAMPLES,
    Bytes,
    ImageSet,
    Part,
    checked,
    looks_like_jpeg,
)

SIDE = 32
#: An image of 32 x 32 pixels takes 3 kB uncompressed.
MAX_IMAGE = 2**16
_ENDINGS = {".jpg": "JPEG copy", ".jpeg": "JPEG copy", ".png": "PNG files"}

Entries = Mapping[PurePosixPath, Callable[[], bytes]]


def find(places: Iterable[Path], name: str) -> Path | None:
    """Find a zip file NAME*.zip (with or without the hyphen), or folders train/ and test/.

    Args:
        places: Folders to look into.
        name: The set's name.

    Returns:
        The zip file or the folder that holds train/ and test/, or None.
    """
    for place in places:
        for stem in (name, name.replace("-", "")):
            # "cifar-10*" fits the hundred classes' files too.
            for path in sorted(place.glob(f"{stem}*.zip")):
                if not path.name[len(stem)].isdigit():
                    return path
        named = place.name.replace("-", "").lower() == name.replace("-", "")
        if named and all((place / part).is_dir() for part in ("train", "test")):
            return place
    return None


def _bounded(path: Path, name: object, size: int) -> None:
    if size > MAX_IMAGE:
        raise ValueError(f"{path}: {name} has {size:,} bytes, too many for {SIDE} x {SIDE} pixels")


def _of_folder(path: Path) -> Entries:
    def reader(file: Path) -> Callable[[], bytes]:
        def read_one() -> bytes:
            _bounded(path, file.relative_to(path), file.stat().st_size)
            return file.read_bytes()

        return read_one

    return {
        PurePosixPath(file.relative_to(path).as_posix()): reader(file)
        for part in ("train", "test")
        for file in sorted((path / part).glob("*/*"))
        if file.is_file()
    }


def _of_zip(archive: zipfile.ZipFile, path: Path) -> Entries:
    def reader(info: zipfile.ZipInfo) -> Callable[[], bytes]:
        def read_one() -> bytes:
            _bounded(path, info.filename, info.file_size)
            return archive.read(info)

        return read_one

    return {
        PurePosixPath(info.filename): reader(info)
        for info in archive.infolist()
        if not info.is_dir()
    }


def _pixels(content: bytes, name: PurePosixPath) -> Bytes:
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"{name} has {image.size} pixels, not {SIDE} x {SIDE}")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _assemble(entries: Entries, source: str, classes: int) -> ImageSet:
    images = {
        name: content
        for name, content in entries.items()
        if name.suffix.lower() in _ENDINGS and len(name.parts) >= 3
    }
    if len(images) > MAX_SAMPLES:
        raise ValueError(f"{source}: {len(images):,} images, more than {MAX_SAMPLES:,}")
    known = sorted({name.parts[-2] for name in images})
    if len(known) != classes:
        raise ValueError(
            f"{source}: {len(known)} folders of images, not one for each of the {classes} classes "
            "(train/CLASS/*.jpg and test/CLASS/*.jpg)"
        )
    if all(label.isdigit() for label in known):
        known.sort(key=int)

    def part(folder: str) -> Part:
        chosen = [name for name in images if name.parts[-3] == folder]
        if not chosen:
            raise ValueError(f"{source}: no images in {folder}/CLASS/")
        pixels = np.stack([_pixels(images[name](), name) for name in chosen])
        labels = np.array([known.index(name.parts[-2]) for name in chosen], dtype=np.uint8)
        # The original's files are shuffled; a part sorted by class would be a trap.
        order = np.random.default_rng(0).permutation(len(chosen))
        return checked(source, pixels[order], labels[order], classes)

    train, test = part("train"), part("test")
    form = _ENDINGS[next(iter(images)).suffix.lower()]
    return ImageSet(train, test, "JPEG copy" if looks_like_jpeg(train.images) else form)


def read(path: Path, classes: int) -> ImageSet:
    """Read a set of images in one folder per class.

    Args:
        path: What `find` returned.
        classes: Number of classes; their order is the alphabet's.

    Returns:
        The set, images (N, 3, 32, 32), shuffled with a fixed seed.

    Raises:
        ValueError: The archive is damaged, a class or part is missing, or an image is damaged or
            of the wrong size; the message names it.
    """
    try:
        if path.is_dir():
            return _assemble(_of_folder(path), str(path), classes)
        size_of(path)
        with zipfile.ZipFile(path) as archive:
            return _assemble(_of_zip(archive, path), str(path), classes)
    except Exception as error:
        # Image decoders and zipfile fail with a dozen types; most don't name the file.
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error
