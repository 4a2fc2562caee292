# SPDX-License-Identifier: MIT
"""CIFAR's Python files: pickles, read without running anything that they contain.

A pickle is a program. Only plain values may come out of it here, and the few names that NumPy
needs to rebuild an array stand for classes of this file, which accept nothing but a table of
unsigned bytes that is as long as it says. Any other name is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import numpy as np

from ddpnopt.experiments.loaders.files import Blob
from ddpnopt.experiments.loaders.images import MAX_SAMPLES, Bytes

#: Opcodes of a file of 50,000 samples: about one a label and two a name.
_MAX_STEPS = 8 * MAX_SAMPLES


class _Dtype:
    """Stands for numpy.dtype, and is always that of unsigned bytes."""

    __slots__ = ()

    def __new__(cls, code: object = None, *_: object) -> _Dtype:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError("array of another type; only unsigned bytes are read")
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment: nothing that matters to bytes."""


class _Array:
    """Stands for numpy.ndarray while it is rebuilt: a shape and exactly as many bytes."""

    __slots__ = ("values",)
    values: Bytes

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), (int(rows), int(columns)), _Dtype(), int(fortran), bytes(raw)):
                self.fill((rows, columns), raw, fortran=bool(fortran))
            case _:
                raise pickle.UnpicklingError("array that is not a table of unsigned bytes")

    def fill(self, shape: tuple[int, int], raw: bytes | bytearray, *, fortran: bool) -> None:
        if min(shape) < 0 or prod(shape) != len(raw):
            raise pickle.UnpicklingError(f"array of shape {shape} with {len(raw)} bytes")
        values = np.frombuffer(raw, dtype=np.uint8)
        self.values = values.reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _frombuffer(*arguments: object) -> _Array:
    # How the newest protocol writes arrays.
    match arguments:
        case (
            bytes() | bytearray() as raw,
            _Dtype(),
            (int(rows), int(columns)),
            "C" | "F" as order,
        ):
            array = _Array()
            array.fill((rows, columns), raw, fortran=order == "F")
            return array
        case _:
            raise pickle.UnpicklingError("array that is not a table of unsigned bytes")


def _no_bytes() -> bytes:
    # How Python 3 writes an empty string of bytes in the old protocols.
    return b""


_STAND_INS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("__builtin__", "bytes"): _no_bytes,
}


#: Python's own steps, by opcode.
_DISPATCH: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python, whose steps can be looked at before they are taken.

    Values can be used again at no cost in a pickle, so that a small file may stand for an object
    whose hash or text takes for ever: keys are plain, and no set is made. Only the stand-ins'
    instances take a state: the functions and classes themselves would keep it.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_DISPATCH)

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._room = len(content)

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        """Answer the known names with their stand-ins, refuse every other by name."""
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not data")
        return _STAND_INS[module, name]

    def _encode(self, text: object, encoding: object) -> bytes:
        # How Python 3 writes bytes in the old protocols: each text is used once.
        if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
            raise pickle.UnpicklingError("text in another encoding than latin1")
        self._room -= len(text)
        if self._room < 0:
            raise pickle.UnpicklingError("more bytes of text than the file has")
        return text.encode("latin1")

    def _plain_keys(self, keys: Sequence[object]) -> None:
        if not all(isinstance(key, str | bytes | int) for key in keys):
            raise pickle.UnpicklingError("a dictionary whose keys are not plain")

    def _setitem(self) -> None:
        self._plain_keys(self.stack[-2:-1])
        _DISPATCH[pickle.SETITEM[0]](self)

    def _setitems(self) -> None:
        self._plain_keys(self.stack[::2])
        _DISPATCH[pickle.SETITEMS[0]](self)

    def _dict(self) -> None:
        self._plain_keys(self.stack[::2])
        _DISPATCH[pickle.DICT[0]](self)

    def _build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _Dtype):
            raise pickle.UnpicklingError("a state for what has none")
        _DISPATCH[pickle.BUILD[0]](self)

    dispatch[pickle.SETITEM[0]] = _setitem
    dispatch[pickle.SETITEMS[0]] = _setitems
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.BUILD[0]] = _build


def _inspect(content: bytes) -> None:
    """Walk through the program without running it: lengths and places in memory are bounded."""
    for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if step > _MAX_STEPS:
            raise pickle.UnpicklingError(f"more than {_MAX_STEPS} steps")
        if "SET" in opcode.name and not opcode.name.startswith("SETITEM"):
            raise pickle.UnpicklingError("it holds a set")
        # The unpickler makes room for the place that is named, used or not.
        if "PUT" in opcode.name and isinstance(argument, int) and argument > _MAX_STEPS:
            raise pickle.UnpicklingError(f"place {argument} in memory")


def read_pickle(blob: Blob) -> Mapping[str, object]:
    """Read a pickled dictionary of plain values and tables of unsigned bytes.

    Args:
        blob: The file.

    Returns:
        The dictionary, keys as text; tables are unsigned bytes, shape (rows, columns).

    Raises:
        ValueError: The file is truncated, no pickle, no dictionary, or asks for anything but data;
            the message names it. Nothing that the file contains was run.
    """
    try:
        _inspect(blob.content)
        raw = _Unpickler(blob.content).load()
    except Exception as error:
        # A damaged pickle can fail with almost any exception; none of them says which file.
        raise ValueError(
            f"{blob.source}: not read, since it is no plain CIFAR pickle ({error}); fetch it anew "
            "from where it comes"
        ) from error
    if not isinstance(raw, dict):
        raise ValueError(f"{blob.source}: the pickle holds no dictionary")
    result: dict[str, object] = {}
    for key, value in raw.items():
        name = key.decode("latin1") if isinstance(key, bytes) else str(key)
        result[name] = getattr(value, "values", None) if isinstance(value, _Array) else value
    return result
