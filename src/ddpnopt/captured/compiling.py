# SPDX-License-Identifier: MIT
"""A program made into few kernels by torch's compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor
from torch import fx

from ddpnopt.typing import Tensor

#: Entries that are worth another thread, as for torch's own operators; the compiler's bound is 512.
#: Between two kernels threads fall asleep, and to wake one takes longer than a small net's kernel.
MIN_CHUNK = 32768


class Compiled:
    """A straight line of operators, compiled when it is first called.

    By Inductor itself: `torch.compile` would read the program's Python first and ask at every call
    whether it still holds, a fifth of a small net's step. What it would ask, `Plan.current` asks.

    Args:
        graph: The operators.
        arguments: How many of its inputs, the first ones, are not the same tensors in every call;
            they are never written to.
    """

    def __init__(self, graph: fx.GraphModule, arguments: int) -> None:
        self._graph, self._arguments = graph, arguments
        self._made: Callable[..., Any] | None = None
        self._strides: list[tuple[int, ...]] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run it.

        Raises:
            Exception: In the first call, whatever the compiler raises.
        """
        if self._made is None:
            made = _compiled(self._graph, list(inputs))
            self._made, self._strides = made, [t.stride() for t in inputs[: self._arguments]]
        given = map(_laid_out, inputs, self._strides)
        return list(self._made(*given, *inputs[self._arguments :]))


def _compiled(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """By Inductor; on CPUs what calls the kernels is C++, too, a quarter of a small net's step."""
    options = {
        "cpp_wrapper": all(t.device.type == "cpu" for t in inputs),
        "cpp.min_chunk_size": MIN_CHUNK,
        "fallback_random": True,  # the compiler's own generator draws other numbers
    }
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    try:
        log.setLevel(logging.ERROR)  # it tells of operators that have no C function: nobody's loss
        made = torch._inductor.compile(graph, list(inputs), options=options)
    finally:
        log.setLevel(level)
    assert callable(made)
    run: Callable[..., Any] = made
    return run


def _laid_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor in memory as the kernels expect it."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
