# SPDX-License-Identifier: MIT
"""Reading files whose content is not trusted: sizes are bounded before anything is read."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

#: No file of the known sets is larger (SVHN's training part: 182 MB; CIFAR's archives: 170 MB).
MAX_FILE = 512 * 2**20
#: DEFLATE can't compress any better, so a header that announces more is wrong.
MAX_INFLATION = 1032


class Blob(NamedTuple):
    """A file's content.

    Attributes:
        source: The file's path, for messages.
        content: Its bytes.
    """

    source: str
    content: bytes


def size_of(path: Path) -> int:
    """Size of a file in bytes.

    Args:
        path: The file.

    Returns:
        Its size.

    Raises:
        ValueError: It is missing, can't be read or is larger than any such file.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    if size > MAX_FILE:
        raise ValueError(
            f"{path}: {size:,} bytes, too large for such a file (at most {MAX_FILE:,})"
        )
    return size


def read_file(path: Path) -> Blob:
    """Read a whole file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: It is missing, can't be read or is larger than any such file.
    """
    size_of(path)
    try:
        return Blob(str(path), path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error


class _Bounded:
    """A stream that gives no more than `MAX_FILE` bytes: whoever unpacks it is not flooded."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._room = file, MAX_FILE

    def read(self, size: int) -> bytes:
        """Up to `size` bytes.

        Raises:
            ValueError: All together are too many.
        """
        content = self._file.read(min(size, self._room + 1))
        self._room -= len(content)
        if self._room < 0:
            raise ValueError(f"unpacks to more than {MAX_FILE:,} bytes")
        return content


def read_tar(path: Path, wanted: Collection[str]) -> dict[str, Blob]:
    """Read files out of a tar archive into memory; nothing is written to disk.

    Args:
        path: The archive, gzipped or not.
        wanted: The names to read, without folders.

    Returns:
        What was found, by name.

    Raises:
        ValueError: The file is no tar archive, is damaged, or a member is too large.
    """
    size_of(path)
    found: dict[str, Blob] = {}
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            bounded = _Bounded(cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if zipped else raw)
            # As a stream: nothing is unpacked twice, and headers of any length are bounded, too.
            archive = tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r|")
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in wanted or not member.isreg():
                    continue
                if member.size > MAX_FILE:
                    raise ValueError(f"member {member.name} announces {member.size:,} bytes")
                stream = archive.extractfile(member)
                content = b"" if stream is None else stream.read(member.size)
                if len(content) != member.size:
                    raise ValueError(f"member {member.name} is truncated")
                found[name] = Blob(f"{path}/{member.name}", content)
    except Exception as error:
        # tarfile and its decompressors raise a dozen types for a damaged archive.
        raise ValueError(f"{path}: damaged archive ({error}); fetch it anew") from error
    return found


def first_folder(places: Iterable[Path], names: Collection[str]) -> Path | None:
    """Return the first folder that holds one of some files.

    Args:
        places: Folders to look into.
        names: File names.

    Returns:
        The folder, or None.
    """
    for place in places:
        if any((place / name).is_file() for name in names):
            return place
    return None
