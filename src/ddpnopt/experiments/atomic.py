# SPDX-License-Identifier: MIT
"""Files that are whole or absent, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

#: End of the name of a file under way.
PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside its place; at the end of the block it is on disk and moved there.

    Args:
        path: The file; what was there before stays until then, and after an exception.

    Yields:
        The file under way.

    Raises:
        OSError: It can't be written.
    """
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        # The new name, too, has to reach the disk; elsewhere a folder can't be opened.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
