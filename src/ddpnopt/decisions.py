# SPDX-License-Identifier: MIT
"""What the host decides by numbers on the device.

All that a usual step reads back is read here. While a step is traced (`ddpnopt.capture`) a decision
becomes a condition of the program, and the numbers that change from step to step stay tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ddpnopt.typing import Tensor

#: Why a step is no usual one, in most cases.
UNSETTLED = "the model's structure is still being found out"


class Conditions(Protocol):
    """Collects what a traced step has decided."""

    def decide(self, condition: Tensor) -> bool:
        """The value of a boolean tensor, which the program is going to depend on."""

    def postpone(self, why: str) -> None:
        """This step is no usual one: another has to be traced."""

    def phase_ends(self) -> None:
        """The forward pass has ended, or the backward pass."""

    def refuse(self, why: str) -> None:
        """This step depends on numbers in a way that no condition says."""

    def conclude(self) -> Tensor:
        """Whether all decisions are as they were."""


_conditions: Conditions | None = None


def traced() -> bool:
    """Whether this step is being traced."""
    return _conditions is not None


def postpone(why: str) -> None:
    """What is done now is not done in every step.

    Args:
        why: What is said where that never ends.
    """
    if _conditions is not None:
        _conditions.postpone(why)


def phase_ends() -> None:
    """What comes next runs when the user's loop has had its turn."""
    if _conditions is not None:
        _conditions.phase_ends()


def refuse(why: str) -> None:
    """What comes next reads numbers in every step: no program could go on without the host."""
    if _conditions is not None:
        _conditions.refuse(why)


def sound() -> Tensor:
    """Whether all decisions have so far been as they were: a condition, while a step is traced."""
    return torch.ones((), dtype=torch.bool) if _conditions is None else _conditions.conclude()


@contextmanager
def tracing(conditions: Conditions) -> Iterator[None]:
    """Within the block decisions are conditions; for all threads, since autograd has its own."""
    global _conditions
    before, _conditions = _conditions, conditions
    try:
        yield
    finally:
        _conditions = before


def exceed(*pairs: tuple[Tensor, float]) -> list[bool]:
    """Whether each value lies above its bound; one synchronisation for all. False for nan."""
    if _conditions is not None:
        return [_conditions.decide(value > bound) for value, bound in pairs]
    if len(pairs) == 1 or pairs[0][0].device.type == "cpu":  # nothing to wait for
        return [float(value) > bound for value, bound in pairs]
    values = torch.stack([value for value, _ in pairs]).tolist()
    return [value > bound for value, (_, bound) in zip(values, pairs, strict=True)]


def holds(condition: Tensor) -> bool:
    """Whether a boolean tensor is True."""
    return bool(condition) if _conditions is None else _conditions.decide(condition)


def anything(mask: Tensor) -> bool:
    """Whether an entry of a boolean tensor is True."""
    return holds(mask.any())


def all_finite(numbers: Tensor) -> bool:
    """Whether a few numbers are finite."""
    if _conditions is not None:
        return _conditions.decide(numbers.isfinite().all())
    values = numbers.tolist()
    return all(map(math.isfinite, values if isinstance(values, list) else [values]))


def as_number(value: float | Tensor) -> float | Tensor:
    """A hyperparameter; while a step is traced a tensor stays one."""
    return value if _conditions is not None and isinstance(value, Tensor) else float(value)


def is_zero(value: float | Tensor) -> bool:
    """Whether a hyperparameter is known to be 0."""
    return not isinstance(value, Tensor) and value == 0


def same(a: float | Tensor, b: float | Tensor) -> bool:
    """Whether two hyperparameters are known to be equal."""
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)
