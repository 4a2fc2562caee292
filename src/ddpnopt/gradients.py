# SPDX-License-Identifier: MIT
"""What happens to p.grad between backward and step, and whether a backward has happened at all."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping

import torch

from ddpnopt.decisions import all_finite, traced
from ddpnopt.dtensors import local, spread_out
from ddpnopt.sizes import norms
from ddpnopt.typing import Tensor

#: Two ratios are the same rescaling within this (half-precision gradients are rounded).
SAME = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}

#: Entries of a gradient that a fingerprint looks at.
SAMPLED = 2048
#: From so many gradients on, one norm of each is enough.
MANY = 4


def dense_gradients(parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Gradients that are there and not sparse, by parameter."""
    return {p: p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse}


def gradient_norms(parameters: Iterable[Tensor]) -> tuple[Mapping[Tensor, float | Tensor], bool]:
    """|p.grad| of every parameter that has a dense one, and whether all are finite.

    Numbers; tensors while a step is traced.
    """
    gradients = dense_gradients(parameters)
    if not gradients:
        return {}, True
    found = norms(list(gradients.values()))
    if traced():
        return dict(zip(gradients, found.unbind(), strict=True)), all_finite(found)
    sizes = dict(zip(gradients, found.tolist(), strict=True))
    return sizes, all(map(math.isfinite, sizes.values()))


def finite(t: Tensor) -> bool:
    """Whether all entries are finite: one fast pass, and another where squares overflow."""
    return all_finite(torch.linalg.vector_norm(t)) or bool(t.isfinite().all())


class Fingerprint:
    """Norms of the gradients when backward ended, to find a uniform rescaling afterwards.

    Version counters miss fused kernels, and a copy would cost memory; a rescaling (clipping,
    unscaling) multiplies the 1-norm and the 2-norm of every gradient alike, and noise, an added
    term or value clipping does not. Where gradients are many, their 2-norms together tell; of a
    large gradient every n-th entry is looked at.
    """

    def __init__(self) -> None:
        #: The rescaling to come, while none has been seen; None afterwards.
        self.expected: float | None = 1.0
        #: Parameters, and the 2-norms and 1-norms of their gradients, in that order.
        self._before: tuple[list[Tensor], list[float], list[float]] = [], [], []

    def take(self, parameters: Iterable[Tensor]) -> None:
        """Note the gradients as backward left them."""
        # Between backward and step of a traced iteration nothing happens.
        known = [p for p in parameters if _dense(p)] if not traced() else []
        self._before = known, *_norms(known, len(known) < MANY)

    def clear(self) -> None:
        """A step has been taken."""
        self._before, self.expected = ([], [], []), None

    def rescaling(self) -> float:
        """r: the factor all gradients were multiplied by; 1 if none or not one for all."""
        there = [before for before in zip(*self._before, strict=True) if _dense(before[0])]
        now = _norms([p for p, _, _ in there], len(self._before[0]) < MANY)
        ratios: list[float] = []
        tolerance = 0.0
        for (p, two, one), two_now, one_now in zip(there, *now, strict=True):
            assert p.grad is not None
            tolerance = max(tolerance, SAME.get(p.grad.dtype, 1e-2))
            if two > 0 and one > 0:
                ratios += [two_now / two, one_now / one]
        if not ratios or not all(r < float("inf") for r in ratios):
            return 1.0
        r = sorted(ratios)[len(ratios) // 2]
        if any(abs(ratio - r) > tolerance * r for ratio in ratios):
            return 1.0
        return 1.0 if abs(r - 1) <= 1e-6 else r


def _dense(p: Tensor) -> bool:
    return p.grad is not None and not p.grad.is_sparse


def _norms(parameters: list[Tensor], both: bool) -> tuple[list[float], list[float]]:
    """2-norms and 1-norms of gradients, or the 2-norms twice."""
    parts = [sampled(p.grad) for p in parameters if p.grad is not None]
    if not parts:
        return [], []
    two = norms(parts).tolist()
    return two, norms(parts, 1.0).tolist() if both else two


def sampled(gradient: Tensor, entries: int = SAMPLED) -> Tensor:
    """Every n-th entry of a large gradient, as a view.

    Args:
        gradient: It; it is returned itself where it has not twice as many entries.
        entries: About how many there are to be.
    """
    stride = gradient.numel() // entries
    if stride < 2 or not gradient.is_contiguous() or spread_out(gradient):
        return gradient
    return gradient.view(-1)[:: stride | 1]  # odd: not one column of the matrix


class Consumed:
    """Remembers which gradients a step has used, so that a second step without backward is seen."""

    def __init__(self) -> None:
        self._used: list[tuple[weakref.ref[Tensor], int]] = []

    def mark(self, parameters: Iterable[Tensor]) -> None:
        """The present gradients have been used."""
        self._used = [
            (weakref.ref(p.grad), local(p.grad)._version) for p in parameters if p.grad is not None
        ]

    def fresh(self, parameters: Iterable[Tensor]) -> bool:
        """Whether any gradient is new since the last step."""
        used = {id(t): version for ref, version in self._used if (t := ref()) is not None}
        return any(
            used.get(id(p.grad)) != local(p.grad)._version for p in parameters if p.grad is not None
        )


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
