# SPDX-License-Identifier: MIT
"""Numeric arrays from MATLAB 5 files, as far as SVHN needs them.

SciPy reads far more of the format, but a damaged file can crash its reader, and the whole process
with it. Here every length is compared with the bytes that are there.

A file is a header of 128 bytes and elements: a tag (type, number of bytes), then the bytes, padded
to a multiple of 8. An array is an element that consists of four: flags, sizes, name, values.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from math import prod

import numpy as np
from numpy.typing import NDArray

from ddpnopt.experiments.loaders.files import MAX_FILE, Blob

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
_NAME_TYPES = (1, 2, 16)
#: Types of an element's bytes, in the file's byte order.
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
#: Classes of arrays: double, single and the integers. Cells, objects and text are not numbers.
_NUMERIC = range(6, 16)
_COMPLEX = 0x08


def _elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and bytes of each element."""
    place = 0
    while place < len(content):
        tag = content[place : place + 8]
        if len(tag) < 8:
            raise ValueError("ends inside a tag (truncated)")
        kind, size = (int(n) for n in np.frombuffer(tag, dtype=f"{order}u4"))
        # A few bytes may lie in the tag itself.
        small = kind >> 16
        start = place + (4 if small else 8)
        if small:
            kind, size = kind & 0xFFFF, small
        if start + size > len(content) or small > 4:
            raise ValueError(f"announces {size} bytes where {len(content) - start} are (truncated)")
        yield kind, content[start : start + size]
        end = start + size
        place = end if kind == _COMPRESSED else end + -end % 8


def _inflated(packed: memoryview, room: int) -> memoryview:
    stream = zlib.decompressobj()
    # Without a bound at 0: zlib takes that for none.
    content = stream.decompress(packed, max(room, 1))
    if not stream.eof or len(content) > room:
        raise ValueError("a compressed element is truncated, or all together are too large")
    return memoryview(content)


def _array(content: memoryview, order: str) -> tuple[str, NDArray[np.generic] | str]:
    """Name and values of an array element; a word in place of values that are not read."""
    parts = list(_elements(content, order))
    if len(parts) < 3:
        raise ValueError("an array has no flags, sizes or name (truncated)")
    (_, flags), (_, sizes), (name_kind, name) = parts[:3]
    if len(flags) != 8 or len(sizes) % 4 or name_kind not in _NAME_TYPES:
        raise ValueError("an array's flags, sizes or name are damaged")
    label = bytes(name).decode("latin1")
    word = int(np.frombuffer(flags, dtype=f"{order}u4")[0])
    if word & 0xFF not in _NUMERIC or (word >> 8) & _COMPLEX:
        return label, "no array of real numbers"
    shape = tuple(int(n) for n in np.frombuffer(sizes, dtype=f"{order}i4"))
    kind, raw = parts[3] if len(parts) == 4 else (0, content[:0])
    if kind not in _NUMBERS:
        raise ValueError(f"{label} holds no values, or values of unknown type {kind}")
    dtype = np.dtype(order + _NUMBERS[kind])
    if min(shape, default=-1) < 0 or prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"{label} announces shape {shape}, but holds {len(raw)} bytes")
    return label, np.frombuffer(raw, dtype=dtype).reshape(shape, order="F")


def read_mat(blob: Blob) -> dict[str, NDArray[np.generic] | str]:
    """Read a MATLAB 5 file.

    Args:
        blob: The file.

    Returns:
        Arrays of real numbers by name, in the type in which they are stored; for what is none, a
        word that says so.

    Raises:
        ValueError: The file is damaged or in another format; the message names it.
    """
    content = memoryview(blob.content)
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:_HEADER]))
    found = {}
    room = MAX_FILE
    try:
        if order is None:
            raise ValueError("no header of a MATLAB 5 file")
        for kind, raw in _elements(content[_HEADER:], order):
            inner: Iterable[tuple[int, memoryview]] = ((kind, raw),)
            if kind == _COMPRESSED:
                # Of the whole file: many elements may each be below the bound.
                unpacked = _inflated(raw, room)
                room -= len(unpacked)
                inner = _elements(unpacked, order)
            for inner_kind, array in inner:
                if inner_kind == _MATRIX:
                    name, values = _array(array, order)
                    found[name] = values
    except (ValueError, zlib.error) as error:
        raise ValueError(
            f"{blob.source}: not read as a MATLAB 5 file ({error}); fetch it anew"
        ) from error
    return found
