# SPDX-License-Identifier: MIT
"""The generators that a forward pass may draw from: torch's, Python's and NumPy's."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ddpnopt.typing import Tensor

#: Bytes of a Mersenne twister's state: 624 words and the position among them.
WORDS, TWISTER = 624, 2500
#: So many passes are compared by NumPy's own, slow account of its state.
TRIALS = 8


def cuda_in_use() -> bool:
    """Whether CUDA has been initialised; asking does not initialise it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _twister(numpy: Any) -> bytes | None:
    """The bytes of NumPy's global generator; None where it is no Mersenne twister."""
    get = getattr(numpy.random, "get_bit_generator", None)
    if get is None or type(bits := get()) is not numpy.random.MT19937:
        return None
    return ctypes.string_at(bits.ctypes.state_address, TWISTER)


class _NumPy:
    """NumPy's global generator, whose full state costs more to read than a small network's pass.

    Few models draw from it. Until one has been seen to, its state's bytes are read, which tell a
    change (all but that of a normal variate kept from before); `get_state` from then on.
    """

    def __init__(self) -> None:
        self.trials = TRIALS
        self.drawn = False

    def capture(self) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return None
        if self.drawn or self.trials > 0:
            self.trials -= 1
            return numpy.random.get_state()
        bits = _twister(numpy)
        return numpy.random.get_state() if bits is None else bits

    def restore(self, state: Any) -> None:
        numpy = sys.modules.get("numpy")
        if numpy is None or state is None:
            return
        if isinstance(state, bytes):
            if _twister(numpy) == state:
                return
            self.drawn = True
            words = numpy.frombuffer(state[: 4 * WORDS], dtype=numpy.uint32)
            at = int.from_bytes(state[4 * WORDS :], sys.byteorder)
            numpy.random.set_state(("MT19937", words, at))
            return
        if not self.drawn:
            now = numpy.random.get_state()
            same = now[0] == state[0] and now[2:] == state[2:] and (now[1] == state[1]).all()
            if same:
                return
            self.drawn = True
        numpy.random.set_state(state)


_numpy = _NumPy()


@dataclass(frozen=True)
class Randomness:
    """States of the generators that a forward pass may draw from."""

    torch_cpu: Tensor
    torch_cuda: list[Tensor] | None
    python: Any
    numpy: Any

    @staticmethod
    def capture() -> Randomness:
        """The present states; NumPy's only if it is imported, CUDA's only if it is in use."""
        cuda = torch.cuda.get_rng_state_all() if cuda_in_use() else None
        return Randomness(torch.get_rng_state(), cuda, random.getstate(), _numpy.capture())

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None:
            torch.cuda.set_rng_state_all(self.torch_cuda)
        random.setstate(self.python)
        _numpy.restore(self.numpy)


@contextmanager
def drawing(state: Tensor | None) -> Iterator[None]:
    """Within the block torch's CPU generator starts from a state; None: it is as it is."""
    if state is None:
        yield
        return
    outside = torch.get_rng_state()
    try:
        torch.set_rng_state(state)
        yield
    finally:
        torch.set_rng_state(outside)
